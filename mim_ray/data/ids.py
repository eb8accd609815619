"""String ids and numbers: 64-bit hashes of ids, random numbers that are a function of a counter, and the id index.

All vectorised, nothing kept per id beyond what is said: no Python dict of all ids anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Ids: TypeAlias = pa.Array | pa.ChunkedArray | Sequence[str | None]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_MASKS = np.array([2 ** (8 * length) - 1 for length in range(9)], np.uint64)


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection of uint64 whose output bits look independent of the input's."""
    x = x ^ (x >> _SHIFTS[0])
    x *= _FACTORS[0]
    x ^= x >> _SHIFTS[1]
    x *= _FACTORS[1]
    x ^= x >> _SHIFTS[2]
    return x


_LENGTH_HASHES = mix(np.arange(256, dtype=np.uint64) * _GAMMA + np.uint64(1))
"""What the hash of an id of each length begins with."""


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


class IdBytes:
    """UTF-8 bytes of ids, read eight at a time: entry p of `data` is the bytes p to p + 7 as a little-endian number.

    Attributes:
        starts, lengths: (n,) int64, in bytes. shortest, longest: extremes of the lengths, 0 without ids.
    """

    def __init__(self, starts: np.ndarray, lengths: np.ndarray, data: np.ndarray) -> None:
        self.starts, self.lengths, self._data = starts, lengths, data
        self.shortest, self.longest = (int(lengths.min()), int(lengths.max())) if len(lengths) else (0, 0)
        self._words: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.starts)

    @classmethod
    def of(cls, ids: Ids) -> IdBytes:
        """A null counts as an empty id."""
        array = as_strings(ids)
        if not len(array):
            return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint64))
        _, offsets, data = array.buffers()
        bounds = np.frombuffer(offsets, np.int64, len(array) + 1, array.offset * 8)
        first, end = int(bounds[0]), int(bounds[-1])
        padded = np.empty(end - first + 8, np.uint8)
        padded[end - first :] = 0
        if end > first:
            padded[:-8] = np.frombuffer(data, np.uint8, end - first, first)
        starts = bounds[:-1] - first if first else bounds[:-1]
        return cls(starts, np.diff(bounds), np.ndarray((end - first + 1,), "<u8", padded.data, strides=(1,)))

    def words(self, number: int, where: np.ndarray | None = None) -> np.ndarray:
        """uint64 of bytes 8 · number to 8 · number + 7 of each id, zero bytes behind its end.

        Args:
            where: positions of the ids that are asked for; None: all. All of them are longer than 8 · number.
        """
        if where is None and number in self._words:
            return self._words[number]
        starts = self.starts if where is None else self.starts[where]
        words: np.ndarray = self._data[starts + 8 * number if number else starts]
        if self.shortest < 8 * number + 8:
            words &= tail_masks(self.lengths if where is None else self.lengths[where], number)
        if where is None:
            self._words[number] = words
        return words


def tail_masks(lengths: np.ndarray, number: int) -> np.ndarray:
    """(n,) uint64 with ones where word `number` of an id of each length has bytes."""
    return _MASKS.take(lengths - 8 * number, mode="clip")


def hash_ids(ids: Ids | IdBytes) -> np.ndarray:
    """(n,) uint64 hash of each id's UTF-8 bytes; stable over processes and machines. A null hashes like an empty id."""
    keys = ids if isinstance(ids, IdBytes) else IdBytes.of(ids)
    if keys.longest < len(_LENGTH_HASHES):
        hashes = _LENGTH_HASHES.take(keys.lengths)
    else:
        hashes = mix(keys.lengths.astype(np.uint64) * _GAMMA + np.uint64(1))
    for number in range(-(-keys.longest // 8)):
        if 8 * number < keys.shortest:
            hashes ^= keys.words(number)
            hashes = mix(hashes)
            hashes += _GAMMA
        else:
            where = np.flatnonzero(keys.lengths > 8 * number)
            hashes[where] = mix(hashes[where] ^ keys.words(number, where)) + _GAMMA
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
        wanted = as_strings(ids)
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
            same = pc.equal(as_strings(self.ids.take(pa.array(rows))), wanted.take(pa.array(open_)))
            equal = np.asarray(same, bool)
            found[open_[equal]] = rows[equal]
            open_ = open_[~equal]
            place[open_] += 1
        return found

    def first_rows(self) -> np.ndarray:
        """(len,) bool: whether a row is the first with its id."""
        return self.rows(self.ids) == np.arange(len(self.ids))


def as_strings(ids: Ids) -> pa.Array:
    """Ids of any kind as one large_string array."""
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.cast(pa.large_string()).combine_chunks()
        if isinstance(ids, pa.ChunkedArray):  # no chunks at all
            ids = pa.concat_arrays(ids.chunks) if ids.num_chunks else pa.array([], pa.large_string())
    elif not isinstance(ids, pa.Array):
        ids = pa.array(ids, pa.large_string())
    return ids if ids.type == pa.large_string() else ids.cast(pa.large_string())
