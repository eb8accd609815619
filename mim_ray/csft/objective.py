"""The loss of C-SFT at three levels (paper Eq. 6), each the contrastive loss of Eq. 5 over space-time negatives.

    L_csft = L_q2item + α L_q2txt + β L_q2img

An item without a title (image) takes no part at the text (image) level, neither as a positive nor as a negative. The mean
of a level is over the queries of *all* workers that take part, so that P workers equal one process on the joined batch.
The other rows of Table 4 (cross-entropy on categories, on clicks, on purchases) are in cross_entropy.py, with the same face.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mim_ray.contrastive.gather import gather, gather_with_grad, place, total
from mim_ray.contrastive.info_nce import MAX_LOGIT_SCALE, info_nce_rows
from mim_ray.csft.negatives import Candidates, PastBatches, masked_pairs

LEVELS = ("mm", "text", "image")
_COLLAPSED_WITHIN = 0.01  # of ln K


@dataclass(frozen=True)
class Shown:
    """Items that the users of some queries were shown and did not click, for the binary losses of Table 4.

    Attributes:
        queries: (n,) int64 places in the batch, any number of items for each, none for most.
        items: (n, 3, D) h^MM, h^txt, h^img. has_text, has_image: (n,) bool. item_rows, contents: (n,) int64.
    """

    queries: Tensor
    items: Tensor
    has_text: Tensor
    has_image: Tensor
    item_rows: Tensor
    contents: Tensor

    def as_candidates(self) -> Candidates:
        """The same items, with embeddings of length 1."""
        items = normalize(self.items.float(), dim=-1)
        return Candidates(items, self.has_text, self.has_image, self.item_rows, self.contents)


@dataclass(frozen=True)
class LocalBatch:
    """Embedded pairs of one worker.

    Attributes:
        queries: (N, D) h_q^img.
        items: (2N, 3, D) h^MM, h^txt, h^img of the N positives, then of the N hard negatives ((N, 3, D) without those).
        has_text, has_image: (2N,) bool. item_rows, contents: (2N,) int64.
        bought: places of queries (n,) and catalogue rows (n,) of the users' purchases, to be masked; None to mask none.
        categories: (2N,) int64 codes of the items' categories, negative without one; asked for by Table 4's v1 only.
        shown: what the users did not click; asked for by Table 4's v2 and v3 only; None where the log has none.
    """

    queries: Tensor
    items: Tensor
    has_text: Tensor
    has_image: Tensor
    item_rows: Tensor
    contents: Tensor
    bought: tuple[Tensor, Tensor] | None = None
    categories: Tensor | None = None
    shown: Shown | None = None


@dataclass(frozen=True)
class CsftLoss:
    """
    Attributes:
        loss: scalar whose gradient, averaged over the workers, is that of the joined batch. Its value is this worker's.
        level_losses: (3,) detached means over all workers' queries: mm, text, image (0 where a level is off). Equal on all
            workers, and not finite on all as soon as one worker's loss is not: check these, so that all stop at once.
        num_negatives: mean number of negatives per query at the MM level, over the queries of all workers.
        fresh: all workers' items of this batch, for `PastBatches.push`; None where the past takes no part.
    """

    loss: Tensor
    level_losses: Tensor
    num_negatives: float
    fresh: Candidates | None


class LevelObjective(nn.Module):
    """What the losses with three levels share: weights (α, β of Eq. 6) and one temperature per level."""

    def __init__(self, temperature: float, learn: bool, text_loss_weight: float, image_loss_weight: float) -> None:
        super().__init__()
        self.weights = {"mm": 1.0, "text": text_loss_weight, "image": image_loss_weight}
        start = min(math.log(1.0 / temperature), math.log(MAX_LOGIT_SCALE))
        self.log_scales = nn.ParameterDict({level: nn.Parameter(torch.tensor(start), learn) for level in LEVELS})

    def temperatures(self) -> dict[str, float]:
        """By level; one whose weight is 0 keeps its start value."""
        return {level: math.exp(-float(self.log_scales[level].detach())) for level in LEVELS}

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep 1 / temperature at most 100. Call after each optimizer step."""
        for parameter in self.log_scales.values():
            parameter.clamp_(max=math.log(MAX_LOGIT_SCALE))


