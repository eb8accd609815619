"""Held-out measures that all workers take together: each its part, the result the same on all and for any P."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mim_ray.contrastive.gather import gather, place, total

RECALL_AT = (1, 10)
_BATCH = 256


class SharedMean:
    """A weighted mean of batch means over all workers."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, mean: Tensor, weight: int) -> None:
        self._sums += torch.stack([mean.detach().double() * weight, torch.full_like(self._sums[0], weight)])

    def value(self) -> float | None:
        """A collective. None when nothing was added anywhere."""
        value, weight = total(self._sums).tolist()
        return round(value / weight, 5) if weight else None


def own_batches(rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Every P-th batch of held-out rows, with its number, from which its random choices derive."""
    rank, num_workers = place()
    for number in range(rank, math.ceil(len(rows) / _BATCH), num_workers):
        yield number, rows[number * _BATCH : (number + 1) * _BATCH]


def shared_rows(num_rows: int, embed: Callable[[np.ndarray], Tensor]) -> Tensor:
    """(num_rows, …) made by all workers together, each a contiguous part, in batches.

    Args:
        num_rows: at least 1. embed: makes the rows of given numbers; their shape is the same everywhere.
    """
    rank, num_workers = place()
    part = -(-num_rows // num_workers)
    rows = np.arange(rank * part, (rank + 1) * part) % num_rows  # the last part wraps: equal sizes
    pieces = [embed(rows[start : start + _BATCH]) for start in range(0, part, _BATCH)]
    return gather(torch.cat(pieces))[:num_rows]


def recall(queries: Tensor, candidates: Tensor, equal: Tensor, k: int) -> float:
    """Share of queries whose own candidate is among the k nearest by cosine; a tie counts as half a place.

    Args:
        queries, candidates: (n, D), row i of both is item i. Higher is better; chance gives about k / n.
        equal: (n, n) bool, pairs of equal content: never in each other's way.
    """
    similarity = normalize(queries, dim=1) @ normalize(candidates, dim=1).T  # (n, n)
    own = similarity.diagonal().unsqueeze(1).clone()
    similarity = similarity.masked_fill(equal, -torch.inf)
    ahead = (similarity > own).sum(dim=1) + 0.5 * ((similarity == own) & ~equal).sum(dim=1)
    return float((ahead < k).float().mean())


def alignment_recalls(image_emb: Tensor, text_emb: Tensor, keys: Tensor) -> dict[str, float | int]:
    """Recall@{1, 10} from images to titles and back, and what chance gives.

    Args:
        image_emb, text_emb: (n, D), n at least 1. keys: (n, 2) int64, equal where title or picture are.
    """
    equal = (keys[:, None] == keys[None]).any(dim=2)  # (n, n), the diagonal included
    num_items = len(keys)
    result: dict[str, float | int] = {"num_items": num_items}
    for k in RECALL_AT:
        result[f"image_to_text_recall@{k}"] = round(recall(image_emb, text_emb, equal, k), 5)
        result[f"text_to_image_recall@{k}"] = round(recall(text_emb, image_emb, equal, k), 5)
        result[f"chance@{k}"] = round(min(1.0, k / num_items), 5)
    return result
