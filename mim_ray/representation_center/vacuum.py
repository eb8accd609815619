"""Deleting what nobody can need any more: files of the embedding log, its old commits, leftovers of the window.

    vacuum(table, retention=timedelta(days=7))
    vacuum_window(f"{center}/window", retention=timedelta(days=7))

Three kinds of data files go once they are older than the retention: those that a compaction replaced that long ago, those of
a worker that died before its commit, and half-written ones. A file that no commit names may belong to a write that goes on:
therefore the retention must be longer than the longest write and the longest read of the log. Just before the deletion the
newest version is asked again.

delta-rs names the files (its full vacuum as a dry run, which minds the age of files without a commit; tried with 1.6.6);
deleting is ours, for that second look, and because its own adds two commits to the log each time.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import unquote

import pyarrow.fs as pafs

from mim_ray import artifacts
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.table import EmbeddingTable, retention_settings

LEAST_RETENTION = timedelta(hours=1)
OURS = ("batch-", "realtime-", "compacted-", ".tmp-")


@dataclass(frozen=True)
class Vacuumed:
    """Data files deleted (or, in a dry run, to delete), their size, and files of the Delta log that went."""

    num_files: int = 0
    num_bytes: int = 0
    num_log_files: int = 0


def vacuum(table: EmbeddingTable, *, retention: timedelta, dry_run: bool = False) -> Vacuumed:
    """Delete data files that no version within the retention names; checkpoint the log and delete its old commits.

    Args:
        retention: whole hours, rounded up; at least one hour.

    Raises:
        ArtifactError: the retention is shorter than an hour.
    """
    if retention < LEAST_RETENTION:
        raise ArtifactError(
            f"A retention of {retention} would delete files that are being written. Use one that is longer than the "
            f"longest job; at least {LEAST_RETENTION}."
        )
    hours = math.ceil(retention / timedelta(hours=1))
    num_log_files = 0 if dry_run else _clean_log(table, hours)
    handle = table.open()
    found = handle.vacuum(retention_hours=hours, dry_run=True, enforce_retention_duration=False, full=True)
    candidates = {unquote(path) for path in found}
    candidates = {path for path in candidates if path.rpartition("/")[2].startswith(OURS)}
    candidates -= {unquote(file.path) for file in table.files()}
    uris = [f"{table.uri}/{path}" for path in sorted(candidates)]
    sizes = artifacts.for_each(_size, uris)
    there = [uri for uri, size in zip(uris, sizes, strict=True) if size is not None]
    if not dry_run:
        artifacts.for_each(artifacts.remove, there)
    return Vacuumed(len(there), sum(size for size in sizes if size is not None), num_log_files)


def _size(uri: str) -> int | None:
    fs, path = artifacts.filesystem(uri)
    info = fs.get_file_info(path)
    return int(info.size) if info.type == pafs.FileType.File else None


def vacuum_window(window: str, *, retention: timedelta) -> int:
    """Delete half-written segments of processes that died; their number. Whole segments are `fold`'s to delete."""
    fs, path = artifacts.filesystem(window)
    if fs.get_file_info(path).type == pafs.FileType.NotFound:
        return 0
    oldest = time.time() - retention.total_seconds()
    num = 0
    for info in fs.get_file_info(pafs.FileSelector(path, recursive=True)):
        is_leftover = info.type == pafs.FileType.File and info.base_name.startswith(".tmp-")
        if is_leftover and info.mtime is not None and info.mtime.timestamp() < oldest:
            fs.delete_file(info.path)
            num += 1
    return num


def _clean_log(table: EmbeddingTable, hours: int) -> int:
    """Checkpoint the log and delete commits older than a day (or the retention); the number of files that went."""
    handle = table.open()
    wanted = retention_settings(timedelta(hours=hours))
    if any(handle.metadata().configuration.get(name) != value for name, value in wanted.items()):
        handle.alter.set_table_properties(wanted)
        handle = table.open()
    before = set(artifacts.list_files(f"{table.uri}/_delta_log"))
    handle.create_checkpoint()
    handle.cleanup_metadata()
    return len(before.difference(artifacts.list_files(f"{table.uri}/_delta_log")))
