"""Writes what is in memory, or comes in batches in any order, as the new state of a line of snapshots.

    write_snapshot(line, ids, matrix, encoder_version="csft-…")

What lies in the table becomes a snapshot in build.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from mim_ray.data.ids import Ids, hash_ids
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.content_hashes import content_digests
from mim_ray.representation_center.key_index import sorted_order, string_array
from mim_ray.representation_center.snapshot_writer import SnapshotWriter
from mim_ray.representation_center.stored_rows import PIECE_ROWS


def write_snapshot(
    line: str,
    ids: Ids,
    matrix: np.ndarray | Iterable[np.ndarray],
    *,
    encoder_version: str,
    delta_version: int = -1,
    width: int | None = None,
    dtype: str = "float32",
    content_at: np.ndarray | None = None,
    content_hashes: Ids | None = None,
    keep: int = 3,
) -> str:
    """Write a state of the line and switch to it; the state's URI.

    Args:
        line: URI of the line.
        ids: (N,) item ids, each once, in any order.
        matrix: (N, D) in the order of the ids, whole or as batches of rows that follow each other (so that the rows
            need not be in memory together; `width` is needed then).
        encoder_version: the encoder that made the vectors; "none" for tables that are no embeddings.
        delta_version: the table's version shown, -1 if no table.
        dtype: "float32", "float16", or "int8" with a scale for each row.
        content_at: (N,) int64 microseconds; `NO_TIME` for unknown.
        content_hashes: (N,) 32 hex digits each, null where unknown.
        keep: how many states stay for a roll-back, this one included (`prune_snapshots`).

    Raises:
        ArtifactError: an id null or there twice, rows of another number or width, or a value that is not finite.
    """
    keys = string_array(ids)
    try:
        hashes = hash_ids(keys)
        order = sorted_order(keys, hashes)
    except ValueError as error:
        raise ArtifactError(f"Snapshot {line}: {error}. Each item needs one row.") from None
    if width is None:
        if not isinstance(matrix, np.ndarray):
            raise ArtifactError(f"Snapshot {line}: `width` is missing, which batches of rows need.")
        width = matrix.shape[1]
    digests = None if content_hashes is None else content_digests(content_hashes)[0]
    with SnapshotWriter(
        line,
        encoder_version=encoder_version,
        delta_version=delta_version,
        width=width,
        dtype=dtype,
        most_rows=len(keys),
        has_times=content_at is not None,
        has_contents=digests is not None,
    ) as writer:
        rows = matrix
        if not isinstance(rows, np.ndarray):
            rows = _joined(rows, (len(keys), width), writer.folder / "rows-in-order", line)
        if rows.shape != (len(keys), width):
            raise ArtifactError(f"Snapshot {line}: rows of shape {rows.shape} for {len(keys)} ids of width {width}.")
        for start in range(0, len(keys), PIECE_ROWS):
            piece = order[start : start + PIECE_ROWS]
            writer.append(
                hashes[piece],
                keys.take(pa.array(piece)),
                rows[piece],
                content_at=None if content_at is None else np.asarray(content_at, np.int64)[piece],
                digests=None if digests is None else digests[piece],
            )
        return writer.publish(keep=keep)


def _joined(batches: Iterable[np.ndarray], shape: tuple[int, int], path: Path, line: str) -> np.ndarray:
    """The batches as one (N, D) float32 array in a file."""
    num_rows, width = shape
    if not num_rows:
        return np.empty((0, width), np.float32)
    out = np.memmap(path, np.float32, mode="w+", shape=shape)
    path.unlink()  # it lives as long as the mapping
    done = 0
    for batch in batches:
        if batch.ndim != 2 or batch.shape[1] != width or done + len(batch) > num_rows:
            text = f"rows of shape {batch.shape} at row {done}; expected {num_rows} rows of width {width}."
            raise ArtifactError(f"Snapshot {line}: {text}")
        out[done : done + len(batch)] = batch
        done += len(batch)
    if done != num_rows:
        raise ArtifactError(f"Snapshot {line}: {done} rows for {num_rows} ids.")
    return np.asarray(out)
