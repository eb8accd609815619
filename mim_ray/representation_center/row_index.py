"""Hash -> newest row, for keys that keep coming: an open-addressing table in NumPy, no Python object per key.

Unlike `key_index.KeyIndex`, which is sorted once, this one takes new keys at a constant cost each. One thread writes, any number
may read beside it: a reader sees a key's row before or after an insertion, never something in between.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Same = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(rows, positions) -> bool: whether the key of each row is that at the position of the batch asked for."""

_LEAST = 1_024


class RowIndex:
    """64-bit hashes with the row of each key, at most half full."""

    def __init__(self) -> None:
        self._slots = _empty(_LEAST)
        self._num = 0

    def __len__(self) -> int:
        """Number of keys."""
        return self._num

    def find(self, hashes: np.ndarray, same: Same) -> np.ndarray:
        """(n,) int64 row of each key, -1 where there is none.

        Args:
            hashes: (n,) uint64. same: compares the keys themselves, where hashes are equal.
        """
        wanted = hashes | np.uint64(1)  # 0 marks an empty slot
        held, rows_of = self._slots
        mask = len(held) - 1
        found = np.full(len(wanted), -1, np.int64)
        place = (wanted >> np.uint64(1)).astype(np.int64) & mask
        pending = np.arange(len(wanted))
        while len(pending):
            there = held[place]
            equal = np.flatnonzero(there == wanted[pending])
            going_on = there != 0
            if len(equal):
                rows = rows_of[place[equal]]
                right = same(rows, pending[equal])
                found[pending[equal[right]]] = rows[right]
                going_on[equal[right]] = False
            pending, place = pending[going_on], (place[going_on] + 1) & mask
        return found

    def insert(self, hashes: np.ndarray, rows: np.ndarray, same: Same) -> None:
        """Let each key point to its row; a key that is there already moves to the new one.

        Args:
            hashes: (n,) uint64. rows: (n,) int64, each once; of a key that comes twice the later one counts.
            same: as in `find`, for rows that were inserted before and those of this batch.
        """
        wanted = hashes | np.uint64(1)
        last = len(wanted) - 1 - np.unique(wanted[::-1], return_index=True)[1]
        if len(last) < len(wanted):
            earlier = np.setdiff1d(np.arange(len(wanted)), last, assume_unique=True)
            winner = last[np.searchsorted(wanted[last], wanted[earlier])]
            earlier = earlier[~same(rows[winner], earlier)]  # other keys with the same hash
            if len(earlier):
                self.insert(hashes[earlier], rows[earlier], lambda other, place: same(other, earlier[place]))
        if 2 * (self._num + len(last)) > len(self._slots[0]):
            self._grow(self._num + len(last))
        self._num += _put(self._slots, wanted[last], rows[last], lambda other, place: same(other, last[place]))

    def _grow(self, num: int) -> None:
        held, rows_of = self._slots
        used = np.flatnonzero(held)
        size = len(held)
        while size < 4 * num:
            size *= 2
        larger = _empty(size)
        _put(larger, held[used], rows_of[used], lambda rows, _: np.zeros(len(rows), bool))
        self._slots = larger


def _empty(size: int) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, rows) of `size` slots, a power of two."""
    return np.zeros(size, np.uint64), np.full(size, -1, np.int64)


def _put(slots: tuple[np.ndarray, np.ndarray], wanted: np.ndarray, rows: np.ndarray, same: Same) -> int:
    """Insert keys of which none comes twice; the number of new ones."""
    held, rows_of = slots
    mask = len(held) - 1
    place = (wanted >> np.uint64(1)).astype(np.int64) & mask
    pending = np.arange(len(wanted))
    num_new = 0
    while len(pending):
        there = held[place]
        going_on = np.ones(len(pending), bool)
        equal = np.flatnonzero(there == wanted[pending])
        if len(equal):
            right = equal[same(rows_of[place[equal]], pending[equal])]
            rows_of[place[right]] = rows[pending[right]]
            going_on[right] = False
        free = np.flatnonzero(there == 0)
        if len(free):
            free = free[np.unique(place[free], return_index=True)[1]]  # one of those that want the same slot
            rows_of[place[free]] = rows[pending[free]]
            held[place[free]] = wanted[pending[free]]  # second: a reader that sees the hash finds the row
            going_on[free] = False
            num_new += len(free)
        # Who wanted a slot that another has just taken looks there again, and then goes on to the next.
        lost = there == 0
        pending, place = pending[going_on], ((place + ~lost) & mask)[going_on]
    return num_new
