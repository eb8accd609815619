"""Which files a table consists of now, so that two listings tell what changed between them.

A Delta table's data files never change: their names are enough, and the log says when each came. A Parquet file may be
written again under its name: size and time tell it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import deltalake
import pyarrow as pa
import pyarrow.dataset as ds
from deltalake.exceptions import DeltaError

from mim_ray import artifacts
from mim_ray.data.casting import validate_schema
from mim_ray.data.schema import TABLES
from mim_ray.data.sources import Shard, cut, is_delta
from mim_ray.errors import DataError
from mim_ray.object_store import delta_options


@dataclass(frozen=True)
class ListedFile:
    """A file of a table.

    Attributes:
        signature: differs when the file's content may differ.
        changed_at: when it came into the table, microseconds since 1970 by its writer's or its store's clock.
    """

    signature: str
    changed_at: int


@dataclass(frozen=True)
class Head:
    """The newest version of a Delta table.

    Attributes:
        identity: differs when the table was dropped and made again. has_feed: its commits note which rows they change.
        partitions: columns whose values the files' places say.
    """

    identity: str
    version: int
    has_feed: bool
    schema: pa.Schema
    partitions: tuple[str, ...]


@dataclass(frozen=True)
class Listing:
    """A table's files at one moment.

    Attributes:
        identity: as `Head.identity`. version: Delta version, None of plain Parquet.
        committed_at: when that version was committed, microseconds. files: by path, as `Shard.source` says it.
    """

    uri: str
    name: str
    identity: str
    version: int | None
    committed_at: int | None
    files: Mapping[str, ListedFile]
    dataset: ds.Dataset

    def shards(self, files: set[str], rows: int) -> list[Shard]:
        """Those files in slices of about `rows` rows."""
        return list(cut(self.dataset, self.name, rows=rows, files=files))


def delta_head(uri: str) -> Head | None:
    """Of a Delta table, without listing its files; None of plain Parquet."""
    if not is_delta(uri):
        return None
    table = deltalake.DeltaTable(uri, storage_options=delta_options(uri))
    about = table.metadata()
    has_feed = str(about.configuration.get("delta.enableChangeDataFeed")).lower() == "true"
    schema = pa.schema(table.schema().to_arrow())
    return Head(str(about.id), table.version(), has_feed, schema, tuple(about.partition_columns))


def list_table(uri: str, name: str) -> Listing:
    """
    Raises:
        DataError: the table cannot be used as a whole, or has no files.
    """
    try:
        listing = _delta(uri, name) if is_delta(uri) else _parquet(uri, name)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{uri} cannot be read as Parquet ({error}). Write it again as Parquet or Delta.") from None
    if not listing.files:
        raise DataError(f"{uri} is empty: it has no files. Fill it, or set data.root to another folder.")
    validate_schema(listing.dataset.schema, TABLES[name], uri)
    return listing


def _delta(uri: str, name: str) -> Listing:
    table = deltalake.DeltaTable(uri, storage_options=delta_options(uri))
    log: Any = pa.table(table.get_add_actions(flatten=True))
    milliseconds = log["modification_time"].to_pylist()
    files = {
        unquote(path): ListedFile("", 1_000 * at)
        for path, at in zip(log["path"].to_pylist(), milliseconds, strict=True)
    }
    committed_at = 1_000 * int(table.history(1)[0]["timestamp"])
    try:
        dataset = table.to_pyarrow_dataset(filesystem=artifacts.folder_filesystem(uri))
    except DeltaError as error:
        raise DataError(f"{uri} cannot be read ({error}). Write it without that Delta feature.") from None
    return Listing(uri, name, str(table.metadata().id), table.version(), committed_at, files, dataset)


def _parquet(uri: str, name: str) -> Listing:
    filesystem, path = artifacts.filesystem(uri)
    dataset = ds.dataset(path, filesystem=filesystem, format="parquet", partitioning="hive")
    infos = filesystem.get_file_info(list(dataset.files))
    files = {info.path: ListedFile(f"{info.size}-{info.mtime_ns}", info.mtime_ns // 1_000) for info in infos}
    return Listing(uri, name, "parquet", None, None, files, dataset)
