"""Which items belong to each user: those bought (never a hard negative, masked elsewhere), those shown and not clicked."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray import artifacts
from mim_ray.data.batches import ordered_batches
from mim_ray.data.catalogue import Catalogue
from mim_ray.data.ids import hash_ids

_SCAN_ROWS = 65_536


class UserItems:
    """(user, item) pairs sorted by user, each once; 16 bytes each, mapped from the disk.

    Users are 64-bit hashes of their ids: two users that share one would only mask each other's items.
    """

    def __init__(self, users: np.ndarray, items: np.ndarray) -> None:
        self._users, self._items = users, items

    @classmethod
    def bought(cls, pairs: str, catalogue: Catalogue) -> UserItems:
        """From the interest pairs at a URI: the items bought and, of built pairs, the items that stand for the query."""
        tables = ordered_batches(pairs, ["user_id", "item_id", "query_item_id"], _SCAN_ROWS)
        return cls._of(tables, ("item_id", "query_item_id"), catalogue)

    @classmethod
    def shown_not_clicked(cls, impressions: str, catalogue: Catalogue) -> UserItems:
        """From logged impressions at a URI: the items of label 0. Drawn negatives were never shown and do not count."""

        def shown() -> Iterable[pa.Table]:
            for table in ordered_batches(impressions, ["user_id", "item_id", "label", "drawn"], _SCAN_ROWS):
                drawn = pc.fill_null(table.column("drawn"), False)
                yield table.filter(pc.and_(pc.equal(table.column("label"), 0), pc.invert(drawn)))

        return cls._of(shown(), ("item_id",), catalogue)

    @classmethod
    def open(cls, uri: str) -> UserItems:
        folder = artifacts.local_copy(uri)
        return cls(np.load(folder / "users.npy", mmap_mode="r"), np.load(folder / "items.npy", mmap_mode="r"))

    @classmethod
    def _of(cls, tables: Iterable[pa.Table], columns: tuple[str, ...], catalogue: Catalogue) -> UserItems:
        users, items = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for table in tables:
            user = hash_ids(table.column("user_id"))
            for column in columns:
                rows = catalogue.rows(table.column(column))
                users.append(user[rows >= 0])
                items.append(rows[rows >= 0])
        user, item = np.concatenate(users), np.concatenate(items)
        order = np.lexsort((item, user))
        user, item = user[order], item[order]
        first = np.r_[True, (user[1:] != user[:-1]) | (item[1:] != item[:-1])][: len(user)]
        return cls(user[first], item[first])

    def save(self, uri: str) -> None:
        for name, array in (("users", self._users), ("items", self._items)):
            sink = io.BytesIO()
            np.save(sink, array, allow_pickle=False)
            artifacts.write_bytes(f"{uri}/{name}.npy", sink.getvalue())

    def __len__(self) -> int:
        return len(self._users)

    def of(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All items of a batch's users.

        Args:
            users: (N,) uint64 hashes.

        Returns:
            (n,) int64 place in the batch, ascending, and (n,) int64 catalogue row.
        """
        low, counts = self._ranges(users)
        place = np.repeat(np.arange(len(users)), counts)
        inside = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
        return place, np.asarray(self._items[np.repeat(low, counts) + inside], np.int64)

    def draw(self, users: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One item of each user that has any: (n,) places in the batch and (n,) catalogue rows."""
        low, counts = self._ranges(users)
        place = np.flatnonzero(counts)
        chosen = low[place] + (random.random(len(place)) * counts[place]).astype(np.int64)
        return place, np.asarray(self._items[chosen], np.int64)

    def _ranges(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low = np.searchsorted(self._users, users)
        return low, np.searchsorted(self._users, users, side="right") - low
