"""Each table from Parquet or Delta, validated where it enters.

A table NAME below a root is the first of: NAME.parquet (a file or a folder of files), NAME (a Delta table, or a folder of
Parquet files). Harmless differences are cast: ids written as integers, times without zone or in other units, any strings
or binaries. What cannot be used as a whole is a DataError that names the file, the column, the type and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import deltalake
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mim_ray import artifacts
from mim_ray.data.casting import cast_columns, validate_schema
from mim_ray.data.features import with_features
from mim_ray.data.schema import TABLES, TableSchema
from mim_ray.errors import DataError
from mim_ray.object_store import delta_options, storage_error

if TYPE_CHECKING:
    import ray.data

_BATCH_BYTES = 64 * 2**20
_READ_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Shard:
    """A fixed slice of a table: some row groups of one file. Equal files give equal shards.

    Attributes:
        first_row: number of its first row in the table. Reading gives exactly the `columns` asked for, cast.
    """

    table: TableSchema
    source: str
    schema: pa.Schema
    fragment: ds.Fragment
    first_row: int
    num_rows: int

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows, with the table's types; optional columns that are missing are null."""
        names = list(columns) if columns is not None else self.table.schema.names
        present = [name for name in names if name in self.schema.names]
        try:
            rows = self.fragment.to_table(self.schema, columns=present)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OSError) as error:
            raise DataError(
                f"{self.source} cannot be read like the table's other files ({error}). Write it again with their types."
            ) from None
        return cast_columns(rows, names, self.table, self.source)

    def batches(
        self, columns: Sequence[str], *, start: int = 0, stop: int | None = None, rows: int = 65_536
    ) -> Iterator[pa.Table]:
        """Rows start … stop in pieces of at most `rows` rows and about 64 MB, in order, types as `read`.

        Row groups are read as a stream, so that one of any size takes little memory; rows before `start` are skipped, which
        costs their reading.
        """
        end = self.num_rows if stop is None else stop
        groups = [group.id for group in self.fragment.row_groups]
        keys = ds.get_partition_keys(self.fragment.partition_expression)
        try:
            with (
                self.fragment.filesystem.open_input_file(self.fragment.path) as opened,
                pq.ParquetFile(opened, metadata=self.fragment.metadata, buffer_size=_READ_BYTES) as file,
            ):
                present = [name for name in columns if name in file.schema_arrow.names]
                num_bytes = sum(_num_bytes(file.metadata.row_group(group), present) for group in groups)
                at_once = max(1, min(rows, _BATCH_BYTES * max(1, self.num_rows) // max(1, num_bytes)))
                at = 0
                for batch in file.iter_batches(at_once, row_groups=groups, columns=present, use_threads=False):
                    first, last = max(start - at, 0), min(end - at, batch.num_rows)
                    at += batch.num_rows
                    if first < last:
                        piece = pa.Table.from_batches([batch.slice(first, last - first)])
                        for name in [name for name in columns if name in keys and name not in present]:
                            value = pa.scalar(keys[name], self.schema.field(name).type)
                            piece = piece.append_column(name, pa.repeat(value, piece.num_rows))
                        yield cast_columns(piece, list(columns), self.table, self.source)
                    if at >= end:
                        return
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OSError) as error:
            raise DataError(
                f"{self.source} cannot be read like the table's other files ({error}). Write it again with their types."
            ) from None


def find_table(root: str, name: str) -> str | None:
    """URI of the table `name` below `root`, None when there is none."""
    for uri in (f"{root}/{name}.parquet", f"{root}/{name}"):
        filesystem, path = artifacts.filesystem(uri)
        if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
            return uri
    return None


def require_table(root: str, name: str) -> str:
    """find_table, or a DataError that says what was looked for."""
    uri = find_table(root, name)
    if uri is None:
        needed = ", ".join(TABLES[name].required)
        raise DataError(
            f"{root} has no table {name}: neither {name}.parquet nor a folder {name}. "
            f"Put it there with at least the columns {needed}, or set data.root to another folder."
        )
    return uri


def read_table(root: str, name: str, columns: Sequence[str] | None = None) -> ray.data.Dataset:
    """The table `name` below `root` as a Ray Dataset with the types of data.schema.

    Raises:
        DataError: as validate_schema.
    """
    import ray.data  # here, so that tasks which only read shards start faster

    table, uri = TABLES[name], require_table(root, name)
    dataset = open_dataset(uri, name)
    names = list(columns) if columns is not None else table.schema.names
    present = [column for column in names if column in dataset.schema.names]
    if is_delta(uri):
        rows = ray.data.read_delta(uri, columns=present, storage_options=delta_options(uri))
    else:
        filesystem, _ = artifacts.filesystem(uri)
        rows = ray.data.read_parquet(list(dataset.files), filesystem=filesystem, columns=present)
    cast: Callable[[pa.Table], pa.Table] = lambda batch: cast_columns(batch, names, table, uri)  # noqa: E731
    return rows.map_batches(cast, batch_format="pyarrow")


def open_dataset(uri: str, name: str) -> ds.Dataset:
    """The files behind a table, validated.

    Raises:
        DataError: as validate_schema; also for files that are no Parquet.
    """
    try:
        if is_delta(uri):
            table = deltalake.DeltaTable(uri, storage_options=delta_options(uri))
            dataset = table.to_pyarrow_dataset(filesystem=artifacts.folder_filesystem(uri))
        else:
            filesystem, path = artifacts.filesystem(uri)
            dataset = ds.dataset(path, filesystem=filesystem, format="parquet", partitioning="hive")
        validate_schema(dataset.schema, TABLES[name], uri)
        if not any(unread(fragment).count_rows() for fragment in dataset.get_fragments()):
            raise DataError(f"{uri} is empty: it has no rows. Fill it, or set data.root to another folder.")
    except (pa.ArrowInvalid, OSError) as error:
        if (told := storage_error(error, uri)) is not None:
            raise told from None
        raise DataError(f"{uri} cannot be read as Parquet ({error}). Write it again as Parquet or Delta.") from None
    return dataset


def shards(
    uri: str, name: str, rows: int = 100_000, max_bytes: int = 256 * 2**20, features: Sequence[pa.Field] = ()
) -> list[Shard]:
    """The table in fixed slices of whole row groups, about `rows` rows and at most about `max_bytes` decoded bytes each.

    Args:
        features: more columns that the table must have.

    Raises:
        DataError: as open_dataset.
    """
    found = list(iter_shards(uri, name, rows, max_bytes))
    if not features:
        return found
    table = with_features(TABLES[name], features)
    validate_schema(found[0].schema, table, uri)
    return [replace(shard, table=table) for shard in found]


def iter_shards(uri: str, name: str, rows: int = 100_000, max_bytes: int = 256 * 2**20) -> Iterator[Shard]:
    """As `shards`, one by one: of the files' footers one is in memory at a time, if the caller keeps no shard."""
    yield from cut(open_dataset(uri, name), name, rows=rows, max_bytes=max_bytes)


def cut(
    dataset: ds.Dataset,
    name: str,
    *,
    rows: int = 100_000,
    max_bytes: int = 256 * 2**20,
    files: Container[str] | None = None,
) -> Iterator[Shard]:
    """As `iter_shards`, of an open dataset; of `files` only, where they are named (the others are not opened)."""
    table = TABLES[name]
    first_row = 0
    for kept in dataset.get_fragments():
        if files is not None and kept.path not in files:
            continue
        fragment = unread(kept)
        group: list[int] = []
        num_rows = size = 0
        try:
            infos = [*fragment.row_groups, None]
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{fragment.path} cannot be read as Parquet ({error}). Write it again as Parquet or Delta."
            ) from None
        for info in infos:
            full = info is not None and (num_rows + info.num_rows > rows or size + info.total_byte_size > max_bytes)
            if num_rows and (info is None or full):
                piece = fragment.subset(row_group_ids=group)
                yield Shard(table, fragment.path, dataset.schema, piece, first_row, num_rows)
                first_row, group, num_rows, size = first_row + num_rows, [], 0, 0
            if info is not None:
                group.append(info.id)
                num_rows, size = num_rows + info.num_rows, size + info.total_byte_size


def unread(fragment: ds.ParquetFileFragment, row_groups: Sequence[int] | None = None) -> ds.ParquetFileFragment:
    """The same file, or some of its row groups, without the footer, which a fragment keeps once it was looked at."""
    return fragment.format.make_fragment(
        fragment.path, fragment.filesystem, fragment.partition_expression, row_groups=row_groups
    )


def _num_bytes(group: pq.RowGroupMetaData, columns: Sequence[str]) -> int:
    chunks = [group.column(number) for number in range(group.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in columns)


def is_delta(uri: str) -> bool:
    return artifacts.exists(f"{uri}/_delta_log")
