"""Rows whose item id an earlier row has, found in bounded memory whatever the table's size.

Equal ids have equal 64-bit hashes. The hashes of a large table are spread over files by their value (8 bytes an id, in the
folder for temporary files), so that each file can be sorted in memory; only the ids of hashes that occur twice are compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray.data.event_log import is_blank
from mim_ray.data.ids import hash_ids
from mim_ray.data.sources import Shard
from mim_ray.representation_center.key_index import string_array

HASHES_AT_ONCE = 4_000_000  # 32 MB, sorted in place
MAX_FILES = 500  # open at once


def duplicate_rows(shards: Callable[[], Iterable[Shard]], num_rows: int) -> np.ndarray:
    """Ascending int64 numbers of the table's rows whose item id an earlier row has. The first row with an id counts.

    Args:
        shards: gives the table's shards in order, as often as it is called: once, and once more for each
            `HASHES_AT_ONCE` hashes that occur twice.
    """
    suspicious = np.concatenate([np.empty(0, np.uint64), *_repeated(shards(), num_rows)])
    found = [
        _later_rows(shards(), np.sort(suspicious[start : start + HASHES_AT_ONCE]))
        for start in range(0, len(suspicious), HASHES_AT_ONCE)
    ]
    return np.sort(np.concatenate([np.empty(0, np.int64), *found]))


def _repeated(shards: Iterable[Shard], num_rows: int) -> Iterator[np.ndarray]:
    """Hashes that more than one row has, each once."""
    parts = min(MAX_FILES, 1 + num_rows // HASHES_AT_ONCE)
    if parts == 1:
        yield _twice(np.concatenate([np.empty(0, np.uint64), *(hash_ids(ids) for _, ids in _ids(shards))]))
        return
    with tempfile.TemporaryDirectory(prefix="mim_ray-ids-") as folder:
        paths = [Path(folder) / str(part) for part in range(parts)]
        files = [path.open("wb") for path in paths]
        try:
            for _, ids in _ids(shards):
                hashes = hash_ids(ids)
                part = ((hashes >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32)).astype(np.int64)
                order = np.argsort(part, kind="stable")
                edges = np.searchsorted(part[order], np.arange(parts + 1))
                ordered = hashes[order]
                for file, first, end in zip(files, edges[:-1], edges[1:], strict=True):
                    file.write(ordered[first:end].data)
        finally:
            for file in files:
                file.close()
        for path in paths:
            yield _twice(np.fromfile(path, np.uint64))
            path.unlink()


def _twice(hashes: np.ndarray) -> np.ndarray:
    hashes.sort()
    return np.unique(hashes[1:][hashes[1:] == hashes[:-1]])


def _later_rows(shards: Iterable[Shard], suspicious: np.ndarray) -> np.ndarray:
    """Rows that are not the first with their id, among those whose hash is in `suspicious` (ascending)."""
    rows, ids = [np.empty(0, np.int64)], [pa.array([], pa.large_string())]
    for first_row, column in _ids(shards):
        hashes = hash_ids(column)
        place = np.minimum(np.searchsorted(suspicious, hashes), len(suspicious) - 1)
        here = np.flatnonzero((suspicious[place] == hashes) & ~is_blank(column))
        rows.append(here + first_row)
        ids.append(string_array(column.take(pa.array(here))))
    codes = pc.dictionary_encode(pa.concat_arrays(ids)).indices.to_numpy()
    _, first = np.unique(codes, return_index=True)
    return np.delete(np.concatenate(rows), first)


def _ids(shards: Iterable[Shard]) -> Iterator[tuple[int, pa.ChunkedArray]]:
    """(number of the first row in the table, ids) of pieces of the table."""
    for shard in shards:
        at = shard.first_row
        for piece in shard.batches(["item_id"]):
            yield at, piece["item_id"]
            at += piece.num_rows
