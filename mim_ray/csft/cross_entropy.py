"""What Table 4 compares the contrastive loss with: cross-entropy on categories (v1), on clicks (v2) and purchases (v3).

Both objectives have the face of `CsftObjective`, take no past batches, and average over the queries (v1: items) of *all*
workers, so that P workers equal one process on the joined batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize

from mim_ray.contrastive.gather import place, total
from mim_ray.csft.negatives import Candidates, PastBatches
from mim_ray.csft.objective import (
    LEVELS,
    CsftLoss,
    LevelObjective,
    LocalBatch,
    gathered_items,
    mean_over_workers,
    modality_flags,
)


class CategoryObjective(nn.Module):
    """v1: a linear classifier tells an item's category from h^MM.

    All items of the batch take part, positives and hard negatives, except those without a category. The query takes none:
    a category says nothing about who searched for what, which is why the paper calls this signal irrelevant to interest.
    F_V learns through the items' pictures alone. The classifier is thrown away afterwards.

    Args:
        width: D of h^MM. num_categories: classes. seed: of the classifier's start, the same on all workers.
    """

    def __init__(self, *, width: int, num_categories: int, seed: int = 0) -> None:
        super().__init__()
        self.weights = {"mm": 1.0, "text": 0.0, "image": 0.0}
        random = torch.Generator().manual_seed(seed)
        start = torch.randn(num_categories, width, generator=random) / math.sqrt(width)
        self.weight, self.bias = nn.Parameter(start), nn.Parameter(torch.zeros(num_categories))

    def forward(self, batch: LocalBatch, past: PastBatches | None = None) -> CsftLoss:
        """`past` takes no part; `batch.categories` must be given. num_negatives counts the other categories."""
        assert batch.categories is not None
        logits = batch.items[:, 0].float() @ self.weight.T + self.bias  # (2N, C)
        has_category = batch.categories >= 0
        rows = cross_entropy(logits, batch.categories.clamp_min(0), reduction="none")
        loss, level_losses = mean_over_workers({"mm": rows}, dict.fromkeys(LEVELS, has_category), self.weights)
        return CsftLoss(loss, level_losses, float(len(self.bias) - 1), None)

    def temperatures(self) -> dict[str, float]:
        """None: there is no cosine here."""
        return {}

    def clamp(self) -> None:
        """Nothing to clamp."""


class BinaryObjective(LevelObjective):
    """v2, v3: is this the item that the query's user clicked (bought)? Binary cross-entropy at the three levels of Eq. 6.

        logit = cos(q, i) / temperature + bias

    Label 1 is the pair's item. Label 0 are the items that the user was shown and did not click; for a query without such
    items its hard negative and one item of the batch: the positive of the pair half a (joined) batch away. An item of label
    0 that is the positive again, its double, or something the user bought is left out. A query's loss is the mean over its
    labelled items; a query whose item lacks the modality of a level takes no part there, nor does such an item of label 0.

    Args:
        temperature, learn, text_loss_weight, image_loss_weight: as in `CsftObjective`. The biases are always trained.
    """

    def __init__(self, *, temperature: float, learn: bool, text_loss_weight: float, image_loss_weight: float) -> None:
        super().__init__(temperature, learn, text_loss_weight, image_loss_weight)
        self.biases = nn.ParameterDict({level: nn.Parameter(torch.zeros(())) for level in LEVELS})

    def forward(self, batch: LocalBatch, past: PastBatches | None = None) -> CsftLoss:
        """`past` takes no part. A collective."""
        num_queries = len(batch.queries)
        labelled = _labelled_items(batch)
        queries = normalize(batch.queries.float(), dim=-1)[labelled.queries]  # (T, D)
        positives = modality_flags(batch.has_text[:num_queries], batch.has_image[:num_queries])
        rows = {}
        for index, level in enumerate(LEVELS):
            if self.weights[level] == 0.0:
                continue
            cosine = (queries * labelled.items[:, index]).sum(-1)
            logits = self.log_scales[level].exp() * cosine + self.biases[level]
            losses = binary_cross_entropy_with_logits(logits, labelled.labels, reduction="none")
            counts = labelled.flags[level]
            sums = losses.new_zeros(num_queries).index_add(0, labelled.queries, torch.where(counts, losses, 0.0))
            rows[level] = sums / _count(labelled.queries[counts], num_queries).clamp_min(1)
        loss, level_losses = mean_over_workers(rows, positives, self.weights)
        negatives, everyone = total(
            labelled.queries.new_tensor([len(labelled.queries) - num_queries, num_queries])
        ).tolist()
        return CsftLoss(loss, level_losses, negatives / everyone, None)


class _Labelled(NamedTuple):
    """T items with labels: queries (T,) places, items (T, 3, D) of length 1, flags (T,) by level, labels (T,) 0 or 1."""

    queries: Tensor
    items: Tensor
    flags: dict[str, Tensor]
    labels: Tensor


def _labelled_items(batch: LocalBatch) -> _Labelled:
    num_queries, device = len(batch.queries), batch.queries.device
    rank, num_workers = place()
    everyone = torch.arange(num_queries, device=device)
    gathered = gathered_items(batch)
    own = gathered[slice(rank * len(batch.items), (rank + 1) * len(batch.items))]
    far = (rank * num_queries + everyone + num_workers * num_queries // 2) % (num_workers * num_queries)
    places, negatives = everyone, gathered[far // num_queries * len(batch.items) + far % num_queries]
    if len(batch.items) > num_queries:
        places, negatives = torch.cat([everyone, everyone]), Candidates.joined(negatives, own[num_queries:])
    keep = _is_negative(batch, places, negatives)
    if batch.shown is not None and len(batch.shown.queries):
        shown = batch.shown.as_candidates()
        not_clicked = _is_negative(batch, batch.shown.queries, shown)
        keep &= _count(batch.shown.queries[not_clicked], num_queries)[places] == 0
        keep = torch.cat([keep, not_clicked])
        places, negatives = torch.cat([places, batch.shown.queries]), Candidates.joined(negatives, shown)
    chosen = Candidates.joined(own[:num_queries], negatives[keep])
    labels = torch.zeros(len(chosen.items), device=device)
    labels[:num_queries] = 1.0
    flags = modality_flags(chosen.has_text, chosen.has_image)
    return _Labelled(torch.cat([everyone, places[keep]]), chosen.embeddings, flags, labels)


def _is_negative(batch: LocalBatch, places: Tensor, items: Candidates) -> Tensor:
    """(n,) bool: not the positive of the query at `places`, its double, or something the user bought."""
    same = (items.items == batch.item_rows[places]) | (items.contents == batch.contents[places])
    if batch.bought is not None and len(batch.bought[0]):
        width = 1 + max(int(items.items.max()), int(batch.bought[1].max()))
        same |= torch.isin(places * width + items.items, batch.bought[0] * width + batch.bought[1])
    return ~same


def _count(places: Tensor, num_queries: int) -> Tensor:
    return torch.bincount(places, minlength=num_queries)
