"""Rows of the catalogue as sorted arrays of hashes, and what can be asked of them.

Comparisons go range by range of the hash space, `RECORDS_AT_ONCE` at a time, whatever the catalogue's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mim_ray.data.ids import mix

RECORDS_AT_ONCE = 8_000_000


class Records(NamedTuple):
    """Rows of a catalogue file: uint64 hash of the id (ascending), uint64 hash of the content, uint32 row number.

    Of rows that a change feed told, `rows` says instead whether the row is there (1) or gone (0); an id is in them once.
    """

    ids: np.ndarray
    contents: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, ids: np.ndarray, contents: np.ndarray, rows: np.ndarray) -> Records:
        """Sorted by id hash, equal ones in the order given."""
        order = np.argsort(ids, kind="stable")
        return cls(ids[order], contents[order], rows[order].astype(np.uint32))

    @property
    def pairs(self) -> np.ndarray:
        """(n,) uint64: one hash of (id, content)."""
        return mix(self.ids ^ mix(self.contents))

    def cut(self, low: int, high: int) -> Records:
        """Those whose id hash is in low … high."""
        first = np.searchsorted(self.ids, np.uint64(low))
        end = len(self.ids) if high == 2**64 else np.searchsorted(self.ids, np.uint64(high))
        return Records(*(column[first:end] for column in self))

    def without(self, ids: np.ndarray) -> Records:
        """Those whose id hash is not among these (ascending)."""
        keep = ~contained(self.ids, ids)
        return self if keep.all() else self.where(keep)

    def where(self, which: np.ndarray) -> Records:
        """Some of them, as (n,) bool."""
        return Records(*(column[which] for column in self))


def vanished(old: Sequence[Records], new: Sequence[Records], kept: Sequence[Records]) -> Iterator[np.ndarray]:
    """Id hashes that are in `old` and in neither of the others; ascending, in parts."""
    for low, high in _ranges([*old, *new]):
        gone = np.setdiff1d(_ids(old, low, high), _ids(new, low, high))
        for records in kept:
            gone = gone[~contained(gone, records.ids)]
        if len(gone):
            yield gone


def repeated(new: Sequence[Records], kept: Sequence[Records]) -> list[np.ndarray]:
    """For each of `new` the ascending numbers of rows whose id an earlier row of `new`, or one of `kept`, has.

    Equal hashes count as equal ids.
    """
    found: list[list[np.ndarray]] = [[] for _ in new]
    for low, high in _ranges(new):
        parts = [records.cut(low, high) for records in new]
        owners = np.repeat(np.arange(len(parts)), [len(part.ids) for part in parts])
        ids, rows = np.concatenate([part.ids for part in parts]), np.concatenate([part.rows for part in parts])
        order = np.argsort(ids, kind="stable")
        ids, owners, rows = ids[order], owners[order], rows[order]
        again = np.zeros(len(ids), bool)
        again[1:] = ids[1:] == ids[:-1]
        for records in kept:
            others = records.cut(low, high).ids
            again |= contained(ids, others[contained(others, ids)] if len(others) < len(ids) else others)
        for number in np.unique(owners[again]):
            found[number].append(rows[again & (owners == number)])
    return [np.sort(np.concatenate(parts)) if parts else np.empty(0, np.uint32) for parts in found]


def newest(parts: Sequence[Records]) -> Records:
    """One record for each id of a change feed's records, which are given oldest first."""
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else []
    if not columns:
        return Records(np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.uint32))
    order = np.argsort(columns[0], kind="stable")
    ids = columns[0][order]
    last = np.append(ids[1:] != ids[:-1], True) if len(ids) else np.empty(0, bool)
    return Records(*(column[order[last]] for column in columns))


def contained(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """(n,) bool: which values are in the sorted array."""
    if not len(ascending):
        return np.zeros(len(values), bool)
    place = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return np.asarray(ascending[place] == values)


def _ids(pieces: Sequence[Records], low: int, high: int) -> np.ndarray:
    parts = [records.cut(low, high).ids for records in pieces]
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint64)


def _ranges(pieces: Sequence[Records]) -> Iterator[tuple[int, int]]:
    """The hash space in equal ranges of about RECORDS_AT_ONCE records."""
    total = sum(len(piece.ids) for piece in pieces)
    num = 1 + total // RECORDS_AT_ONCE
    for number in range(num if total else 0):
        yield number * 2**64 // num, (number + 1) * 2**64 // num
