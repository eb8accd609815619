"""The held-out measure: with the picture a user searched with, where among all items is the one that was bought?

Ranks are taken for q→MM, q→txt and q→img. Ties count half, so an encoder that maps everything to one point gets the middle
rank, not the first. Of built pairs the item that the query picture belongs to is taken out of the ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mim_ray.contrastive.gather import gather, place
from mim_ray.csft.dataset import ItemBatch, ItemLoader, Pairs
from mim_ray.csft.objective import LEVELS
from mim_ray.encoders import ItemEncoder
from mim_ray.evaluation.metrics import mrr, recall_at_k

RECALL_AT = (1, 10, 100)
_BATCH = 256


def embed_items(encoder: ItemEncoder, items: ItemBatch) -> Tensor:
    """(n, 3, D): h^MM, h^txt, h^img; zeros where a modality is missing."""
    device = encoder.image_projection.weight.device
    tokens = {key: value.to(device) for key, value in items.tokens.items()}
    embedded = encoder(items.pixels.to(device), items.has_image.to(device), tokens, items.has_text.to(device))
    return torch.stack([embedded.mm, embedded.text, embedded.image], dim=1)


def choose_gallery(eligible: np.ndarray, positives: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Catalogue rows to rank: all eligible ones and the positives, or a sample of `most` that holds the positives."""
    positives = np.unique(positives)
    others = np.setdiff1d(eligible, positives)
    if len(others) + len(positives) > most:
        others = np.random.default_rng(seed).choice(others, max(0, most - len(positives)), replace=False)
    return np.sort(np.concatenate([positives, others]))


@torch.no_grad()
def measure(
    encoder: ItemEncoder, loader: ItemLoader, pairs: Pairs, gallery: np.ndarray
) -> dict[str, dict[str, float | None]]:
    """Recall@{1, 10, 100} and MRR by level. A collective: workers share the encoding; the result is the same on all.

    Args:
        pairs: held-out pairs, the same on all workers. gallery: catalogue rows, sorted, with every positive in it.
    """
    was_training = encoder.training
    encoder.eval()
    device = encoder.image_projection.weight.device
    items = _shared(len(gallery), lambda rows: embed_items(encoder, loader.items(gallery[rows])), 3 * encoder.width)
    items = normalize(items.view(len(gallery), 3, -1), dim=-1)
    queries = _shared(
        len(pairs), lambda rows: encoder.encode_image(torch.from_numpy(pairs.pixels[rows]).to(device)), encoder.width
    )
    queries = normalize(queries, dim=-1)
    encoder.train(was_training)
    positive = torch.from_numpy(np.searchsorted(gallery, pairs.items)).to(device)
    own = np.searchsorted(gallery, pairs.query_items)
    is_own = (pairs.query_items >= 0) & (gallery[np.minimum(own, len(gallery) - 1)] == pairs.query_items)
    is_own &= pairs.query_items != pairs.items
    result: dict[str, dict[str, float | None]] = {}
    for index, level in enumerate(LEVELS):
        taking_part = items[positive, index].abs().sum(1).cpu().numpy() > 0
        ranks = ranks_of_positives(queries, items[:, index], positive, own, is_own)[taking_part]
        result[level] = {f"recall@{k}": recall_at_k(ranks, k) for k in RECALL_AT} | {"mrr": mrr(ranks)}
    return result


def ranks_of_positives(
    queries: Tensor, items: Tensor, positive: Tensor, own: np.ndarray, is_own: np.ndarray
) -> np.ndarray:
    """(Q,) rank from 1 of each query's positive by inner product, ties counting half.

    Args:
        queries: (Q, D). items: (G, D). positive: (Q,) row of `items`.
        own: (Q,) row of `items` to leave out where `is_own` (Q,) bool.
    """
    ranks = []
    for start in range(0, len(queries), _BATCH):
        rows = slice(start, start + _BATCH)
        scores = queries[rows] @ items.T  # (q, G)
        places = torch.arange(len(scores), device=scores.device)
        best = scores[places, positive[rows]].unsqueeze(1)
        left_out = np.flatnonzero(is_own[rows])
        scores[left_out, own[rows][left_out]] = -torch.inf
        higher, equal = (scores > best).sum(1), (scores == best).sum(1)
        ranks.append((higher + (equal + 1) / 2).cpu().numpy())
    return np.concatenate(ranks) if ranks else np.zeros(0)


def _shared(num_rows: int, embed: Callable[[np.ndarray], Tensor], width: int) -> Tensor:
    """(num_rows, width) made by all workers together, each a contiguous part, in batches."""
    rank, num_workers = place()
    part = -(-num_rows // num_workers)
    rows = np.arange(rank * part, (rank + 1) * part) % max(1, num_rows)  # the last part wraps: equal sizes
    pieces = [embed(rows[start : start + _BATCH]).float().reshape(-1, width) for start in range(0, part, _BATCH)]
    return gather(torch.cat(pieces))[:num_rows]


def mean_drift(then: Tensor, now: Tensor) -> float:
    """Mean cosine of past embeddings (n, D) to fresh ones of the same items."""
    return float((normalize(then.float(), dim=-1) * normalize(now.float(), dim=-1)).sum(1).mean())


def ages(num_past: int) -> Sequence[int]:
    """Ages in batches at which drift is measured: 1, the middle, the oldest."""
    return sorted({1, (num_past + 1) // 2, num_past}) if num_past else []
