"""ST-NSG's hard negatives (paper Section 3.3): one other item of the positive's category for each pair. Arrays only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mim_ray.data.catalogue import Catalogue
from mim_ray.data.ids import hash_ids

_DRAWS = 8
_MOST_TRIED = 4_096
_PAIRS_OF_UNSEEN = 0.1  # added to all, so that an item without a pair is drawn at times


def hard_negative_weights(pair_counts: np.ndarray, power: float) -> np.ndarray:
    """(num_items,) float64, in proportion to which items of a category are drawn: (training pairs + 0.1) ** power.

    Positives come by how often items are bought. Drawn evenly (0), a rare item is a negative far more often than a positive,
    and the encoder learns to push away what looks like rare items. Drawn by pairs (1), an item is about as often the one as
    the other. Word2vec draws its negatives by counts ** 0.75.
    """
    weights: np.ndarray = (pair_counts + _PAIRS_OF_UNSEEN) ** power
    return weights


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
    """Draws another item of the same category for each positive: arrays only, 20 bytes an item.

    Args:
        categories: (num_items,) int code of each item's category, negative without one.
        contents: (num_items,) int64 hash of each item's content; an item of equal content is no negative.
        eligible: (num_items,) bool, items that may be drawn.
        weights: (num_items,) positive, in proportion to which a category's items are drawn. None: evenly.
    """

    def __init__(
        self, categories: np.ndarray, contents: np.ndarray, eligible: np.ndarray, weights: np.ndarray | None = None
    ) -> None:
        self._categories, self._contents = categories, contents
        self._all = np.flatnonzero(eligible)
        with_category = self._all[categories[self._all] >= 0]
        self._members = with_category[np.argsort(categories[with_category], kind="stable")]
        num_categories = int(categories.max(initial=-1)) + 1
        self._starts = np.searchsorted(categories[self._members], np.arange(num_categories + 1))
        member_weights = np.ones(len(self._members)) if weights is None else weights[self._members]
        # member m owns the numbers from bounds[m] to bounds[m + 1]
        self._bounds = np.concatenate([[0.0], np.cumsum(member_weights)])

    @classmethod
    def of_catalogue(cls, catalogue: Catalogue, eligible: np.ndarray, weights: np.ndarray) -> HardNegativeSampler:
        """Args: eligible: catalogue rows that may be drawn. weights: of all catalogue rows."""
        contents = hash_ids(catalogue.take(np.arange(catalogue.num_items), ["content_hash"]).column(0))
        allowed = np.zeros(catalogue.num_items, bool)
        allowed[eligible] = True
        return cls(catalogue.category_codes[0], contents.view(np.int64), allowed, weights)

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
            rows[open_places] = self._members[self._drawn(low[open_places], size[open_places], random)]
            fine = self._fine(rows[open_places], positives[open_places], open_places, forbidden)
            other[open_places[fine]] = False
            open_places = open_places[~fine]
        for place in open_places:  # few: most of the category is forbidden, so look through it
            first, last = low[place], low[place] + min(size[place], _MOST_TRIED)
            members, weights = self._members[first:last], np.diff(self._bounds[first : last + 1])
            weights *= self._fine(members, np.repeat(positives[place], len(members)), place, forbidden)
            if weights.any():
                rows[place] = random.choice(members, p=weights / weights.sum())
                other[place] = False
        open_places = np.flatnonzero(other)
        for _ in range(_DRAWS):
            if not len(open_places) or not len(self._all):
                break
            rows[open_places] = self._all[random.integers(len(self._all), size=len(open_places))]
            fine = self._fine(rows[open_places], positives[open_places], open_places, forbidden)
            open_places = open_places[~fine]
        return HardNegatives(rows, int(other.sum()))

    def _drawn(self, low: np.ndarray, size: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """One place in `_members` of each range, by weight."""
        start, end = self._bounds[low], self._bounds[low + size]
        at = start + random.random(len(low)) * (end - start)
        # at may round up to the end of the range
        found: np.ndarray = np.minimum(np.searchsorted(self._bounds, at, side="right") - 1, low + size - 1)
        return found

    def _fine(
        self, drawn: np.ndarray, positives: np.ndarray, places: np.ndarray | np.int64, forbidden: np.ndarray
    ) -> np.ndarray:
        codes = places * len(self._categories) + drawn
        at = np.minimum(np.searchsorted(forbidden, codes), max(0, len(forbidden) - 1))
        is_bought = forbidden[at] == codes if len(forbidden) else np.zeros(len(drawn), bool)
        same: np.ndarray = (drawn == positives) | (self._contents[drawn] == self._contents[positives])
        return ~(same | is_bought)
