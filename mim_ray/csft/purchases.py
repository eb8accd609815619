"""Which items each user bought: what may never be a hard negative, and what is masked among the other negatives."""

from __future__ import annotations

import io

import numpy as np

from mim_ray import artifacts
from mim_ray.data.batches import ordered_batches
from mim_ray.data.catalogue import Catalogue
from mim_ray.data.ids import hash_ids

_SCAN_ROWS = 65_536


class Purchases:
    """(user, item) pairs sorted by user; 16 bytes each, mapped from the disk.

    Users are 64-bit hashes of their ids: two users that share one would only mask each other's items.
    """

    def __init__(self, users: np.ndarray, items: np.ndarray) -> None:
        self._users, self._items = users, items

    @classmethod
    def of_pairs(cls, pairs: str, catalogue: Catalogue) -> Purchases:
        """From the interest pairs at a URI: the items bought and, of built pairs, the items that stand for the query."""
        users, items = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for table in ordered_batches(pairs, ["user_id", "item_id", "query_item_id"], _SCAN_ROWS):
            user = hash_ids(table.column("user_id"))
            for column in ("item_id", "query_item_id"):
                rows = catalogue.rows(table.column(column))
                users.append(user[rows >= 0])
                items.append(rows[rows >= 0])
        user, item = np.concatenate(users), np.concatenate(items)
        order = np.lexsort((item, user))
        user, item = user[order], item[order]
        first = np.r_[True, (user[1:] != user[:-1]) | (item[1:] != item[:-1])][: len(user)]
        return cls(user[first], item[first])

    @classmethod
    def open(cls, uri: str) -> Purchases:
        folder = artifacts.local_copy(uri)
        return cls(np.load(folder / "users.npy", mmap_mode="r"), np.load(folder / "items.npy", mmap_mode="r"))

    def save(self, uri: str) -> None:
        for name, array in (("users", self._users), ("items", self._items)):
            sink = io.BytesIO()
            np.save(sink, array, allow_pickle=False)
            artifacts.write_bytes(f"{uri}/{name}.npy", sink.getvalue())

    def of(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All purchases of a batch's users.

        Args:
            users: (N,) uint64 hashes.

        Returns:
            (n,) int64 place in the batch, ascending, and (n,) int64 catalogue row.
        """
        low = np.searchsorted(self._users, users)
        counts = np.searchsorted(self._users, users, side="right") - low
        place = np.repeat(np.arange(len(users)), counts)
        inside = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
        return place, np.asarray(self._items[np.repeat(low, counts) + inside], np.int64)
