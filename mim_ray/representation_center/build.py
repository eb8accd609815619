"""From the Delta log to a snapshot: the current rows of an encoder version, streamed file by file."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from mim_ray.errors import ArtifactError
from mim_ray.representation_center.data_files import DataFile
from mim_ray.representation_center.snapshot import Snapshot, write_snapshot
from mim_ray.representation_center.table import EmbeddingTable, current_row_numbers, times

KEYS = ["item_id", "content_at", "commit_version", "shard_id", "deleted"]


def build_snapshot(table: EmbeddingTable, encoder_version: str, uri: str, *, dtype: str = "float32") -> Snapshot:
    """Compact the current rows of `encoder_version` into the snapshot at `uri` and switch it to them.

    Ids and times of all rows are held in memory (about 60 bytes a row), embeddings one file at a time.

    Raises:
        ArtifactError: the table has no rows of this encoder version, or rows of several widths.
    """
    delta_version, files = table.scan(encoder_version)
    keys = [file.read(KEYS) for file in files]
    if not sum(part.num_rows for part in keys):
        known = ", ".join(table.encoder_versions()) or "none"
        raise ArtifactError(
            f"{table.uri} has no embeddings of encoder version {encoder_version} (it has: {known}). Run the extraction."
        )
    rows = pa.concat_tables(keys)
    current = current_row_numbers(rows)
    starts = np.cumsum([0] + [part.num_rows for part in keys])
    width = next(_width(file) for file in files if file.num_rows)

    def embeddings() -> Iterator[np.ndarray]:
        for number, file in enumerate(files):
            first, end = np.searchsorted(current, starts[number : number + 2])
            if first < end:
                column = file.read(["embedding"])["embedding"]
                yield embedding_matrix(column, width, table.uri)[current[first:end] - starts[number]]

    write_snapshot(
        uri,
        rows["item_id"].take(pa.array(current)),
        embeddings(),
        encoder_version=encoder_version,
        delta_version=delta_version,
        width=width,
        dtype=dtype,
        content_at=times(rows["content_at"])[current],
    )
    return Snapshot.open(uri)


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


def _width(file: DataFile) -> int:
    return len(next(file.batches(["embedding"], rows=1))["embedding"][0].as_py())
