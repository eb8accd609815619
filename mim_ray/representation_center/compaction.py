"""Keeping the embedding log small: merge its many files into few, and drop what deleted items left.

    compact(table, encoder_version)                          # size-tiered; cheap, run it every few minutes
    purge(table, encoder_version, before=…, …)               # deletions older than `before`, and the rows that they hide

*What may be merged.* Files of contiguous commit versions of one encoder version. Of each item the range's current row stays
(a deletion, too), under the greatest commit_version of the range: no row's place among the rows outside the range changes, so
every reader finds the same current rows before and after. Marks of shards stay in the footers.

*How much is rewritten.* A range is merged when it has `fan_in` commits or more and none of them is larger than the others
together. A row that is rewritten is then in a range at least twice as large as before, so that it is rewritten at most
log2(rows) times, and a small change never rewrites the log.

*Beside other writers.* Appends go on: they come after every range. Each merge is one commit that removes and adds; when
another compaction was faster, nothing happens and the files written are orphans, which vacuum.py removes. A process that
dies leaves the same.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import takewhile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mim_ray import artifacts
from mim_ray.data.ids import hash_ids
from mim_ray.representation_center.compacted_files import CompactedFiles
from mim_ray.representation_center.current_rows import current_row_numbers, times
from mim_ray.representation_center.data_files import DataFile, Marks, segment_time
from mim_ray.representation_center.table import EmbeddingTable

FAN_IN = 4
STEP_ROWS = 50_000_000  # a longer merge is cut into several commits where it can be
ROWS_IN_MEMORY = 4_000_000  # keys of about 100 bytes; more are spilled to a temporary folder
KEYS = ["item_id", "content_at", "commit_version", "shard_id", "deleted"]


@dataclass(frozen=True)
class Compacted:
    """What compaction did. `num_purged`: rows of deleted items that went for good. `lost`: another one was faster."""

    num_merges: int = 0
    num_files_read: int = 0
    num_files_written: int = 0
    num_rows_read: int = 0
    num_rows_written: int = 0
    num_purged: int = 0
    num_bytes_written: int = 0
    lost: bool = False

    def __add__(self, other: Compacted) -> Compacted:
        sums = {name: value + getattr(other, name) for name, value in vars(self).items() if name != "lost"}
        return replace(self, **sums, lost=self.lost or other.lost)


@dataclass(frozen=True)
class _Run:
    """All files of one commit version, the unit that is merged."""

    commit_version: int
    files: tuple[DataFile, ...]

    @property
    def weight(self) -> int:
        return sum(file.num_rows + 1 for file in self.files)

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def compact(
    table: EmbeddingTable,
    encoder_version: str,
    *,
    keep_apart: Sequence[int] = (),
    fan_in: int = FAN_IN,
    forget_segments_before: datetime | None = None,
    rows_in_memory: int = ROWS_IN_MEMORY,
) -> Compacted:
    """Merge what may be merged and is worth it, until nothing is left.

    Args:
        keep_apart: Delta versions that snapshots in use show. No range crosses one of them, so that a reader of such a
            snapshot finds what came after it without reading what came before.
        forget_segments_before: marks of window segments that were written and committed before are dropped. Nobody may
            have such a segment any more, or it would be folded again.
        rows_in_memory: most rows whose keys are held in memory (a temporary folder holds more).
    """
    done = Compacted()
    while not done.lost:
        _, files = table.scan(encoder_version)
        ranges = plan(files, keep_apart=keep_apart, fan_in=fan_in)
        if not ranges:
            break
        for chosen in ranges:
            done += _merge(table, chosen, rows_in_memory, forget_segments_before, purge_before=None)
            if done.lost:
                break
    return done


def purge(
    table: EmbeddingTable,
    encoder_version: str,
    *,
    before: datetime,
    committed_before: datetime,
    until: int | None = None,
    overdue_before: datetime | None = None,
    rows_in_memory: int = ROWS_IN_MEMORY,
) -> Compacted:
    """Drop deletions of items older than `before`, with every row that they hide: afterwards the log's files hold nothing
    of these items.

    It rewrites the log from its beginning; nothing happens where no deletion is older than `overdue_before`.

    Args:
        before: deletions whose content_at is earlier (or missing) go.
        committed_before: only where they were committed before, too. No write that began earlier may still be on its way:
            it would bring the item back.
        until: only those of this Delta version and earlier ones: every snapshot in use must show it or a later one.
        overdue_before: default `before`; an earlier time makes rewriting rarer.
    """
    _, files = table.scan(encoder_version)
    latest_ms = committed_before.timestamp() * 1e3
    chosen = list(
        takewhile(
            lambda file: file.committed_at_ms < latest_ms and (until is None or file.commit_version <= until),
            _in_order(files),
        )
    )
    while chosen and any(file.commit_version == chosen[-1].commit_version for file in files if file not in chosen):
        chosen.pop()  # whole commits only
    limit = _microseconds(before if overdue_before is None else overdue_before)
    if not any(_has_deletion(file, limit) for file in chosen):
        return Compacted()
    return _merge(table, chosen, rows_in_memory, None, purge_before=_microseconds(before))


def plan(files: Sequence[DataFile], *, keep_apart: Sequence[int] = (), fan_in: int = FAN_IN) -> list[list[DataFile]]:
    """Ranges of files to merge, each in commit order; see the module for which."""
    by_version: dict[int, list[DataFile]] = {}
    for file in _in_order(files):
        by_version.setdefault(file.commit_version, []).append(file)
    runs = [_Run(version, tuple(group)) for version, group in by_version.items()]
    starts = {0, len(runs)} | {sum(run.commit_version <= version for run in runs) for version in set(keep_apart)}
    borders = sorted(starts)
    found: list[list[DataFile]] = []
    for first, end in itertools.pairwise(borders):
        chosen = list(_ranges(runs[first:end], fan_in))
        covered = {run.commit_version for part in chosen for run in part}
        # One commit of many small files (a large job's) is worth merging alone.
        chosen += [[run] for run in runs[first:end] if run.commit_version not in covered and _scattered(run, fan_in)]
        found += [[file for run in part for file in run.files] for part in chosen]
    return found


def _ranges(runs: Sequence[_Run], fan_in: int) -> Iterator[Sequence[_Run]]:
    """The widest ranges in which no run is larger than the others together. A range that is too uneven for its largest run
    is so in every part that holds this run: what is left are the parts beside it."""
    open_ = [runs]
    while open_:
        part = open_.pop()
        if len(part) < fan_in:
            continue
        weights = [run.weight for run in part]
        largest = int(np.argmax(weights))
        if 2 * weights[largest] > sum(weights):
            open_ += [part[:largest], part[largest + 1 :]]
            continue
        end = int(np.searchsorted(np.cumsum(weights), STEP_ROWS)) + 1
        end = max(end, fan_in)
        if len(part) - end < fan_in:
            yield part
        else:
            open_ += [part[:end], part[end:]]


def _scattered(run: _Run, fan_in: int) -> bool:
    return len(run.files) >= fan_in and CompactedFiles.expected_files(run.files) * 2 <= len(run.files)


def _merge(
    table: EmbeddingTable,
    files: Sequence[DataFile],
    rows_in_memory: int,
    forget: datetime | None,
    purge_before: int | None,
) -> Compacted:
    kept, num_purged = _winners(files, rows_in_memory, purge_before)
    marks = [_remembered(table.marks_of(file), file, forget) for file in files]
    with CompactedFiles(table.uri, files, (name for mark in marks for name in mark.segments)) as target:
        for file, keep, mark in zip(files, kept, marks, strict=True):
            if keep.any():
                start = 0
                for rows in file.batches():
                    mask = keep[start : start + rows.num_rows]
                    target.write(rows if mask.all() else rows.filter(pa.array(mask)))
                    start += rows.num_rows
            target.account_for(mark)
    version = table.replace(files, target.fragments, commit_version=files[-1].commit_version)
    return Compacted(
        num_merges=1,
        num_files_read=len(files),
        num_files_written=len(target.fragments),
        num_rows_read=sum(len(keep) for keep in kept),
        num_rows_written=target.num_rows,
        num_purged=num_purged,
        num_bytes_written=sum(fragment.num_bytes for fragment in target.fragments),
        lost=version is None,
    )


def _winners(files: Sequence[DataFile], rows_in_memory: int, purge_before: int | None) -> tuple[list[np.ndarray], int]:
    """Per file (rows,) bool: the rows that stay; and the number of rows of deleted items that go."""
    counts = [file.num_rows for file in files]
    starts = np.cumsum([0, *counts])
    keep = np.zeros(starts[-1], bool)
    num_purged = 0
    for keys, places in _key_parts(files, starts, rows_in_memory):
        current = current_row_numbers(keys, deleted=True)
        if purge_before is not None:
            gone = keys["deleted"].to_numpy()[current] & (times(keys["content_at"])[current] < purge_before)
            num_purged += int(gone.sum())
            current = current[~gone]
        keep[places[current]] = True
    return np.split(keep, starts[1:-1]), num_purged


def _key_parts(
    files: Sequence[DataFile], starts: np.ndarray, rows_in_memory: int
) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """(keys, (m,) places in the range) of parts of the items, each part small enough for memory."""
    num_parts = -(-int(starts[-1]) // rows_in_memory)
    if num_parts <= 1:
        keys = pa.concat_tables([file.read(KEYS) for file in files])
        yield keys, np.arange(keys.num_rows)
        return
    num_parts += num_parts // 4 + 1  # the parts are not of equal size
    with tempfile.TemporaryDirectory(prefix="mim-ray-compaction-") as folder:
        paths = [Path(folder) / f"{part}.arrow" for part in range(num_parts)]
        schema = files[0].read(KEYS).schema.append(pa.field("place", pa.int64()))
        writers = [pa.ipc.new_stream(str(path), schema) for path in paths]
        for file, start in zip(files, starts[:-1], strict=True):
            for rows in file.batches(KEYS):
                rows = rows.append_column("place", pa.array(np.arange(start, start + rows.num_rows)))
                start += rows.num_rows
                part = (hash_ids(rows["item_id"]) >> np.uint64(32)) * np.uint64(num_parts) >> np.uint64(32)
                for number, writer in enumerate(writers):
                    writer.write_table(rows.filter(pa.array(part == number)))
        for writer in writers:
            writer.close()
        for path in paths:
            with pa.OSFile(str(path)) as source:
                keys = pa.ipc.open_stream(source).read_all()
            path.unlink()
            yield keys.drop_columns("place"), keys["place"].to_numpy()


def _remembered(marks: Marks, file: DataFile, forget: datetime | None) -> Marks:
    if forget is None or file.committed_at_ms >= forget.timestamp() * 1e3:
        return marks
    limit = int(forget.timestamp() * 1e9)
    return replace(marks, segments=frozenset(name for name in marks.segments if segment_time(name) >= limit))


def _has_deletion(file: DataFile, before: int) -> bool:
    """Whether the file holds a deletion whose content_at is earlier. Only row groups that hold any deletion are read."""
    fs, path = artifacts.filesystem(file.uri)
    with pq.ParquetFile(path, filesystem=fs) as source:
        names = [source.schema.column(number).path for number in range(len(source.schema))]
        column = names.index("deleted")
        for group in range(source.metadata.num_row_groups):
            statistics = source.metadata.row_group(group).column(column).statistics
            if statistics is None or not statistics.has_min_max or statistics.max:
                rows = source.read_row_group(group, columns=["content_at", "deleted"])
                if (rows["deleted"].to_numpy() & (times(rows["content_at"]) < before)).any():
                    return True
    return False


def _in_order(files: Sequence[DataFile]) -> list[DataFile]:
    return sorted(files, key=lambda file: (file.commit_version, file.path))


def _microseconds(at: datetime) -> int:
    return round(at.timestamp() * 1e6)
