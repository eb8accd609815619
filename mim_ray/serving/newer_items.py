"""Items that came after a snapshot, kept as vectors of length 1, to be compared with a query one by one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from mim_ray.representation_center.overlay import Overlay
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.serving.nearest_rows import unit


class NewerItems:
    """The current rows of an overlay.

    Args:
        category_of: ids -> categories, for items whose message named none.

    Any number of threads may use it.
    """

    def __init__(
        self, overlay: Overlay, snapshot: Snapshot, category_of: Callable[[Sequence[str]], Sequence[str | None]]
    ) -> None:
        self._overlay, self._snapshot, self._category_of = overlay, snapshot, category_of
        self._hidden: np.ndarray | None = None
        self._vectors = np.zeros((0, snapshot.width), np.float32)  # grows by doubling
        self._live = np.zeros(0, bool)
        self._ids: list[str] = []
        self._categories: list[str | None] = []
        self._row: dict[str, int] = {}  # current row of each item
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Take in the rows that the overlay got since the last time."""
        if self._overlay.num_rows == len(self._ids):
            return
        with self._lock:
            rows = np.arange(len(self._ids), self._overlay.num_rows)
            if not len(rows):
                return
            keys, deleted = self._overlay.keys(rows), self._overlay.deleted(rows)
            ids = keys.to_pylist()
            named = self._overlay.category(rows).to_pylist()
            self._make_room(len(self._ids) + len(rows))
            self._vectors[rows] = unit(self._overlay.gather(rows))
            for row, item_id, is_deleted in zip(rows.tolist(), ids, deleted.tolist(), strict=True):
                if item_id in self._row:
                    self._live[self._row[item_id]] = False
                self._row[item_id] = row
                self._live[row] = not is_deleted and bool(self._vectors[row].any())
            replaced = self._snapshot.lookup(keys)
            if (replaced >= 0).any():
                hidden = np.zeros(self._snapshot.num_rows, bool) if self._hidden is None else self._hidden.copy()
                hidden[replaced[replaced >= 0]] = True
                self._hidden = hidden
            self._categories += [own or known for own, known in zip(named, self._category_of(ids), strict=True)]
            self._ids += ids

    def nearest(
        self, vector: np.ndarray, k: int, category: str | None = None
    ) -> tuple[list[tuple[str, float, str | None]], np.ndarray | None]:
        """
        Returns:
            at most k (item id, cosine, category), highest cosine first, of those of a category where one is given; and (N,) bool,
            the rows of the snapshot that were replaced or deleted by then, None where there are none.
        """
        with self._lock:
            num, hidden = len(self._ids), self._hidden
            vectors, live, ids, categories = self._vectors[:num], self._live[:num].copy(), self._ids, self._categories
        if category is not None:
            live &= np.fromiter((name == category for name in categories[:num]), bool, num)
        rows = np.flatnonzero(live)
        if not len(rows):
            return [], hidden
        cosines = (vectors @ unit(np.asarray(vector, np.float32)[None])[0])[rows]
        best = np.argsort(-cosines, kind="stable")[:k]
        return [(ids[rows[place]], float(cosines[place]), categories[rows[place]]) for place in best], hidden

    def _make_room(self, num_rows: int) -> None:
        if num_rows > len(self._live):
            more = max(num_rows, 2 * len(self._live), 64) - len(self._live)
            self._vectors = np.concatenate([self._vectors, np.zeros((more, self._vectors.shape[1]), np.float32)])
            self._live = np.concatenate([self._live, np.zeros(more, bool)])
