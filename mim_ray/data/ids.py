"""String ids and numbers: 64-bit hashes of ids, random numbers that are a function of a counter, and the id index.

All vectorised, nothing kept per id beyond what is said: no Python dict of all ids anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Ids: TypeAlias = pa.Array | pa.ChunkedArray | Sequence[str | None]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection of uint64 whose output bits look independent of the input's."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(seed: int, stream: int, counters: np.ndarray) -> np.ndarray:
    """uint64 for every counter (any shape of integers), independent between seeds and streams."""
    base = mix(np.array([seed], np.uint64) * _GAMMA + np.uint64(stream))[0]
    return mix(mix(counters.astype(np.uint64) * _GAMMA + base) + base)


def uniform(seed: int, stream: int, counters: np.ndarray) -> np.ndarray:
    """float64 in (0, 1) for every counter."""
    return ((random_bits(seed, stream, counters) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def normal(seed: int, stream: int, counters: np.ndarray) -> np.ndarray:
    """Standard normal float64 for every counter (Box and Muller; uses streams `stream` and `stream` + 2^20)."""
    radius = np.sqrt(-2.0 * np.log(uniform(seed, stream, counters)))
    return radius * np.cos(2.0 * np.pi * uniform(seed, stream + 2**20, counters))


@dataclass(frozen=True)
class IdBytes:
    """UTF-8 bytes of ids, ready to be read eight at a time.

    Attributes:
        starts, lengths: (n,) int64, in bytes. words: uint64 little-endian, entry p being the bytes p to p + 7; what follows
            the last id is zero.
    """

    starts: np.ndarray
    lengths: np.ndarray
    words: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    @classmethod
    def of(cls, ids: Ids) -> IdBytes:
        """A null counts as an empty id."""
        array = _strings(ids)
        if not len(array):
            return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint64))
        _, offsets, data = array.buffers()
        bounds = np.frombuffer(offsets, np.int64, len(array) + 1, array.offset * 8)
        first, end = int(bounds[0]), int(bounds[-1])
        padded = np.empty(end - first + 8, np.uint8)
        padded[end - first :] = 0
        if end > first:
            padded[:-8] = np.frombuffer(data, np.uint8, end - first, first)
        return cls(bounds[:-1] - first, np.diff(bounds), words_of(padded))


def words_of(data: np.ndarray) -> np.ndarray:
    """The 8 bytes from each position on as little-endian uint64: (len - 7,), a view of the uint8 array."""
    return np.ndarray((max(len(data) - 7, 0),), "<u8", data.data if len(data) else None, strides=(1,))


def hash_ids(ids: Ids | IdBytes) -> np.ndarray:
    """(n,) uint64 hash of each id's UTF-8 bytes; stable over processes and machines. A null hashes like an empty id."""
    keys = ids if isinstance(ids, IdBytes) else IdBytes.of(ids)
    hashes = mix(keys.lengths.astype(np.uint64) * _GAMMA + np.uint64(1))
    position = 0
    active = np.flatnonzero(keys.lengths)
    while len(active):
        everyone = len(active) == len(keys)  # saves an indirection where all ids are this long
        starts, lengths = (keys.starts, keys.lengths) if everyone else (keys.starts[active], keys.lengths[active])
        unused = np.maximum(position + 8 - lengths, 0).astype(np.uint64) << np.uint64(3)  # bits beyond the id's end
        word = (keys.words[starts + position] << unused) >> unused
        mixed = mix((hashes if everyone else hashes[active]) ^ word) + _GAMMA
        if everyone:
            hashes = mixed
        else:
            hashes[active] = mixed
        position += 8
        active = active[lengths > position]
    return hashes


class IdIndex:
    """Which row an id has: sorted hashes with their rows (16 bytes an id), answers verified against the ids themselves.

    Args:
        ids: all ids by row, without nulls. Where an id occurs twice, its first row counts.
        hashes, order: a stored index of these ids (`hashes` sorted, `order` their rows); built when not given.
    """

    def __init__(self, ids: pa.Array, hashes: np.ndarray | None = None, order: np.ndarray | None = None) -> None:
        self.ids = ids
        if hashes is None or order is None:
            unsorted = hash_ids(ids)
            order = np.argsort(unsorted, kind="stable")
            hashes = unsorted[order]
        self.hashes, self.order = hashes, order

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: Ids) -> np.ndarray:
        """(n,) int64 row of each id, -1 for unknown ids and nulls."""
        wanted = _strings(ids)
        found = np.full(len(wanted), -1, np.int64)
        if not len(self.ids) or not len(wanted):
            return found
        keys = hash_ids(wanted)
        place = np.searchsorted(self.hashes, keys, "left")
        open_ = np.flatnonzero(np.asarray(wanted.is_valid()))
        while len(open_):  # one round, and one more for each collision of hashes
            open_ = open_[place[open_] < len(self.hashes)]
            open_ = open_[self.hashes[place[open_]] == keys[open_]]
            rows = self.order[place[open_]]
            same = pc.equal(_strings(self.ids.take(pa.array(rows))), wanted.take(pa.array(open_)))
            equal = np.asarray(same, bool)
            found[open_[equal]] = rows[equal]
            open_ = open_[~equal]
            place[open_] += 1
        return found

    def first_rows(self) -> np.ndarray:
        """(len,) bool: whether a row is the first with its id."""
        return self.rows(self.ids) == np.arange(len(self.ids))


def _strings(ids: Ids) -> pa.Array:
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.cast(pa.large_string()).combine_chunks()
        if isinstance(ids, pa.ChunkedArray):  # no chunks at all
            ids = pa.concat_arrays(ids.chunks) if ids.num_chunks else pa.array([], pa.large_string())
    elif not isinstance(ids, pa.Array):
        ids = pa.array(ids, pa.large_string())
    return ids.cast(pa.large_string())
