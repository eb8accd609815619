"""The log's rows on their way into a snapshot: read file by file, and brought together by the range of their ids' hashes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from mim_ray.data.ids import hash_ids
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.current_rows import current_row_numbers
from mim_ray.representation_center.data_files import DataFile
from mim_ray.representation_center.key_index import shard_of

_COLUMNS = ["item_id", "embedding", "content_hash", "content_at", "commit_version", "shard_id", "deleted"]
_ROW_BYTES = 250  # of a row beside its embedding: id, content hash, shard id, times, and what sorting them takes
_COPIES = 2  # of an embedding at once: as it was read, and joined


def row_bytes(width: int) -> int:
    """Memory that a row of the log takes on its way."""
    return _COPIES * 4 * width + _ROW_BYTES


def read_rows(file: DataFile, width: int, num_rows: int, source: str) -> Iterator[pa.Table]:
    """A file's rows in pieces, with embeddings as a list of fixed size, which no later step has to look at again."""
    for rows in file.batches(_COLUMNS, num_rows):
        values = pa.array(embedding_matrix(rows["embedding"], width, source).reshape(-1))
        fixed = pa.FixedSizeListArray.from_arrays(values, width)
        yield rows.set_column(rows.schema.get_field_index("embedding"), "embedding", fixed)


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


def width_of(file: DataFile) -> int:
    """Width of the embeddings of a file that has rows."""
    return len(next(file.batches(["embedding"], rows=1))["embedding"][0].as_py())


class RowRanges:
    """Rows by the range of their ids' hashes (`shard_of`), in memory up to a bound and else in files of `folder`."""

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
        """Rows of the range, the last one of each item among them; None where there are none."""
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
