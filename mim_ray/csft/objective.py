"""The loss of C-SFT at three levels (paper Eq. 6), each the contrastive loss of Eq. 5 over space-time negatives.

    L_csft = L_q2item + α L_q2txt + β L_q2img

An item without a title (image) takes no part at the text (image) level, neither as a positive nor as a negative. The mean
of a level is over the queries of *all* workers that take part, so that P workers equal one process on the joined batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mim_ray.contrastive.gather import gather, gather_with_grad, place, total
from mim_ray.contrastive.info_nce import MAX_LOGIT_SCALE, info_nce_rows
from mim_ray.csft.negatives import Candidates, PastBatches, masked_pairs

LEVELS = ("mm", "text", "image")


@dataclass(frozen=True)
class LocalBatch:
    """Embedded pairs of one worker.

    Attributes:
        queries: (N, D) h_q^img.
        items: (2N, 3, D) h^MM, h^txt, h^img of the N positives, then of the N hard negatives ((N, 3, D) without those).
        has_text, has_image: (2N,) bool. item_rows, contents: (2N,) int64.
        bought: places of queries (n,) and catalogue rows (n,) of the users' purchases, to be masked; None to mask none.
    """

    queries: Tensor
    items: Tensor
    has_text: Tensor
    has_image: Tensor
    item_rows: Tensor
    contents: Tensor
    bought: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class CsftLoss:
    """
    Attributes:
        loss: scalar whose gradient, averaged over the workers, is that of the joined batch.
        level_losses: (3,) detached means over all workers' queries: mm, text, image (0 where a level is off).
        num_negatives: mean number of negatives per query at the MM level.
        fresh: all workers' items of this batch, for `PastBatches.push`.
    """

    loss: Tensor
    level_losses: Tensor
    num_negatives: float
    fresh: Candidates


class CsftObjective(nn.Module):
    """Eq. 6 with one temperature per level.

    Args:
        temperature: start value, divides the cosine. learn: whether it is trained.
        text_loss_weight, image_loss_weight: α and β.
    """

    def __init__(self, *, temperature: float, learn: bool, text_loss_weight: float, image_loss_weight: float) -> None:
        super().__init__()
        self.weights = {"mm": 1.0, "text": text_loss_weight, "image": image_loss_weight}
        start = min(math.log(1.0 / temperature), math.log(MAX_LOGIT_SCALE))
        self.log_scales = nn.ParameterDict({level: nn.Parameter(torch.tensor(start), learn) for level in LEVELS})

    def forward(self, batch: LocalBatch, past: PastBatches | None = None) -> CsftLoss:
        """Contrast this worker's queries with the items of all workers and of the past. A collective."""
        num_queries, device = len(batch.queries), batch.queries.device
        rank, num_workers = place()
        fresh = Candidates(
            gather_with_grad(normalize(batch.items.float(), dim=-1)),  # (P·2N, 3, D)
            gather(batch.has_text),
            gather(batch.has_image),
            gather(batch.item_rows),
            gather(batch.contents),
        )
        held = past.current() if past is not None else None
        positive = torch.arange(num_queries, device=device) + rank * len(batch.items)
        candidate_items, candidate_contents = fresh.items, fresh.contents
        if held is not None:
            candidate_items = torch.cat([candidate_items, held.items])
            candidate_contents = torch.cat([candidate_contents, held.contents])
        mask = masked_pairs(
            batch.item_rows[:num_queries],
            batch.contents[:num_queries],
            positive,
            candidate_items,
            candidate_contents,
            batch.bought,
        )
        taking_part = {
            "mm": torch.ones(num_queries, dtype=torch.bool, device=device),
            "text": batch.has_text[:num_queries],
            "image": batch.has_image[:num_queries],
        }
        counts = total(torch.stack([taking_part[level].sum() for level in LEVELS]).double())  # of all workers
        loss = batch.queries.new_zeros((), dtype=torch.float32)
        sums = []
        for index, level in enumerate(LEVELS):
            if self.weights[level] == 0.0:
                sums.append(loss.new_zeros(()))
                continue
            rows = info_nce_rows(
                batch.queries,
                fresh.embeddings[:, index],
                positive,
                logit_scale=self.log_scales[level].exp(),
                past=held.embeddings[:, index] if held is not None else None,
                mask=mask,
                valid=_valid(level, fresh, held),
            )
            level_sum = torch.where(taking_part[level], rows, torch.zeros_like(rows)).sum()
            sums.append(level_sum.detach())
            loss = loss + self.weights[level] * num_workers / counts[index].clamp_min(1).float() * level_sum
        level_losses = total(torch.stack(sums).double()) / counts.clamp_min(1)
        num_negatives = len(candidate_items) - 1 - mask.shape[1] / num_queries
        return CsftLoss(loss, level_losses, num_negatives, fresh)

    def temperatures(self) -> dict[str, float]:
        return {level: math.exp(-float(self.log_scales[level].detach())) for level in LEVELS}

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep 1 / temperature at most 100. Call after each optimizer step."""
        for parameter in self.log_scales.values():
            parameter.clamp_(max=math.log(MAX_LOGIT_SCALE))


def _valid(level: str, fresh: Candidates, held: Candidates | None) -> Tensor | None:
    parts = [fresh.valid(level)] + ([held.valid(level)] if held is not None else [])
    if all(part is None for part in parts):
        return None
    sizes = [len(fresh.items)] + ([len(held.items)] if held is not None else [])
    return torch.cat(
        [
            torch.ones(size, dtype=torch.bool, device=fresh.items.device) if part is None else part
            for part, size in zip(parts, sizes, strict=True)
        ]
    )
