"""What the embedding log names at a version, kept up to date cheaply: a new version costs its own files, not all of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.transaction import AddAction, RemoveAction

from mim_ray.representation_center.data_files import DataFile, Fragment, Marks, is_segment

KEPT_MARKS = 10_000  # files whose footers are remembered


class LogState:
    """The data files of the table at `uri`, at the version that `follow` saw last."""

    def __init__(self, uri: str) -> None:
        self.version = -1
        self.files: dict[str, DataFile] = {}
        """By path, in the order in which they were met."""
        self._uri = uri
        self._paths: pa.Array = pa.array([], pa.string())
        self._by_name: dict[str, dict[str, int]] = {}  # encoder version -> batch shard -> files whose names say it
        self._others: dict[
            str, dict[str, DataFile]
        ] = {}  # encoder version -> path -> files to be asked for their marks
        self._marks: dict[str, Marks] = {}

    def follow(self, handle: DeltaTable) -> None:
        """Take in what the handle's version names."""
        if handle.version() == self.version:
            return
        log = pa.table(handle.get_add_actions(flatten=True))
        paths = pc.cast(log["path"], pa.string()).combine_chunks()
        is_new = pc.invert(pc.is_in(paths, value_set=self._paths))
        new = log.filter(is_new)
        if len(self._paths) + new.num_rows > len(paths):
            stays = pc.is_in(self._paths, value_set=paths)
            for path in self._paths.filter(pc.invert(stays)).to_pylist():
                self._drop(self.files.pop(path))
        for file in _data_files(self._uri, new):
            self._add(file)
        self._paths, self.version = paths, handle.version()

    def of(self, encoder_version: str) -> list[DataFile]:
        return [file for file in self.files.values() if file.encoder_version == encoder_version]

    def shards(self, encoder_version: str) -> set[str]:
        """Batch shards that are in."""
        found = set(self._by_name.get(encoder_version, ()))
        for file in self._others.get(encoder_version, {}).values():
            if not file.is_realtime:
                found |= self.marks_of(file).shards
        return found

    def contains(self, encoder_version: str, marks: Iterable[str]) -> set[str]:
        """Those of `marks` (batch shards and window segments) that are in."""
        wanted = set(marks)
        found = wanted & self._by_name.get(encoder_version, {}).keys()
        for part in ({mark for mark in wanted if is_segment(mark)}, {mark for mark in wanted if not is_segment(mark)}):
            if part:
                first, last = min(part), max(part)
                for file in self._others.get(encoder_version, {}).values():
                    if file.may_hold(first, last):
                        known = self.marks_of(file)
                        found |= (part & known.shards) | (part & known.segments)
        return found

    def marks_of(self, file: DataFile) -> Marks:
        """The file's marks; footers are read once (files never change)."""
        if file.batch_shard is not None:
            return file.marks()
        if file.path not in self._marks:
            if len(self._marks) >= KEPT_MARKS:
                del self._marks[next(iter(self._marks))]
            self._marks[file.path] = file.marks()
        return self._marks[file.path]

    def _add(self, file: DataFile) -> None:
        self.files[file.path] = file
        shard = file.batch_shard
        if shard is None:
            self._others.setdefault(file.encoder_version, {})[file.path] = file
        else:
            counts = self._by_name.setdefault(file.encoder_version, {})
            counts[shard] = counts.get(shard, 0) + 1

    def _drop(self, file: DataFile) -> None:
        self._marks.pop(file.path, None)
        shard = file.batch_shard
        if shard is None:
            del self._others[file.encoder_version][file.path]
        else:
            counts = self._by_name[file.encoder_version]
            counts[shard] -= 1
            if not counts[shard]:
                del counts[shard]


def add_action(fragment: Fragment, commit_version: int, *, replaces: Sequence[DataFile] = ()) -> AddAction:
    """The log's entry of a new file; of one that `replaces` others, with the time at which their rows were committed."""
    now_ms = int(time.time() * 1000)
    stats: dict[str, object] = {"numRecords": fragment.num_rows}
    if fragment.shard_ids:
        stats |= {
            "minValues": {"shard_id": min(fragment.shard_ids)},
            "maxValues": {"shard_id": max(fragment.shard_ids)},
        }
    return AddAction(
        path=fragment.path,
        size=fragment.num_bytes,
        partition_values=_partition_values(fragment.encoder_version, commit_version),
        modification_time=max((file.committed_at_ms for file in replaces), default=now_ms),
        data_change=not replaces,
        stats=json.dumps(stats),
    )


def remove_action(file: DataFile) -> RemoveAction:
    """The log's entry of a file whose rows stand in others now."""
    return RemoveAction(
        path=file.path,
        data_change=False,
        deletion_timestamp=int(time.time() * 1000),
        size=file.num_bytes,
        partition_values=_partition_values(file.encoder_version, file.commit_version),
    )


def _data_files(uri: str, log: pa.Table) -> list[DataFile]:
    names = [
        "path",
        "size_bytes",
        "num_records",
        "partition.encoder_version",
        "partition.commit_version",
        "modification_time",
        "min.shard_id",
        "max.shard_id",
    ]
    nothing: Sequence[None] = [None] * log.num_rows
    columns = [log[name].to_pylist() if name in log.column_names else nothing for name in names]
    return [
        DataFile(uri, path, size, num or 0, version, int(commit), at, None if first is None else (first, last))
        for path, size, num, version, commit, at, first, last in zip(*columns, strict=True)
    ]


def _partition_values(encoder_version: str, commit_version: int) -> dict[str, str | None]:
    return {"encoder_version": encoder_version, "commit_version": str(commit_version)}
