"""The Parquet files of the embedding log: written by any worker, named by the log once they are committed.

    fragment = write_fragment(table_uri, rows, encoder_version=…, shard_id=…)     # not visible yet
    file = DataFile(…)                                                           # as EmbeddingTable.scan gives them
    file.read(["item_id", "embedding"])

*Marks.* A file's footer lists the shards whose rows it accounts for (`SHARDS_KEY`), also those whose rows are not there any
more (compaction keeps current rows only) or never were (an empty shard). A batch shard's file says the same in its name, so
that the log alone answers which shards are in. A compacted file lists the window segments apart (`SEGMENTS_KEY`); its name
holds their first and last time, so that most files need not be opened to learn that a segment is not in them.

Files are read through pyarrow's own filesystems. deltalake's dataset would call back into Python from Arrow's threads, which
now and then aborts a process that is about to end.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from mim_ray import artifacts
from mim_ray.data.schema import ITEM_EMBEDDINGS

PARTITIONS = ["encoder_version", "commit_version"]
SCHEMA = pa.schema([*ITEM_EMBEDDINGS.schema, pa.field("category", pa.string()), pa.field("commit_version", pa.int64())])
"""SPEC's columns; `category` of a new item, which the catalogue may not know yet; `commit_version`, see table.py."""
FILE_SCHEMA = pa.schema([field for field in SCHEMA if field.name not in PARTITIONS])
SHARDS_KEY = b"mim_ray.shards"
SEGMENTS_KEY = b"mim_ray.segments"
COMPACTED = "compacted-"
WRITE_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": ["origin", "shard_id", "category"],
    "use_byte_stream_split": ["embedding.list.element"],  # a tenth smaller and faster to write and to read than without
    "write_statistics": [name for name in FILE_SCHEMA.names if name != "embedding"],
}


@dataclass(frozen=True)
class Marks:
    """What a file accounts for: batch shards, and window segments."""

    shards: frozenset[str] = frozenset()
    segments: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Fragment:
    """A data file below the table that no commit names yet. `path` is relative to the table; JSON-able by asdict."""

    path: str
    num_bytes: int
    num_rows: int
    encoder_version: str
    shard_ids: Sequence[str]


