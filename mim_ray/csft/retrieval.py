"""The held-out measure: with the picture a user searched with, where among all items is the one that was bought?

Ranks are taken for q→MM, q→txt and q→img over the whole catalogue, which passes by in chunks: nothing is held but the
queries. Ties count half, so an encoder that maps everything to one point gets the middle rank, not the first. Of built pairs
the item that the query picture belongs to is left out of the ranking; items without a modality are left out at its level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mim_ray.contrastive.gather import gather, place, total
from mim_ray.csft.chunks import Pairs
from mim_ray.csft.embedding import embed_items
from mim_ray.csft.items import ItemLoader, Items
from mim_ray.csft.negatives import PastBatches
from mim_ray.csft.objective import LEVELS
from mim_ray.encoders import ItemEncoder
from mim_ray.evaluation.metrics import mrr, recall_at_k

RECALL_AT = (1, 10, 100)
_BATCH = 256
_DRIFT_ITEMS = 64
_TIE = 1e-6  # cosines this near are equal: the same item encoded in another batch differs in the last digits


@dataclass(frozen=True)
class HeldOut:
    """Q held-out pairs, the same on all workers, and the items that were bought."""

    pairs: Pairs
    positives: Items


@torch.no_grad()
def measure(
    encoder: ItemEncoder, held_out: HeldOut, gallery: Iterable[Items]
) -> tuple[dict[str, dict[str, float | None]], int]:
    """Recall@{1, 10, 100} and MRR by level, and the number of items ranked. A collective; the result is the same on all.

    Args:
        gallery: this worker's part of the items, in chunks; together with the other workers' each item once.
    """
    was_training = encoder.training
    encoder.eval()
    device = encoder.image_projection.weight.device
    pairs = held_out.pairs
    queries = _shared(
        len(pairs), lambda rows: encoder.encode_image(torch.tensor(pairs.pixels[rows], device=device)), encoder.width
    )
    queries = normalize(queries, dim=-1)  # (Q, D)
    positives = _shared(
        len(pairs), lambda rows: embed_items(encoder, held_out.positives[rows]), len(LEVELS) * encoder.width
    )
    positives = normalize(positives.view(len(pairs), len(LEVELS), -1), dim=-1)
    best = torch.einsum("qd,qld->ql", queries, positives)  # (Q, 3)
    left_out = torch.tensor(np.stack([pairs.items, pairs.query_items]), device=device)  # (2, Q) catalogue rows
    ahead, tied = (torch.zeros(len(LEVELS), len(pairs), dtype=torch.float64, device=device) for _ in range(2))
    num_items = torch.zeros((), dtype=torch.int64, device=device)
    for items in gallery:
        embedded = normalize(embed_items(encoder, items), dim=-1)  # (n, 3, D)
        rows = torch.tensor(items.rows, device=device)
        counted = (rows != left_out.unsqueeze(2)).all(0)  # (Q, n)
        for index in range(len(LEVELS)):
            found = ahead_and_tied(queries, embedded[:, index], best[:, index], counted)
            ahead[index] += found[0]
            tied[index] += found[1]
        num_items += len(items.rows)
    ranks = (1 + total(ahead) + total(tied) / 2).cpu().numpy()
    encoder.train(was_training)
    result: dict[str, dict[str, float | None]] = {}
    for index, level in enumerate(LEVELS):
        taking_part = (positives[:, index].abs().sum(1) > 0).cpu().numpy()
        own = ranks[index][taking_part]
        result[level] = {f"recall@{k}": recall_at_k(own, k) for k in RECALL_AT} | {"mrr": mrr(own)}
    return result, int(total(num_items))


def ahead_and_tied(queries: Tensor, items: Tensor, best: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """(Q,) how many of the items are nearer to each query than its positive, and how many as near.

    Args:
        queries: (Q, D). items: (n, D); rows of zeros lack the modality and do not count.
        best: (Q,) inner product of each query with its positive. counted: (Q, n) bool, False for items to leave out.
    """
    gap = queries @ items.T - best.unsqueeze(1)  # (Q, n)
    counted = counted & (items != 0).any(1)
    return ((gap > _TIE) & counted).sum(1), ((gap.abs() <= _TIE) & counted).sum(1)


def _shared(num_rows: int, embed: Callable[[np.ndarray], Tensor], width: int) -> Tensor:
    """(num_rows, width) made by all workers together, each a contiguous part, in batches."""
    rank, num_workers = place()
    part = -(-num_rows // num_workers)
    rows = np.arange(rank * part, (rank + 1) * part) % max(1, num_rows)  # the last part wraps: equal sizes
    pieces = [embed(rows[start : start + _BATCH]).float().reshape(-1, width) for start in range(0, part, _BATCH)]
    return gather(torch.cat(pieces))[:num_rows]


@torch.no_grad()
def drift_by_age(encoder: ItemEncoder, loader: ItemLoader, past: PastBatches) -> dict[str, float]:
    """Mean cosine of past MM embeddings to the encoder's present ones, by age in batches. Only items seen whole both times."""
    was_training = [module.training for module in encoder.modules()]
    encoder.eval()
    by_age = {}
    for age in ages(len(past)):
        batch = past.batch_of_age(age)
        assert batch is not None
        then = batch[:_DRIFT_ITEMS]
        items = loader.items(then.items.cpu().numpy())
        same = (then.has_image.cpu().numpy() == items.has_image) & (then.has_text.cpu().numpy() == items.has_text)
        by_age[str(age)] = round(mean_drift(then.embeddings[same, 0], embed_items(encoder, items)[same, 0]), 5)
    for module, training in zip(encoder.modules(), was_training, strict=True):
        module.training = training
    return by_age


def mean_drift(then: Tensor, now: Tensor) -> float:
    """Mean cosine of past embeddings (n, D) to fresh ones of the same items."""
    return float((normalize(then.float(), dim=-1) * normalize(now.float(), dim=-1)).sum(1).mean())


def ages(num_past: int) -> Sequence[int]:
    """Ages in batches at which drift is measured: 1, the middle, the oldest."""
    return sorted({1, (num_past + 1) // 2, num_past}) if num_past else []
