"""Where hashes that begin alike stand among ascending hashes: a table in two levels, of 1 to 2 bytes a row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

GROUP_BITS = 6
_PIECE_ROWS = 2**20


class Buckets:
    """First row of each value of a hash's leading bits, in two levels: a row number for 64 values, and steps from there.

    Args:
        bits: how many leading bits.
        groups: unsigned, first row of each 64 values. steps: (64 a group) unsigned, the value's first row less its group's.
        first_group: number of groups[0].
    """

    def __init__(self, bits: int, groups: np.ndarray, steps: np.ndarray, first_group: int = 0) -> None:
        self.bits, self.groups, self.steps, self.first_group = bits, groups, steps, first_group
        self._shift = np.uint64(64 - bits)

    def first_rows(self, hashes: np.ndarray) -> np.ndarray:
        """(n,) int64 row at which to begin looking for each hash."""
        value = (hashes >> self._shift).view(np.int64)
        if self.first_group:
            value -= self.first_group << GROUP_BITS
        rows = self.groups.take(value >> GROUP_BITS, mode="clip").astype(np.int64)
        rows += self.steps.take(value, mode="clip")
        return rows

    @staticmethod
    def bits_for(num_rows: int) -> int:
        """Leading bits: half a row to one row for each value, so that the table takes 1 to 2 bytes a row."""
        return max(GROUP_BITS, (num_rows - 1).bit_length())

    @classmethod
    def of(cls, hashes: np.ndarray) -> Buckets:
        """The table of ascending hashes."""
        bits = cls.bits_for(len(hashes))
        first = first_rows_of(hashes, bits, 0, 2**bits).reshape(-1, 2**GROUP_BITS)
        steps = first - first[:, :1]
        return cls(bits, first[:, 0], steps.astype(np.min_scalar_type(steps.max())).reshape(-1))


def first_rows_of(hashes: np.ndarray, bits: int, first: int, end: int) -> np.ndarray:
    """(end - first,) int64: for each value of the leading bits, the first of the ascending hashes that is not less."""
    starts = np.arange(first, end, dtype=np.uint64) << np.uint64(64 - bits)
    return np.searchsorted(hashes, starts).astype(np.int64)


class BucketFile:
    """The table of hashes in a file, made piece by piece.

    Args:
        path: of (num_rows,) uint64, ascending.

    Attributes:
        bits, groups, steps: as `Buckets` takes them, the last two as dtypes.
    """

    def __init__(self, path: Path, num_rows: int) -> None:
        self._path, self._num_rows = path, num_rows
        self.bits = Buckets.bits_for(num_rows)
        self.groups = np.dtype(np.uint32 if num_rows < 2**32 else np.uint64)
        self.steps = np.min_scalar_type(max(int((first - first[:, :1]).max()) for first in self._first_rows()))

    def write(self, groups: Sink, steps: Sink) -> None:
        for first in self._first_rows():
            groups.write(first[:, 0].astype(self.groups))
            steps.write((first - first[:, :1]).astype(self.steps))

    def _first_rows(self) -> Iterator[np.ndarray]:
        """(g, 64) int64 first rows of the values of the leading bits, some groups at a time."""
        done = 0
        left = np.empty(0, np.int64)  # first rows of a group that the piece before began
        with self._path.open("rb") as file:
            for start in range(0, self._num_rows, _PIECE_ROWS):
                hashes = np.fromfile(file, np.uint64, _PIECE_ROWS)
                # Values behind the last one met may begin in a later piece.
                last = start + _PIECE_ROWS >= self._num_rows
                end = 2**self.bits if last else int(hashes[-1] >> np.uint64(64 - self.bits)) + 1
                first = np.concatenate([left, start + first_rows_of(hashes, self.bits, done, end)])
                whole = len(first) >> GROUP_BITS << GROUP_BITS
                if whole:
                    yield first[:whole].reshape(-1, 2**GROUP_BITS)
                left, done = first[whole:], end
        if not self._num_rows:
            yield np.zeros((2**self.bits >> GROUP_BITS, 2**GROUP_BITS), np.int64)


class Sink(Protocol):
    def write(self, array: np.ndarray) -> None: ...
