"""Rows of a test set on a scratch disk, so that no number of them has to fit in memory.

Columns of fixed width in the order of the rows, and records split over files by a hash, so that all rows of one user (or
of one impression) can be held at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

CHUNK_ROWS = 2**19
PART_ROWS = 2**21


class Columns:
    """Named columns of numbers in files of a folder; each grows by `append`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._dtypes: dict[str, np.dtype] = {}
        self._lengths: dict[str, int] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        """Add (n,) values at the column's end; the first call sets its dtype."""
        dtype = self._dtypes.setdefault(name, values.dtype)
        self._lengths[name] = self._lengths.get(name, 0) + len(values)
        with self._path(name).open("ab") as file:
            values.astype(dtype, copy=False).tofile(file)

    def create(self, name: str, num_rows: int, dtype: np.dtype) -> np.ndarray:
        """A whole column to be written at any place; zeros at first."""
        self._dtypes[name], self._lengths[name] = np.dtype(dtype), num_rows
        if not num_rows:
            self._path(name).touch()
            return np.zeros(0, dtype)
        return np.memmap(self._path(name), dtype, "w+", shape=(num_rows,))

    def num_rows(self, name: str) -> int:
        return self._lengths.get(name, 0)

    def take(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Values at the row numbers `rows`, best in ascending order."""
        if not self.num_rows(name):
            return np.zeros(0)
        return np.asarray(np.memmap(self._path(name), self._dtypes[name], "r")[rows])

    def chunks(self, *names: str) -> Iterator[tuple[np.ndarray, ...]]:
        """The columns, equally long, in pieces of at most CHUNK_ROWS rows."""
        num_rows = self.num_rows(names[0])
        assert all(self.num_rows(name) == num_rows for name in names), [(name, self.num_rows(name)) for name in names]
        for start in range(0, num_rows, CHUNK_ROWS):
            count = min(CHUNK_ROWS, num_rows - start)
            yield tuple(
                np.fromfile(self._path(name), self._dtypes[name], count, offset=start * self._dtypes[name].itemsize)
                for name in names
            )

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.column"


class Parts:
    """Records split over files by a 64-bit hash: equal hashes are in the same part.

    Args:
        dtype: of a record: (name, type) of its fields.
        num_rows: how many records will come, so that a part has about PART_ROWS of them.
    """

    def __init__(self, folder: Path, dtype: list[tuple[str, str]], num_rows: int) -> None:
        self._folder, self._dtype = folder, np.dtype(dtype)
        self.count = max(1, -(-num_rows // PART_ROWS))
        folder.mkdir(parents=True)

    def add(self, hashes: np.ndarray, **fields: np.ndarray) -> None:
        """Add a record for each of the (n,) hashes."""
        records = np.empty(len(hashes), self._dtype)
        for name, values in fields.items():
            records[name] = values
        part = (hashes >> np.uint64(40)) % np.uint64(self.count)
        order = np.argsort(part, kind="stable")
        ends = np.cumsum(np.bincount(part.astype(np.int64), minlength=self.count))
        for number, piece in enumerate(np.split(records[order], ends[:-1])):
            if len(piece):
                with self._path(number).open("ab") as file:
                    piece.tofile(file)

    def read(self) -> Iterator[np.ndarray]:
        """The records of each part, once: its file is deleted then."""
        for number in range(self.count):
            path = self._path(number)
            yield np.fromfile(path, self._dtype) if path.exists() else np.empty(0, self._dtype)
            path.unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.part"