@dataclass(frozen=True)
class DataFile:
    """A data file that the log names.

    Attributes:
        path: relative to the table, as the log writes it (URL-encoded).
        committed_at_ms: milliseconds since 1970 at which the newest of its rows was committed.
        shard_range: least and greatest shard id; None where the file marks none.
    """

    table_uri: str
    path: str
    num_bytes: int
    num_rows: int
    encoder_version: str
    commit_version: int
    committed_at_ms: int
    shard_range: tuple[str, str] | None

    @property
    def uri(self) -> str:
        return f"{self.table_uri}/{unquote(self.path)}"

    @property
    def batch_shard(self) -> str | None:
        """The one batch shard whose file this is, by its name; None for window segments and compacted files."""
        name = self.path.rpartition("/")[2]
        return name.removeprefix("batch-").rpartition("-")[0] if name.startswith("batch-") else None

    @property
    def is_realtime(self) -> bool:
        """Whether this is a fold of window segments."""
        return self.path.rpartition("/")[2].startswith("realtime-")

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of those columns of `SCHEMA`, partition columns too."""
        names = SCHEMA.names if columns is None else list(columns)
        fs, path = artifacts.filesystem(self.uri)
        stored = [name for name in names if name not in PARTITIONS]
        rows = pq.read_table(path, filesystem=fs, columns=stored, partitioning=None, schema=FILE_SCHEMA)
        return self._with_partitions(rows, names)

    def batches(self, columns: Sequence[str] | None = None, rows: int = 65_536) -> Iterator[pa.Table]:
        """As `read`, in pieces of at most `rows` rows, in order; a file of any size takes little memory."""
        names = SCHEMA.names if columns is None else list(columns)
        fs, path = artifacts.filesystem(self.uri)
        with pq.ParquetFile(path, filesystem=fs) as file:
            for batch in file.iter_batches(rows, columns=[name for name in names if name not in PARTITIONS]):
                yield self._with_partitions(pa.Table.from_batches([batch]), names)

    def may_hold(self, first: str, last: str) -> bool:
        """Whether a mark in [first, last] can be in this file, as far as the log says. All segments, or all batch shards."""
        name = self.path.rpartition("/")[2]
        if name.startswith(COMPACTED) and is_segment(first) and is_segment(last):
            least, greatest = (int(part) for part in name.split("-")[1:3])
            return least <= segment_time(last) and segment_time(first) <= greatest
        return self.shard_range is None or (self.shard_range[0] <= last and first <= self.shard_range[1])

    def marks(self) -> Marks:
        """What the file accounts for; opens its footer where the name does not say it."""
        if self.batch_shard is not None:
            return Marks(shards=frozenset([self.batch_shard]))
        fs, path = artifacts.filesystem(self.uri)
        footer = pq.read_metadata(path, filesystem=fs).metadata or {}
        if SHARDS_KEY in footer:
            listed = frozenset(json.loads(footer[SHARDS_KEY]))
        else:
            listed = frozenset(self.read(["shard_id"])["shard_id"].to_pylist())
        if self.is_realtime:
            return Marks(segments=listed)
        return Marks(listed, frozenset(json.loads(footer.get(SEGMENTS_KEY, b"[]"))))

    def _with_partitions(self, rows: pa.Table, names: Sequence[str]) -> pa.Table:
        values = {"encoder_version": self.encoder_version, "commit_version": self.commit_version}
        columns = [
            pa.repeat(pa.scalar(values[name], SCHEMA.field(name).type), rows.num_rows)
            if name in values
            else rows[name].cast(SCHEMA.field(name).type)
            for name in names
        ]
        return pa.table(columns, schema=pa.schema([SCHEMA.field(name) for name in names]))


def write_fragment(
    table_uri: str, rows: pa.Table, *, encoder_version: str, shard_id: str | None = None, origin: str = "batch"
) -> Fragment:
    """Write rows to a data file of the table without committing it.

    Args:
        rows: item_id, embedding (list or fixed-size list of float32), content_hash, content_at; optional category,
            deleted. An item at most once. May be empty: the file then only marks its shard as done.
        shard_id: of all rows; None when `rows` has a column shard_id (folded window segments).
    """
    num = rows.num_rows
    columns = {
        "origin": pa.repeat(pa.scalar(origin), num),
        "deleted": pa.repeat(pa.scalar(False), num),
        "category": pa.nulls(num, pa.string()),
    }
    if shard_id is not None:
        columns["shard_id"] = pa.repeat(pa.scalar(shard_id), num)
    columns.update({name: rows[name] for name in rows.column_names})
    table = pa.table({name: columns[name] for name in FILE_SCHEMA.names}).cast(FILE_SCHEMA)
    shard_ids = [shard_id] if shard_id is not None else sorted(set(table["shard_id"].to_pylist()))
    name = f"batch-{shard_id}" if origin == "batch" and shard_id is not None else f"{origin}-{shard_ids[0]}"
    path = f"encoder_version={encoder_version}/{name}-{uuid.uuid4().hex[:12]}.parquet"
    return Fragment(path, write_data_file(f"{table_uri}/{path}", table, shard_ids), num, encoder_version, shard_ids)


def write_data_file(uri: str, rows: pa.Table, shard_ids: Sequence[str]) -> int:
    """Write rows of `FILE_SCHEMA` with the marks of `shard_ids`; the file's size in bytes."""
    sink = pa.BufferOutputStream()
    marked = rows.replace_schema_metadata({SHARDS_KEY: json.dumps(sorted(shard_ids)).encode()})
    pq.write_table(marked, sink, **WRITE_OPTIONS)
    content = sink.getvalue()
    artifacts.write_bytes(uri, content.to_pybytes())
    return int(content.size)


def is_segment(mark: str) -> bool:
    """Whether a mark is the id of a window segment: 20 digits of nanoseconds, then 8 hexadecimal ones."""
    return len(mark) == 29 and mark[20] == "-" and mark[:20].isdecimal()


def segment_time(segment_id: str) -> int:
    """Nanoseconds since 1970 at which the segment was written."""
    return int(segment_id[:20])
