"""Item id -> row number for many ids at once: sorted 64-bit hashes beside the ids themselves, no Python object per id.

A lookup hashes all ids in a few NumPy passes (eight bytes of every id at a time), finds the hashes by binary search and
compares the ids byte by byte, so that it is exact even where two ids share a hash. The four arrays may be memory mapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Ids: TypeAlias = pa.Array | pa.ChunkedArray | Sequence[str | None] | np.ndarray


class KeyIndex:
    """Finds ids in a fixed set of ids.

    Args:
        hashes: (N,) uint64, ascending. offsets: (N + 1,) int64 into key_bytes. key_bytes: (bytes,) uint8, the ids in
            UTF-8 one after another, in the order of their hashes.
    """

    def __init__(self, hashes: np.ndarray, offsets: np.ndarray, key_bytes: np.ndarray) -> None:
        self.hashes, self.offsets, self.key_bytes = hashes, offsets, key_bytes

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def ids(self) -> pa.LargeStringArray:
        """(N,) the ids in row order, without a copy."""
        return pa.LargeStringArray.from_buffers(
            len(self), pa.py_buffer(np.ascontiguousarray(self.offsets)), pa.py_buffer(self.key_bytes)
        )

    def find(self, ids: Ids) -> np.ndarray:
        """(n,) int64 row of each id; -1 for an unknown or null one."""
        keys = string_array(ids)
        found = np.full(len(keys), -1, np.int64)
        if not len(keys) or not len(self):
            return found
        starts, ends, data = buffers(keys)
        wanted = hash_keys(starts, ends, data)
        pending = np.argsort(wanted, kind="stable")  # neighbours in the search stay neighbours in memory
        if keys.null_count:
            pending = pending[~pc.is_null(keys).to_numpy(zero_copy_only=False)[pending]]
        rows = np.searchsorted(self.hashes, wanted[pending])
        while len(pending):  # a second round only for ids whose hash belongs to several
            alive = rows < len(self)
            pending, rows = pending[alive], rows[alive]
            alive = self.hashes[rows] == wanted[pending]
            pending, rows = pending[alive], rows[alive]
            same = equal_keys(
                (starts[pending], ends[pending], data), (self.offsets[rows], self.offsets[rows + 1], self.key_bytes)
            )
            found[pending[same]] = rows[same]
            pending, rows = pending[~same], rows[~same] + 1
        return found


def build_key_index(ids: Ids) -> tuple[KeyIndex, np.ndarray]:
    """An index of these ids, and (N,) int64: the position in `ids` of each of its rows.

    Raises:
        ValueError: an id is null or there twice.
    """
    keys = string_array(ids)
    if keys.null_count:
        raise ValueError("an id is null")
    starts, ends, data = buffers(keys)
    hashes = hash_keys(starts, ends, data)
    order = np.argsort(hashes, kind="stable").astype(np.int64)
    ordered = keys.take(pa.array(order))
    starts, ends, data = buffers(ordered)
    offsets = np.append(starts, ends[-1:]).astype(np.int64) if len(ordered) else np.zeros(1, np.int64)
    index = KeyIndex(hashes[order], offsets, data[: offsets[-1]])
    duplicates = _duplicates(index)
    if len(duplicates):
        raise ValueError(f"id {index.ids[int(duplicates[0])].as_py()!r} is there twice")
    return index, order


def string_array(ids: Ids) -> pa.LargeStringArray:
    """Ids of any accepted kind as one Arrow array."""
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
        if isinstance(ids, pa.ChunkedArray):
            ids = pa.concat_arrays(ids.chunks) if ids.num_chunks else pa.array([], pa.large_string())
    if isinstance(ids, pa.Array):
        return ids if ids.type == pa.large_string() else ids.cast(pa.large_string())
    return pa.array(ids, pa.large_string(), from_pandas=True)


def buffers(keys: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n,) start and end of each id in (bytes,) uint8, without a copy."""
    _, offset_buffer, data_buffer = keys.buffers()
    if not len(keys):
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8)
    offsets = np.frombuffer(offset_buffer, np.int64, len(keys) + 1, keys.offset * 8)
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.empty(0, np.uint8)
    return offsets[:-1], offsets[1:], data


def hash_keys(starts: np.ndarray, ends: np.ndarray, data: np.ndarray) -> np.ndarray:
    """(n,) uint64 hash of each byte string: splitmix64's finish over its 8-byte words. Part of the snapshot's format."""
    lengths = (ends - starts).astype(np.uint64)
    state = _mix(lengths + np.uint64(0x9E3779B97F4A7C15))
    for active, words in _words(starts, ends, data):
        state[active] = _mix((state[active] ^ words) + np.uint64(0x9E3779B97F4A7C15))
    return state


def equal_keys(
    left: tuple[np.ndarray, np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> np.ndarray:
    """(n,) bool: whether the byte strings (starts, ends, data) are the same, pair by pair."""
    same = (left[1] - left[0]) == (right[1] - right[0])
    rows = np.flatnonzero(same)
    left_words = _words(left[0][rows], left[1][rows], left[2])
    right_words = _words(right[0][rows], right[1][rows], right[2])
    for (active, a), (_, b) in zip(left_words, right_words, strict=True):
        same[rows[active[a != b]]] = False
    return same


def _words(starts: np.ndarray, ends: np.ndarray, data: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For word 0, 1, …: (m,) which strings reach it, and (m,) uint64 their eight bytes there, zero after the end."""
    if not len(starts):
        return
    longest = int((ends - starts).max())
    # One uint64 view per byte position; the last seven positions have too few bytes and are read from a small copy.
    whole = max(0, len(data) - 7)
    view = np.ndarray((whole,), "<u8", data, strides=(1,)) if whole else np.empty(0, np.uint64)
    tail = np.ndarray((8,), "<u8", np.concatenate([data[whole:], np.zeros(15 - len(data[whole:]), np.uint8)]), 0, (1,))
    for position in range(0, longest, 8):
        active = np.flatnonzero(starts + position < ends)
        at = starts[active] + position
        left = np.minimum(ends[active] - at, 8).astype(np.uint64)
        if whole and (at.max() < whole):
            words = view[at]
        else:
            late = at >= whole
            words = np.empty(len(at), np.uint64)
            words[~late] = view[at[~late]]
            words[late] = tail[at[late] - whole]
        keep = np.uint64(0xFFFFFFFFFFFFFFFF) >> ((np.uint64(8) - left) * np.uint64(8))
        yield active, words & keep


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _duplicates(index: KeyIndex) -> np.ndarray:
    """Rows whose id appears in another row too. Only ids that share their hash are compared."""
    shared = np.flatnonzero(index.hashes[1:] == index.hashes[:-1])
    if not len(shared):
        return shared
    rows = np.unique(np.concatenate([shared, shared + 1]))
    codes = index.ids.take(pa.array(rows)).dictionary_encode().indices.to_numpy()
    _, first, counts = np.unique(codes, return_index=True, return_counts=True)
    return rows[first[counts > 1]]
