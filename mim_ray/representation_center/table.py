"""MFM (paper Section 3.5): the append-only Delta log item_id -> MM embedding.

    table = EmbeddingTable(f"{center}/table").create()
    fragment = write_fragment(table.uri, rows, encoder_version=…, shard_id=…)     # anywhere, by any worker
    table.commit([fragment, …])                                                  # one Delta commit, by one committer
    table.current_rows(encoder_version)                                          # pa.Table, small tables

Which row of an item is current: current_rows.py. Merging the log's files: compaction.py.

*commit_version* is the Delta version that brought the row. It is a partition column: partition values stand in the log, not
in the data files, so the committer writes it in the commit itself. The commit names the version it will become and is
refused if another writer was faster (then it is made again), so the number is always right and readable by every client.

*Exactly once.* A shard's files enter in one commit together; before each attempt the committer asks the very version on
which it builds which shards are in. Marks of shards stand in the files' names and footers (data_files.py), so that this
reads the log and, for window segments and compacted files, a few footers. Files that no commit names (of a worker that
died) do no harm.

*Cost.* Each call looks for new commits (under a millisecond where there are none) and takes in only what they changed.
"""

from __future__ import annotations

import os
import random
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, Schema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction

from mim_ray import artifacts
from mim_ray.errors import ArtifactError
from mim_ray.object_store import delta_options, require_conditional_writes, storage_errors
from mim_ray.representation_center.current_rows import CURRENT_ROWS_SQL, current_row_numbers, times
from mim_ray.representation_center.data_files import PARTITIONS, SCHEMA, DataFile, Fragment, Marks, write_fragment
from mim_ray.representation_center.log_state import LogState, add_action, remove_action

__all__ = ["CURRENT_ROWS_SQL", "EmbeddingTable", "PartlyCommittedError", "current_row_numbers", "times"]

MAX_ATTEMPTS = 100
RETENTION = timedelta(days=7)
"""How long replaced files are kept, unless `vacuum` says otherwise."""
LOG_RETENTION = timedelta(days=1)
"""How long single commits are kept, for time travel: each call lists those that are there."""


class PartlyCommittedError(ArtifactError):
    """A fragment holds shards of which some are in the table already; build it again without them."""


