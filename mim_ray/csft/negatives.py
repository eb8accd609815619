"""Space-time negatives, ST-NSG (paper Section 3.3): which items a query is contrasted with.

- *hard*: one other item of the positive's category per pair (`HardNegatives`);
- *space*: positives and hard negatives of all P workers (gathered in objective.py);
- *time*: those of the last k batches (`PastBatches`), detached.

So each query meets 2NP(k + 1) − 1 negatives. Our addition: `masked_pairs` names those that are none, because they are the
query's own positive again, or something else that this user bought.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mim_ray.contrastive.info_nce import same_key_pairs

_DRAWS = 8
_MOST_TRIED = 4_096


@dataclass(frozen=True)
class HardNegatives:
    """Drawn items of a batch.

    Attributes:
        rows: (N,) int64 catalogue rows.
        num_other_category: how many had to come from any category, because the positive's has no other item to offer.
    """

    rows: np.ndarray
    num_other_category: int


class HardNegativeSampler:
    """Draws another item of the same category for each positive: arrays only, 12 bytes an item.

    Args:
        categories: (num_items,) int code of each item's category, negative without one.
        contents: (num_items,) int64 hash of each item's content; an item of equal content is no negative.
        eligible: (num_items,) bool, items that may be drawn.
    """

    def __init__(self, categories: np.ndarray, contents: np.ndarray, eligible: np.ndarray) -> None:
        self._categories, self._contents = categories, contents
        self._all = np.flatnonzero(eligible)
        with_category = self._all[categories[self._all] >= 0]
        self._members = with_category[np.argsort(categories[with_category], kind="stable")]
        num_categories = int(categories.max(initial=-1)) + 1
        self._starts = np.searchsorted(categories[self._members], np.arange(num_categories + 1))

    def draw(
        self, positives: np.ndarray, bought: tuple[np.ndarray, np.ndarray], random: np.random.Generator
    ) -> HardNegatives:
        """One item per positive, never the positive, its double, or something the user bought.

        Args:
            positives: (N,) catalogue rows.
            bought: places in the batch and catalogue rows of the users' purchases.

        A positive whose category has nothing to offer (often: a category of one item) gets an item of any category;
        should even that fail, the last draw stays, and the mask of the user's items hides it.
        """
        num_items = len(self._categories)
        forbidden = np.sort(bought[0] * num_items + bought[1])
        category = self._categories[positives]
        has_category = category >= 0
        low = np.where(has_category, self._starts[category], 0)
        size = np.where(has_category, self._starts[category + 1] - low, 0)
        rows = positives.copy()
        open_places = np.flatnonzero(size > 1)
        other = np.ones(len(positives), bool)  # not found in the category
        for _ in range(_DRAWS):
            if not len(open_places):
                break
            index = low[open_places] + (random.random(len(open_places)) * size[open_places]).astype(np.int64)
            rows[open_places] = self._members[index]
            fine = self._fine(rows[open_places], positives[open_places], open_places, forbidden)
            other[open_places[fine]] = False
            open_places = open_places[~fine]
        for place in open_places:  # few: most of the category is forbidden, so look through it
            members = self._members[low[place] : low[place] + size[place]][:_MOST_TRIED]
            fine_members = members[self._fine(members, np.repeat(positives[place], len(members)), place, forbidden)]
            if len(fine_members):
                rows[place] = random.choice(fine_members)
                other[place] = False
        open_places = np.flatnonzero(other)
        for _ in range(_DRAWS):
            if not len(open_places) or not len(self._all):
                break
            rows[open_places] = self._all[random.integers(len(self._all), size=len(open_places))]
            fine = self._fine(rows[open_places], positives[open_places], open_places, forbidden)
            open_places = open_places[~fine]
        return HardNegatives(rows, int(other.sum()))

    def _fine(
        self, drawn: np.ndarray, positives: np.ndarray, places: np.ndarray | np.int64, forbidden: np.ndarray
    ) -> np.ndarray:
        codes = places * len(self._categories) + drawn
        at = np.minimum(np.searchsorted(forbidden, codes), max(0, len(forbidden) - 1))
        is_bought = forbidden[at] == codes if len(forbidden) else np.zeros(len(drawn), bool)
        same: np.ndarray = (drawn == positives) | (self._contents[drawn] == self._contents[positives])
        return ~(same | is_bought)


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
