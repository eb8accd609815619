"""ST-NSG's hard negatives (paper Section 3.3): one other item of the positive's category for each pair. Arrays only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mim_ray.data.catalogue import Catalogue
from mim_ray.data.ids import hash_ids

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

    @classmethod
    def of_catalogue(cls, catalogue: Catalogue, eligible: np.ndarray) -> HardNegativeSampler:
        """Args: eligible: catalogue rows that may be drawn."""
        contents = hash_ids(catalogue.take(np.arange(catalogue.num_items), ["content_hash"]).column(0))
        allowed = np.zeros(catalogue.num_items, bool)
        allowed[eligible] = True
        return cls(catalogue.category_codes[0], contents.view(np.int64), allowed)

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