class CsftObjective(LevelObjective):
    """Eq. 6 with one temperature per level.

    Args:
        temperature: start value, divides the cosine. learn: whether it is trained.
        text_loss_weight, image_loss_weight: α and β. A level of weight 0 is off.
        space_time: False contrasts a query with its own worker's N positives only (Table 5, without ST-NSG).
        log_q: (num_items,) log of how often each catalogue row is drawn (sampling.py), for the correction of sampling
            frequencies; None for none. Not part of the state.
    """

    def __init__(
        self,
        *,
        temperature: float,
        learn: bool,
        text_loss_weight: float,
        image_loss_weight: float,
        space_time: bool = True,
        log_q: Tensor | None = None,
    ) -> None:
        super().__init__(temperature, learn, text_loss_weight, image_loss_weight)
        self._space_time = space_time
        self._log_q = log_q

    def forward(self, batch: LocalBatch, past: PastBatches | None = None) -> CsftLoss:
        """Contrast this worker's queries with the items of all workers and of the past. A collective."""
        num_queries, device = len(batch.queries), batch.queries.device
        if self._space_time:
            fresh, first = gathered_items(batch), place()[0] * len(batch.items)
            held = past.current() if past is not None else None
        else:
            fresh, first, held = own_positives(batch), 0, None
        positive = torch.arange(num_queries, device=device) + first
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
        bias = None
        if self._log_q is not None:
            bias = -self._log_q[candidate_items.to(self._log_q.device)].to(device)
        rows = {
            level: info_nce_rows(
                batch.queries,
                fresh.embeddings[:, index],
                positive,
                logit_scale=self.log_scales[level].exp(),
                past=held.embeddings[:, index] if held is not None else None,
                mask=mask,
                valid=_valid(level, fresh, held),
                bias=bias,
            )
            for index, level in enumerate(LEVELS)
            if self.weights[level] != 0.0
        }
        taking_part = modality_flags(batch.has_text[:num_queries], batch.has_image[:num_queries])
        loss, level_losses = mean_over_workers(rows, taking_part, self.weights)
        masked, queries = total(torch.tensor([mask.shape[1], num_queries], device=device)).tolist()
        num_negatives = len(candidate_items) - 1 - masked / queries
        return CsftLoss(loss, level_losses, num_negatives, fresh if self._space_time else None)


def collapsed(level_losses: Tensor, num_candidates: float) -> tuple[str, ...]:
    """Levels at which the model guesses: their loss is within 1 % of ln K, what equal cosines to all K candidates give.

    An encoder that maps all items to one point but flees from its own past batches has a lower loss: see `spread`.

    Args:
        level_losses: (3,) as in CsftLoss; 0 where a level is off. num_candidates: K, the negatives and the positive.
    """
    guess = math.log(max(1.0, num_candidates))
    return tuple(
        level
        for level, loss in zip(LEVELS, level_losses.tolist(), strict=True)
        if loss > 0.0 and abs(loss - guess) <= _COLLAPSED_WITHIN * guess
    )


def spread(items: Candidates) -> float:
    """1 − the mean cosine of h^MM between two items of a batch, such as `CsftLoss.fresh`; 0 when all items look alike."""
    embeddings = normalize(items.embeddings[:, 0].detach().float(), dim=-1)
    n = len(embeddings)
    together = float(embeddings.sum(0).square().sum())  # n, and the cosines of all n(n − 1) ordered pairs
    return 1.0 - (together - n) / max(1, n * (n - 1))


def gathered_items(batch: LocalBatch) -> Candidates:
    """The items of all workers in rank order, with gradients. A collective."""
    return Candidates(
        gather_with_grad(normalize(batch.items.float(), dim=-1)),  # (P·2N, 3, D)
        gather(batch.has_text),
        gather(batch.has_image),
        gather(batch.item_rows),
        gather(batch.contents),
    )


def own_positives(batch: LocalBatch) -> Candidates:
    """This worker's N positives."""
    n = len(batch.queries)
    embeddings = normalize(batch.items[:n].float(), dim=-1)
    return Candidates(embeddings, batch.has_text[:n], batch.has_image[:n], batch.item_rows[:n], batch.contents[:n])


def modality_flags(has_text: Tensor, has_image: Tensor) -> dict[str, Tensor]:
    """(n,) bool by level: which items take part at it."""
    return {"mm": torch.ones_like(has_text), "text": has_text, "image": has_image}


def mean_over_workers(
    rows: Mapping[str, Tensor], taking_part: Mapping[str, Tensor], weights: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """Weighted sum over the levels of the mean over all workers' rows that take part. A collective.

    Args:
        rows: (n,) losses of this worker by level; a level that is off has none. taking_part: (n,) bool by level.

    Returns:
        The loss and level_losses of CsftLoss.
    """
    _, num_workers = place()
    sums, counts = [], []
    for level in LEVELS:
        taken = taking_part[level]
        values = rows.get(level)
        sums.append(taken.new_zeros((), dtype=torch.float32) if values is None else _sum(values, taken))
        counts.append(taken.sum())
    detached = torch.stack([*(s.detach().double() for s in sums), *(count.double() for count in counts)])
    all_sums, all_counts = total(detached).chunk(2)
    all_counts = all_counts.clamp_min(1)
    loss = sums[0].new_zeros(())
    for level, level_sum, count in zip(LEVELS, sums, all_counts, strict=True):
        loss = loss + weights[level] * num_workers / count.float() * level_sum
    return loss, all_sums / all_counts


def _sum(rows: Tensor, taking_part: Tensor) -> Tensor:
    return torch.where(taking_part, rows, torch.zeros_like(rows)).sum()


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