class EmbeddingTable:
    """The Delta log at `uri`. Every call sees the newest version. Threads may share it; it travels by its URI."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._lock = threading.RLock()
        self._handle: DeltaTable | None = None
        self._commit: tuple[int, int] | None = None
        self._log = LogState(uri)

    def __reduce__(self) -> tuple[Any, ...]:
        return (EmbeddingTable, (self.uri,))

    def create(self) -> EmbeddingTable:
        """Make the empty table if there is none.

        Raises:
            StorageError: the object store has no conditional writes, or cannot be reached.
        """
        if not self.exists():
            require_conditional_writes(self.uri)
            local = artifacts.local_path(self.uri)
            if local is not None:
                local.mkdir(parents=True, exist_ok=True)
            with storage_errors(self.uri):
                DeltaTable.create(
                    self.uri,
                    Schema.from_arrow(SCHEMA),
                    mode="ignore",
                    partition_by=PARTITIONS,
                    configuration=dict(retention_settings(RETENTION)),
                    storage_options=delta_options(self.uri),
                )
        return self

    def exists(self) -> bool:
        if self._commit is not None and self._last_commit() == self._commit:
            return True
        with storage_errors(self.uri):
            return DeltaTable.is_deltatable(self.uri, delta_options(self.uri))

    def open(self) -> DeltaTable:
        """A handle of the newest version, the caller's own.

        Raises:
            ArtifactError: there is no table.
        """
        try:
            with storage_errors(self.uri):
                return DeltaTable(self.uri, storage_options=delta_options(self.uri))
        except TableNotFoundError:
            raise ArtifactError(f"{self.uri} is no Delta table. Run the extraction first.") from None

    @property
    def version(self) -> int:
        """Newest Delta version."""
        return self._newest().version

    def commit(self, fragments: Sequence[Fragment]) -> int:
        """Make the fragments' rows visible, all in one Delta commit; shards that are in already are left out.

        Give all fragments of a shard in one call. Returns the table's version that shows them.

        Raises:
            PartlyCommittedError: a fragment of several shards, of which some are in.
        """
        for _ in range(MAX_ATTEMPTS):
            with self._lock:
                log = self._newest()
                missing = self._missing(log, fragments)
                if not missing:
                    return log.version
                version = log.version + 1
                if self._try([add_action(fragment, version) for fragment in missing]):
                    return version
            time.sleep(random.uniform(0, 0.05))
        raise self._too_busy()

    def replace(self, old: Sequence[DataFile], new: Sequence[Fragment], *, commit_version: int) -> int | None:
        """Put `new` in the place of `old`, which hold the same current rows, in one Delta commit.

        Args:
            commit_version: that the rows of `new` get; the greatest of `old`.

        Returns:
            the table's version that shows it; None if some of `old` are not in the table any more.
        """
        for _ in range(MAX_ATTEMPTS):
            with self._lock:
                log = self._newest()
                if not {file.path for file in old} <= log.files.keys():
                    return None
                version = log.version + 1
                actions: list[AddAction | RemoveAction] = [remove_action(file) for file in old]
                actions += [add_action(fragment, commit_version, replaces=old) for fragment in new]
                if self._try(actions):
                    return version
            time.sleep(random.uniform(0, 0.05))
        raise self._too_busy()

    def append(
        self, rows: pa.Table, *, encoder_version: str, shard_id: str | None = None, origin: str = "batch"
    ) -> int:
        """Write and commit rows of one shard (see `write_fragment`); for small writers and tests."""
        shard = uuid.uuid4().hex if shard_id is None else shard_id
        fragment = write_fragment(self.uri, rows, encoder_version=encoder_version, shard_id=shard, origin=origin)
        return self.commit([fragment])

    def encoder_versions(self) -> list[str]:
        """Encoder versions with at least one file."""
        with self._lock:
            return sorted({file.encoder_version for file in self._newest().files.values()})

    def committed_shards(self, encoder_version: str) -> set[str]:
        """Batch shards of the encoder version that are in. Reads the log, and the footers of compacted files."""
        with self._lock:
            return self._newest().shards(encoder_version)

    def contains(self, encoder_version: str, shard_ids: Iterable[str]) -> set[str]:
        """Those of `shard_ids` that are in, batch or realtime. Files whose range of ids excludes them are not opened."""
        with self._lock:
            return self._newest().contains(encoder_version, shard_ids)

    def marks_of(self, file: DataFile) -> Marks:
        """What a file accounts for."""
        with self._lock:
            return self._log.marks_of(file)

    def scan(self, encoder_version: str, *, newer_than: int = -1) -> tuple[int, list[DataFile]]:
        """(version, data files in a fixed order) of an encoder version, for readers that stream.

        Args:
            newer_than: only files with rows of later commits than this Delta version (a compacted one has older rows too).
        """
        with self._lock:
            log = self._newest()
            wanted = [file for file in log.of(encoder_version) if file.commit_version > newer_than]
            return log.version, sorted(wanted, key=lambda file: file.path)

    def files(self) -> list[DataFile]:
        """The data files of all encoder versions."""
        with self._lock:
            return list(self._newest().files.values())

    def current_rows(self, encoder_version: str, *, newer_than: int = -1, deleted: bool = False) -> pa.Table:
        """The current row of every item, as a table in memory (`build_snapshot` streams instead).

        Args:
            newer_than: look only at files with rows of later commits than this Delta version.
            deleted: keep items whose last row is a deletion, too.
        """
        _, files = self.scan(encoder_version, newer_than=newer_than)
        rows = pa.concat_tables([SCHEMA.empty_table(), *(file.read() for file in files)])
        return rows.take(pa.array(current_row_numbers(rows, deleted=deleted)))

    def _newest(self) -> LogState:
        """The files at the newest version. What uses more than its version holds the lock."""
        with self._lock:
            if self._handle is not None and self._last_commit() == self._commit:
                try:
                    self._handle.update_incremental()
                except (DeltaError, OSError):
                    self._handle = None
            else:  # the log was cleaned, or this is another table, made anew in the same folder
                self._handle = None
            if self._handle is None:
                self._handle, self._log = self.open(), LogState(self.uri)
            self._log.follow(self._handle)
            self._commit = self._last_commit()
            return self._log

    def _last_commit(self) -> tuple[int, int] | None:
        """What tells the file of the commit that was seen last from another file of its name; None on object stores."""
        log = artifacts.local_path(f"{self.uri}/_delta_log")
        if log is not None:
            with suppress(OSError):
                status = os.stat(log / f"{self._log.version:020d}.json")
                return status.st_ino, status.st_mtime_ns
        return None

    def _try(self, actions: Sequence[AddAction | RemoveAction]) -> bool:
        """Commit as the version after the handle's; False if another writer was faster. The caller holds the lock."""
        assert self._handle is not None
        version = self._log.version
        try:
            self._handle.create_write_transaction(
                list(actions),
                mode="append",
                schema=Schema.from_arrow(SCHEMA),
                partition_by=PARTITIONS,
                commit_properties=CommitProperties(max_commit_retries=0),
            )
        except CommitFailedError:
            if self._newest().version == version:
                raise  # not a faster writer: the storage itself refused
            return False
        log = artifacts.local_path(f"{self.uri}/_delta_log")
        if log is not None:  # delta-rs leaves this to the system; what a commit names may be deleted elsewhere soon
            artifacts.sync(log / f"{version + 1:020d}.json")
            artifacts.sync(log)
        return True

    def _too_busy(self) -> ArtifactError:
        text = f"{MAX_ATTEMPTS} commits in a row lost against other writers. Stop one of the jobs."
        return ArtifactError(f"{self.uri}: {text}")

    def _missing(self, log: LogState, fragments: Sequence[Fragment]) -> list[Fragment]:
        missing = []
        present = {
            version: log.contains(
                version, {shard for f in fragments if f.encoder_version == version for shard in f.shard_ids}
            )
            for version in {fragment.encoder_version for fragment in fragments}
        }
        for fragment in fragments:
            inside = present[fragment.encoder_version] & set(fragment.shard_ids)
            if not inside:
                missing.append(fragment)
            elif len(inside) < len(set(fragment.shard_ids)):
                raise PartlyCommittedError(
                    f"{self.uri}: {len(inside)} of the shards in {fragment.path} are in already."
                )
        return missing


def retention_settings(retention: timedelta) -> dict[str, str]:
    """Delta's table properties for keeping the names of replaced files this long, in whole hours. delta-rs deletes older
    commits itself when it writes a checkpoint, every 100 commits."""
    hours = -(-retention // timedelta(hours=1))
    log_hours = min(hours, LOG_RETENTION // timedelta(hours=1))
    return {
        "delta.deletedFileRetentionDuration": f"interval {hours} hours",
        "delta.logRetentionDuration": f"interval {log_hours} hours",
        "delta.enableExpiredLogCleanup": "true",
    }
