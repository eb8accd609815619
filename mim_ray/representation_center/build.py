"""From the Delta log to a snapshot: the current rows of an encoder version, in bounded memory whatever the log's size.

The log is read once, file by file. Where its rows do not fit into memory they are spilled to disk by the range of their ids'
hashes, so that all rows of an item come together; then range by range the current rows are chosen, sorted and appended.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from mim_ray.data.ids import hash_ids
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.content_hashes import content_digests
from mim_ray.representation_center.data_files import DataFile
from mim_ray.representation_center.key_index import shard_of, sorted_order, string_array
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.snapshot_writer import SnapshotWriter
from mim_ray.representation_center.table import EmbeddingTable, current_row_numbers, times

COLUMNS = ["item_id", "embedding", "content_hash", "content_at", "commit_version", "shard_id", "deleted"]
MEMORY_BYTES = 2**28
_ROW_BYTES = 250  # of a row beside its embedding: id, content hash, shard id, times, and what sorting them takes
_COPIES = 2  # of an embedding at once: as it was read, and joined
_PIECE_ROWS = 2**15


def build_snapshot(
    table: EmbeddingTable,
    encoder_version: str,
    line: str,
    *,
    dtype: str = "float32",
    keep: int = 3,
    memory_bytes: int = MEMORY_BYTES,
) -> Snapshot:
    """Compact the current rows of `encoder_version` into a new state of `line`, switch to it, and open it.

    Killed, or without room on the disk, the state that was current stays current.

    Args:
        line: URI of the line, center/snapshots/<encoder_version>.
        keep: how many states stay for a roll-back, the new one included.
        memory_bytes: what the rows in memory may take (the process takes about twice that, and no more for a larger log);
            when the log is larger its rows are spilled to disk, beside the line
            or, where that is remote, in $TMPDIR.

    Raises:
        ArtifactError: the table has no rows of this encoder version, or rows of several widths; no room on the disk.
    """
    delta_version, files = table.scan(encoder_version)
    num_rows = sum(file.num_rows for file in files)
    if not num_rows:
        known = ", ".join(table.encoder_versions()) or "none"
        raise ArtifactError(
            f"{table.uri} has no embeddings of encoder version {encoder_version} (it has: {known}). Run the extraction."
        )
    width = next(_width(file) for file in files if file.num_rows)
    row_bytes = _COPIES * 4 * width + _ROW_BYTES
    num_ranges = -(-num_rows * row_bytes // memory_bytes)
    batch_rows = int(np.clip(memory_bytes // (8 * row_bytes), 256, 65_536))
    with SnapshotWriter(
        line,
        encoder_version=encoder_version,
        delta_version=delta_version,
        width=width,
        dtype=dtype,
        most_rows=num_rows,
        has_times=True,
        has_contents=True,
        memory_bytes=memory_bytes // 2,
    ) as writer:
        ranges = _Ranges(writer.folder, num_ranges, memory_bytes // 4)
        for file in files:
            for rows in file.batches(COLUMNS, batch_rows):
                ranges.add(_checked(rows, width, table.uri))
        for part in range(num_ranges):
            _append(writer, ranges.pop(part, memory_bytes), width)
        uri = writer.publish(keep=keep)
    return Snapshot.open(uri, verify=False)


def embedding_matrix(column: pa.Array | pa.ChunkedArray, width: int, source: str) -> np.ndarray:
    """(N, D) float32 view of a list column.

    Raises:
        ArtifactError: a row has another width.
    """
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.list_(pa.float32()))
    values = column.flatten().to_numpy(zero_copy_only=False)
    if len(values) != len(column) * width or (len(column) and not (column.value_lengths().to_numpy() == width).all()):
        raise ArtifactError(f"{source}: an embedding is not of width {width}. One encoder version has one width.")
    return values.reshape(len(column), width)


class _Ranges:
    """Rows by the range of their ids' hashes, in memory up to a bound and else in files of `folder`."""

    def __init__(self, folder: Path, num_ranges: int, memory_bytes: int) -> None:
        self._paths = [folder / f"rows-{part}" for part in range(num_ranges)]
        self._buffers: list[list[pa.Table]] = [[] for _ in self._paths]
        self._memory_bytes = memory_bytes
        self._num_buffered = 0

    def add(self, rows: pa.Table) -> None:
        if len(self._paths) == 1:
            self._buffers[0].append(rows)
            return
        part = shard_of(hash_ids(rows["item_id"]), len(self._paths))
        order = np.argsort(part, kind="stable")
        rows = rows.take(pa.array(order))
        bounds = np.searchsorted(part[order], np.arange(len(self._paths) + 1))
        for number, buffer in enumerate(self._buffers):
            if bounds[number] < bounds[number + 1]:
                buffer.append(rows.slice(bounds[number], bounds[number + 1] - bounds[number]))
        self._num_buffered += rows.nbytes
        if self._num_buffered > self._memory_bytes:
            self._flush()

    def pop(self, part: int, memory_bytes: int) -> pa.Table | None:
        """Rows of the range, the last one of each item among them."""
        rows, size = [], 0
        for piece in self._pieces(part):
            rows.append(piece)
            size += piece.nbytes
            if size > memory_bytes:  # many old rows of few items: drop them on the way
                joined = pa.concat_tables(rows)
                rows = [joined.take(pa.array(current_row_numbers(joined, deleted=True)))]
                size = rows[0].nbytes
        self._paths[part].unlink(missing_ok=True)
        self._buffers[part] = []
        return pa.concat_tables(rows) if rows else None

    def _pieces(self, part: int) -> Iterator[pa.Table]:
        if self._paths[part].exists():
            with self._paths[part].open("rb") as file:
                while file.peek(1):
                    yield pa.ipc.open_stream(file).read_all()
        yield from self._buffers[part]

    def _flush(self) -> None:
        for path, buffer in zip(self._paths, self._buffers, strict=True):
            if buffer:
                joined = pa.concat_tables(buffer).combine_chunks()
                with path.open("ab") as file, pa.ipc.new_stream(file, joined.schema) as writer:
                    writer.write_table(joined)
                buffer.clear()
        self._num_buffered = 0


def _append(writer: SnapshotWriter, rows: pa.Table | None, width: int) -> None:
    """Add the current rows of a range in the order of their hashes. Embeddings are copied once, then piece by piece."""
    if rows is None:
        return
    current = current_row_numbers(rows)
    ids = string_array(rows["item_id"]).take(pa.array(current))
    hashes = hash_ids(ids)
    order = sorted_order(ids, hashes)
    content_at = times(rows["content_at"])
    contents = string_array(rows["content_hash"])
    matrix = rows["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    for start in range(0, len(order), _PIECE_ROWS):
        piece = order[start : start + _PIECE_ROWS]
        numbers = current[piece]
        writer.append(
            hashes[piece],
            ids.take(pa.array(piece)),
            matrix[numbers],
            content_at=content_at[numbers],
            digests=content_digests(contents.take(pa.array(numbers)))[0],
        )


def _checked(rows: pa.Table, width: int, source: str) -> pa.Table:
    """Rows with embeddings as a list of fixed size, which no later step has to look at again."""
    values = pa.array(embedding_matrix(rows["embedding"], width, source).reshape(-1))
    fixed = pa.FixedSizeListArray.from_arrays(values, width)
    return rows.set_column(rows.schema.get_field_index("embedding"), "embedding", fixed)


def _width(file: DataFile) -> int:
    return len(next(file.batches(["embedding"], rows=1))["embedding"][0].as_py())
