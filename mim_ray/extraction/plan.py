"""Deterministic shards: the items table cut into fixed slices, the same ones after every restart.

A unit is some row groups of one file; its slices of `shard_rows` rows are the shards. A shard's id is a hash of the file's
place and content (the footer's sizes, offsets and statistics), the rows, and all that decides what an embedding is. A changed
file or another encoder therefore gives other shards.

The plan keeps 40 bytes a unit and makes the rest anew when it is asked: a table of a billion rows in row groups of 1,024 takes
40 MB. Which shards are done is asked of the embedding log.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from mim_ray import artifacts
from mim_ray.data import sources
from mim_ray.data.schema import TABLES
from mim_ray.extraction.duplicates import duplicate_rows


class Rows(Protocol):
    """Where a unit's rows come from; `sources.Shard` is one."""

    @property
    def source(self) -> str: ...

    @property
    def num_rows(self) -> int: ...

    def batches(self, columns: Sequence[str], *, start: int, stop: int | None, rows: int) -> Iterator[pa.Table]: ...


@dataclass(frozen=True)
class Slice:
    """A shard: rows start … stop of its unit."""

    shard_id: str
    start: int
    stop: int


@dataclass(frozen=True)
class Unit:
    """What is read as one stream.

    Attributes:
        content: stands for the rows' content and for all else that makes their embeddings differ.
        starts: ascending first rows of those of its shards that are to be made.
        duplicates: ascending rows of the unit whose item id an earlier row of the table has.
        changed_at: time of its file, microseconds: its content is not older; 0 where created_at says it all.
    """

    rows: Rows
    content: str
    shard_rows: int
    starts: np.ndarray
    duplicates: np.ndarray
    changed_at: int = 0

    def slice(self, start: int) -> Slice:
        """The shard whose first row is `start`."""
        return Slice(shard_id(self.content, start), start, min(start + self.shard_rows, self.rows.num_rows))

    @property
    def slices(self) -> list[Slice]:
        return [self.slice(start) for start in self.starts.tolist()]


@dataclass(frozen=True)
class Plan:
    """All shards of an items table.

    Attributes:
        files: as fragments whose footers are not loaded. changed_at: the time of each, microseconds.
        groups: see `_UNIT`, a row for each unit.
    """

    uri: str
    schema: pa.Schema
    files: Sequence[ds.ParquetFileFragment]
    changed_at: Sequence[int]
    groups: np.ndarray
    shard_rows: int

    @property
    def num_rows(self) -> int:
        return int(self.groups["num_rows"].sum())

    @property
    def num_shards(self) -> int:
        return int((-(-self.groups["num_rows"] // self.shard_rows)).sum())

    def shard_ids(self) -> Iterator[str]:
        """In the order of the table."""
        return (piece.shard_id for group in self.groups for piece in _slices(group, self.shard_rows))

    def count(self, done: Set[str]) -> tuple[int, int]:
        """(shards, rows) of the plan that are in `done`."""
        found = rows = 0
        for group in self.groups if done else ():
            for piece in _slices(group, self.shard_rows):
                if piece.shard_id in done:
                    found, rows = found + 1, rows + piece.stop - piece.start
        return found, rows

    def units(self, done: Set[str]) -> Iterator[Unit]:
        """What is left to do when the shards `done` are in the table, made one by one."""
        for group in self.groups:
            starts = [piece.start for piece in _slices(group, self.shard_rows) if piece.shard_id not in done]
            if starts:
                again = self._duplicates
                first, end = np.searchsorted(again, [group["first_row"], group["first_row"] + group["num_rows"]])
                yield Unit(
                    self._shard(group),
                    _content(group),
                    self.shard_rows,
                    np.array(starts, np.int64),
                    again[first:end] - group["first_row"],
                    self.changed_at[group["file"]],
                )

    @cached_property
    def _duplicates(self) -> np.ndarray:
        return duplicate_rows(self._whole_files, self.num_rows)

    def _whole_files(self) -> Iterator[sources.Shard]:
        numbers, first = np.unique(self.groups["file"], return_index=True)
        rows = np.add.reduceat(self.groups["num_rows"], first)
        for number, start, num_rows in zip(numbers, self.groups["first_row"][first], rows, strict=True):
            file = self.files[number]
            yield sources.Shard(
                TABLES["items"], file.path, self.schema, sources.unread(file), int(start), int(num_rows)
            )

    def _shard(self, group: np.void) -> sources.Shard:
        file = self.files[group["file"]]
        fragment = sources.unread(file, range(group["first_group"], group["first_group"] + group["num_groups"]))
        first_row, num_rows = int(group["first_row"]), int(group["num_rows"])
        return sources.Shard(TABLES["items"], file.path, self.schema, fragment, first_row, num_rows)


_UNIT = [
    ("file", np.int32),
    ("first_group", np.int32),
    ("num_groups", np.int32),
    ("first_row", np.int64),
    ("num_rows", np.int64),
    ("content", np.uint64),
]


def plan(items_uri: str, shard_rows: int, identity: Any) -> Plan:
    """All shards of the items table; reads the footers of its files, one at a time.

    Args:
        identity: JSON-able; whatever makes embeddings differ (encoder version, how pictures are decoded).

    Raises:
        DataError: as sources.open_dataset.
    """
    base = artifacts.filesystem(items_uri)[1]
    files: list[ds.ParquetFileFragment] = []
    groups = []
    schema = pa.schema([])
    for shard in sources.iter_shards(items_uri, "items", rows=shard_rows):
        if not files or files[-1].path != shard.fragment.path:
            files.append(sources.unread(shard.fragment))
        schema = shard.schema
        ids = [group.id for group in shard.fragment.row_groups]
        metadata = shard.fragment.metadata
        described = artifacts.fingerprint(
            shard.fragment.path.removeprefix(base),
            [metadata.row_group(number).to_dict() for number in ids],
            shard_rows,
            identity,
        )
        groups.append((len(files) - 1, ids[0], len(ids), shard.first_row, shard.num_rows, int(described, 16)))
    infos = files[0].filesystem.get_file_info([file.path for file in files]) if files else []
    return Plan(
        items_uri, schema, files, [info.mtime_ns // 1_000 for info in infos], np.array(groups, _UNIT), shard_rows
    )


def shard_id(content: str, start: int) -> str:
    """Id of the shard that begins at row `start` of the unit with this content."""
    return artifacts.fingerprint(content, start)


def _slices(group: np.void, shard_rows: int) -> Iterator[Slice]:
    content, num_rows = _content(group), int(group["num_rows"])
    for start in range(0, num_rows, shard_rows):
        yield Slice(shard_id(content, start), start, min(start + shard_rows, num_rows))


def _content(group: np.void) -> str:
    return f"{int(group['content']):016x}"
