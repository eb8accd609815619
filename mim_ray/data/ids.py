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


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection of uint64 whose output bits look independent of the input's."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


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
    """UTF-8 bytes of ids, read eight at a time.

    Args:
        starts, lengths: (n,) int64, in bytes. data: uint64, the bytes of all ids one after another, with at least two words
            behind the last one.
    """

    def __init__(self, starts: np.ndarray, lengths: np.ndarray, data: np.ndarray) -> None:
        self.starts, self.lengths, self.data = starts, lengths, data
        self._words: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.starts)

    @classmethod
    def of(cls, ids: Ids) -> IdBytes:
        """A null counts as an empty id."""
        array = _strings(ids)
        if not len(array):
            return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.zeros(2, np.uint64))
        _, offsets, data = array.buffers()
        bounds = np.frombuffer(offsets, np.int64, len(array) + 1, array.offset * 8)
        first, end = int(bounds[0]), int(bounds[-1])
        words = np.empty((end - first) // 8 + 3, np.uint64)
        words[-3:] = 0
        if end > first:
            words.view(np.uint8)[: end - first] = np.frombuffer(data, np.uint8, end - first, first)
        return cls(bounds[:-1] - first, np.diff(bounds), words)

    def words(self, number: int, where: np.ndarray | None = None) -> np.ndarray:
        """uint64 of bytes 8 · number to 8 · number + 7 of each id, in little-endian order, zero bytes behind its end.

        Args:
            where: positions of the ids that are asked for, all of them longer than 8 · number; None: all ids, all that long.
        """
        if where is None and number in self._words:
            return self._words[number]
        starts, lengths = (self.starts, self.lengths) if where is None else (self.starts[where], self.lengths[where])
        words = words_at(self.data, starts + 8 * number)
        unused = 8 * number + 8 - lengths
        if len(unused) and unused.max() > 0:
            bits = np.maximum(unused, 0).view(np.uint64) << np.uint64(3)
            words <<= bits
            words >>= bits
        if where is None:
            self._words[number] = words
        return words


def words_at(data: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """(n,) uint64: the 8 bytes from each byte position on. Two aligned reads are faster than one that is not."""
    place = positions >> 3
    bits = (positions & 7).view(np.uint64) << np.uint64(3)
    words = data.take(place, mode="clip")
    words >>= bits
    place += 1
    np.subtract(np.uint64(64), bits, out=bits)
    words |= data.take(place, mode="clip") << bits  # a shift by 64 gives 0
    return words


def hash_ids(ids: Ids | IdBytes) -> np.ndarray:
    """(n,) uint64 hash of each id's UTF-8 bytes; stable over processes and machines. A null hashes like an empty id."""
    keys = ids if isinstance(ids, IdBytes) else IdBytes.of(ids)
    hashes = mix(keys.lengths.astype(np.uint64) * _GAMMA + np.uint64(1))
    if not len(keys):
        return hashes
    shortest, longest = int(keys.lengths.min()), int(keys.lengths.max())
    for number in range(-(-longest // 8)):
        if 8 * number < shortest:
            hashes = mix(hashes ^ keys.words(number)) + _GAMMA
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
