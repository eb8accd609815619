"""Item id -> row number for many ids at once: sorted 64-bit hashes beside the ids themselves, no Python object per id.

A lookup hashes all ids in a few NumPy passes, finds the hashes by binary search and compares the ids themselves, so that it
is exact even where two ids share a hash. Unlike `data.ids.IdIndex` the ids stand in the order of their hashes, so that all
three arrays can be files that are memory mapped.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray.data.ids import Ids, hash_ids


class KeyIndex:
    """Finds ids in a fixed set of ids.

    Args:
        hashes: (N,) uint64 `hash_ids`, ascending. offsets: (N + 1,) int64 into key_bytes. key_bytes: (bytes,) uint8, the
            ids in UTF-8 one after another, in the order of their hashes.
    """

    def __init__(self, hashes: np.ndarray, offsets: np.ndarray, key_bytes: np.ndarray) -> None:
        self.hashes, self.offsets, self.key_bytes = hashes, offsets, key_bytes
        self.ids: pa.LargeStringArray = pa.LargeStringArray.from_buffers(
            len(hashes), pa.py_buffer(np.ascontiguousarray(offsets)), pa.py_buffer(key_bytes)
        )
        """(N,) the ids in row order, without a copy."""

    def __len__(self) -> int:
        return len(self.hashes)

    def find(self, ids: Ids) -> np.ndarray:
        """(n,) int64 row of each id; -1 for an unknown or null one."""
        keys = string_array(ids)
        found = np.full(len(keys), -1, np.int64)
        if not len(keys) or not len(self):
            return found
        wanted = hash_ids(keys)
        pending = np.argsort(wanted)  # neighbours in the search are neighbours in memory
        if keys.null_count:
            pending = pending[np.asarray(keys.is_valid(), bool)[pending]]
        rows = np.searchsorted(self.hashes, wanted[pending])
        while len(pending):  # a second round only for ids whose hash belongs to several
            alive = rows < len(self)
            pending, rows = pending[alive], rows[alive]
            alive = self.hashes[rows] == wanted[pending]
            pending, rows = pending[alive], rows[alive]
            same = np.asarray(pc.equal(self.ids.take(pa.array(rows)), keys.take(pa.array(pending))), bool)
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
    hashes = hash_ids(keys)
    order = np.argsort(hashes, kind="stable").astype(np.int64)
    _, offsets, data = keys.take(pa.array(order)).buffers()
    starts = np.frombuffer(offsets, np.int64, len(keys) + 1) if len(keys) else np.zeros(1, np.int64)
    key_bytes = np.frombuffer(data, np.uint8, int(starts[-1])) if starts[-1] else np.empty(0, np.uint8)
    index = KeyIndex(hashes[order], starts, key_bytes)
    duplicates = _duplicates(index)
    if len(duplicates):
        raise ValueError(f"id {index.ids[int(duplicates[0])].as_py()!r} is there twice")
    return index, order


def string_array(ids: Ids) -> pa.LargeStringArray:
    """Ids of any accepted kind as one Arrow array."""
    if isinstance(ids, pa.ChunkedArray):
        ids = pa.concat_arrays(ids.chunks) if ids.num_chunks else pa.array([], pa.large_string())
    if isinstance(ids, pa.Array):
        return ids if ids.type == pa.large_string() else ids.cast(pa.large_string())
    return pa.array(ids, pa.large_string(), from_pandas=True)


def _duplicates(index: KeyIndex) -> np.ndarray:
    """Rows whose id appears in another row too. Only ids that share their hash are compared."""
    shared = np.flatnonzero(index.hashes[1:] == index.hashes[:-1])
    if not len(shared):
        return shared
    rows = np.unique(np.concatenate([shared, shared + 1]))
    codes = index.ids.take(pa.array(rows)).dictionary_encode().indices.to_numpy()
    _, first, counts = np.unique(codes, return_index=True, return_counts=True)
    return rows[first[counts > 1]]
