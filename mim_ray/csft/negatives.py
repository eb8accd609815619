"""Space-time negatives, ST-NSG (paper Section 3.3): which items a query is contrasted with.

- *hard*: one other item of the positive's category per pair (hard_negatives.py);
- *space*: positives and hard negatives of all P workers (gathered in objective.py);
- *time*: those of the last k batches (`PastBatches`), detached.

So each query meets 2NP(k + 1) − 1 negatives. Our addition: `masked_pairs` names those that are none, because they are the
query's own positive again, or something else that this user bought.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mim_ray.contrastive.info_nce import same_key_pairs


@dataclass(frozen=True)
class Candidates:
    """Items that queries are contrasted with, in the same order on every worker.

    Attributes:
        embeddings: (M, 3, D): h^MM, h^txt and h^img.
        has_text, has_image: (M,) bool; rows without a modality take no part at its level.
        items: (M,) int64 catalogue rows. contents: (M,) int64 content hashes.
    """

    embeddings: Tensor
    has_text: Tensor
    has_image: Tensor
    items: Tensor
    contents: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Candidates:
        return Candidates(*(part[rows] for part in _parts(self)))

    @staticmethod
    def joined(first: Candidates, second: Candidates) -> Candidates:
        return Candidates(*(torch.cat(pair) for pair in zip(_parts(first), _parts(second), strict=True)))

    def valid(self, level: str) -> Tensor | None:
        """(M,) bool, which rows take part at a level; None for all."""
        flags = {"mm": None, "text": self.has_text, "image": self.has_image}[level]
        return None if flags is None or bool(flags.all()) else flags


class PastBatches:
    """The items of the last k batches: a ring of whole batches, equal on all workers, starting empty.

    Args:
        num_batches: k. dtype: how embeddings are kept; two bytes a number by default.
    """

    def __init__(self, num_batches: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.num_batches = num_batches
        self._dtype = dtype
        self._rows = 0  # of one batch
        self._num_pushed = 0
        self._ring: Candidates | None = None

    def __len__(self) -> int:
        """Batches held."""
        return min(self._num_pushed, self.num_batches)

    def current(self) -> Candidates | None:
        """What is held, or None while empty; oldest and newest in any order."""
        if self._ring is None or not len(self):
            return None
        return self._ring[: len(self) * self._rows]

    def push(self, batch: Candidates) -> None:
        """Take in a batch; the oldest goes when there are more than k. All batches have the same number of rows."""
        if not self.num_batches:
            return
        if self._ring is None:
            self._rows = len(batch.items)
            self._ring = Candidates(*(self._empty(part) for part in _parts(batch)))
        start = self._num_pushed % self.num_batches * self._rows
        for ring, part in zip(_parts(self._ring), _parts(batch), strict=True):
            part = part.detach()
            if part.is_floating_point():
                part = torch.nn.functional.normalize(part.float(), dim=-1)
            ring[start : start + self._rows] = part.to(ring.dtype)
        self._num_pushed += 1

    def batch_of_age(self, age: int) -> Candidates | None:
        """The batch pushed `age` pushes ago (1: the last one), None when it is not held."""
        if self._ring is None or not 1 <= age <= len(self):
            return None
        start = (self._num_pushed - age) % self.num_batches * self._rows
        return self._ring[start : start + self._rows]

    def state(self) -> dict[str, Tensor]:
        """Flat tensors for a checkpoint."""
        if self._ring is None:
            return {}
        names = ("embeddings", "has_text", "has_image", "items", "contents")
        return {"num_pushed": torch.tensor(self._num_pushed), **dict(zip(names, _parts(self._ring), strict=True))}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if not state:
            return
        self._num_pushed = int(state["num_pushed"])
        names = ("embeddings", "has_text", "has_image", "items", "contents")
        self._ring = Candidates(*(state[name] for name in names))
        self._rows = len(state["items"]) // self.num_batches

    def _empty(self, part: Tensor) -> Tensor:
        dtype = self._dtype if part.is_floating_point() else part.dtype
        return torch.zeros((self.num_batches * len(part), *part.shape[1:]), dtype=dtype, device=part.device)


def masked_pairs(
    positive_items: Tensor,
    positive_contents: Tensor,
    positive_index: Tensor,
    candidate_items: Tensor,
    candidate_contents: Tensor,
    bought: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """What is no negative, as (2, n) pairs (query, candidate), each once, the query's own positive not among them.

    Args:
        positive_items, positive_contents, positive_index: (N,) of this worker's queries.
        candidate_items, candidate_contents: (K,), fresh ones first, then past ones.
        bought: (n,) places of queries and (n,) catalogue rows: the users' purchases; None to leave those in.
    """
    pairs = [same_key_pairs(positive_items, candidate_items), same_key_pairs(positive_contents, candidate_contents)]
    if bought is not None and len(bought[0]):
        found = same_key_pairs(bought[1], candidate_items)
        pairs.append(torch.stack([bought[0][found[0]], found[1]]))
    query, candidate = torch.cat(pairs, dim=1)
    num_candidates = len(candidate_items)
    codes = torch.unique(query * num_candidates + candidate)
    query, candidate = codes // num_candidates, codes % num_candidates
    keep = candidate != positive_index[query]
    return torch.stack([query[keep], candidate[keep]])


def _parts(c: Candidates) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return c.embeddings, c.has_text, c.has_image, c.items, c.contents
