"""MFM (paper Section 3.5): the append-only Delta log item_id -> MM embedding, and the one rule for an item's current row.

    table = EmbeddingTable(f"{center}/table").create()
    fragment = write_fragment(table.uri, rows, encoder_version=…, shard_id=…)     # anywhere, by any worker
    table.commit([fragment, …])                                                  # one Delta commit, by one committer
    table.current_rows(encoder_version)                                          # pa.Table, small tables

*Rule.* An item's current row is the last by (content_at, commit_version, shard_id); none if that row is `deleted`. Rows
without content_at are the oldest. `CURRENT_ROWS_SQL` says the same to any SQL engine that reads Delta.

*commit_version* is the Delta version that brought the row. It is a partition column: partition values stand in the log, not
in the data files, so the committer writes it in the commit itself. The commit names the version it will become and is
refused if another writer was faster (then it is made again), so the number is always right and readable by every client.

*Exactly once.* A shard's files enter in one commit together; before each attempt the committer asks the very version on
which it builds which shards are in. File names carry the shard id, so this reads the log only. Files that no commit names
(of a worker that died) do no harm.
"""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable, Schema
from deltalake.exceptions import CommitFailedError, TableNotFoundError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction

from mim_ray import artifacts
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.data_files import PARTITIONS, SCHEMA, DataFile, Fragment, Marks, write_fragment
from mim_ray.representation_center.snapshot import NO_TIME

CURRENT_ROWS_SQL = """
SELECT item_id, embedding, content_hash, encoder_version, content_at, origin, shard_id, category, commit_version
FROM (
    SELECT *, row_number() OVER (
        PARTITION BY encoder_version, item_id
        ORDER BY content_at DESC NULLS LAST, commit_version DESC, shard_id DESC
    ) AS place
    FROM item_embeddings
) AS ranked
WHERE place = 1 AND NOT deleted
"""

MAX_ATTEMPTS = 100


class PartlyCommittedError(ArtifactError):
    """A fragment holds shards of which some are in the table already; build it again without them."""


class EmbeddingTable:
    """The Delta log at `uri`. Holds no open state: every call sees the newest version."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._known: tuple[int, list[DataFile]] = (-1, [])
        self._marks: dict[str, Marks] = {}

    def create(self) -> EmbeddingTable:
        """Make the empty table if there is none."""
        if not self.exists():
            local = artifacts.local_path(self.uri)
            if local is not None:
                local.mkdir(parents=True, exist_ok=True)
            DeltaTable.create(self.uri, Schema.from_arrow(SCHEMA), mode="ignore", partition_by=PARTITIONS)
        return self

    def exists(self) -> bool:
        return DeltaTable.is_deltatable(self.uri)

    @property
    def version(self) -> int:
        """Newest Delta version."""
        return self.open().version()

    def commit(self, fragments: Sequence[Fragment]) -> int:
        """Make the fragments' rows visible, all in one Delta commit; shards that are in already are left out.

        Give all fragments of a shard in one call. Returns the table's version that shows them.

        Raises:
            PartlyCommittedError: a fragment of several shards, of which some are in.
        """
        for _ in range(MAX_ATTEMPTS):
            handle = self.open()
            missing = self._missing(handle, fragments)
            if not missing:
                return handle.version()
            version = handle.version() + 1
            if self._try(handle, [_add_action(fragment, version) for fragment in missing]):
                return version
        raise self._too_busy()

    def replace(self, old: Sequence[DataFile], new: Sequence[Fragment], *, commit_version: int) -> int | None:
        """Put `new` in the place of `old`, which hold the same current rows, in one Delta commit.

        Args:
            commit_version: that the rows of `new` get; the greatest of `old`.

        Returns:
            the table's version that shows it; None if some of `old` are not in the table any more.
        """
        for _ in range(MAX_ATTEMPTS):
            handle = self.open()
            if not {file.path for file in old} <= {file.path for file in self._files(handle)}:
                return None
            actions: list[AddAction | RemoveAction] = [_remove_action(file) for file in old]
            actions += [_add_action(fragment, commit_version, data_change=False) for fragment in new]
            if self._try(handle, actions):
                return handle.version() + 1
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
        return sorted({file.encoder_version for file in self._files(self.open())})

    def committed_shards(self, encoder_version: str) -> set[str]:
        """Batch shards of the encoder version that are in. Reads the log, and the footers of compacted files."""
        found: set[str] = set()
        for file in self._files(self.open()):
            if file.encoder_version == encoder_version and not file.is_realtime:
                found |= self.marks_of(file).shards
        return found

    def contains(self, encoder_version: str, shard_ids: Iterable[str]) -> set[str]:
        """Those of `shard_ids` that are in, batch or realtime. Files whose range of ids excludes them are not opened."""
        return self._contains(self.open(), encoder_version, set(shard_ids))

    def scan(self, encoder_version: str, *, newer_than: int = -1) -> tuple[int, list[DataFile]]:
        """(version, data files in a fixed order) of an encoder version, for readers that stream.

        Args:
            newer_than: only files with rows of later commits than this Delta version (a compacted one has older rows too).
        """
        handle = self.open()
        wanted = [
            file
            for file in self._files(handle)
            if file.encoder_version == encoder_version and file.commit_version > newer_than
        ]
        return handle.version(), sorted(wanted, key=lambda file: file.path)

    def files(self) -> list[DataFile]:
        """The data files of all encoder versions."""
        return list(self._files(self.open()))

    def current_rows(self, encoder_version: str, *, newer_than: int = -1, deleted: bool = False) -> pa.Table:
        """The current row of every item, as a table in memory (`build_snapshot` streams instead).

        Args:
            newer_than: look only at files with rows of later commits than this Delta version.
            deleted: keep items whose last row is a deletion, too.
        """
        _, files = self.scan(encoder_version, newer_than=newer_than)
        rows = pa.concat_tables([SCHEMA.empty_table(), *(file.read() for file in files)])
        return rows.take(pa.array(current_row_numbers(rows, deleted=deleted)))

    def open(self) -> DeltaTable:
        """A handle of the newest version.

        Raises:
            ArtifactError: there is no table.
        """
        try:
            return DeltaTable(self.uri)
        except TableNotFoundError:
            raise ArtifactError(f"{self.uri} is no Delta table. Run the extraction first.") from None

    def _files(self, handle: DeltaTable) -> list[DataFile]:
        """What the log names at the handle's version."""
        if self._known[0] != handle.version():
            log = pa.table(handle.get_add_actions(flatten=True))
            names = [
                "path",
                "size_bytes",
                "num_records",
                "partition.encoder_version",
                "partition.commit_version",
                "min.shard_id",
                "max.shard_id",
            ]
            nothing = [None] * log.num_rows
            columns = [log[name].to_pylist() if name in log.column_names else nothing for name in names]
            files = [
                DataFile(self.uri, path, size, num or 0, version, int(commit), None if first is None else (first, last))
                for path, size, num, version, commit, first, last in zip(*columns, strict=True)
            ]
            self._known = (handle.version(), files)
        return self._known[1]

    def _try(self, handle: DeltaTable, actions: Sequence[AddAction | RemoveAction]) -> bool:
        """Commit as the version after the handle's; False if another writer was faster."""
        try:
            handle.create_write_transaction(
                list(actions),
                mode="append",
                schema=Schema.from_arrow(SCHEMA),
                partition_by=PARTITIONS,
                commit_properties=CommitProperties(max_commit_retries=0),
            )
        except CommitFailedError:
            if self.version == handle.version():
                raise  # not a faster writer: the storage itself refused
            time.sleep(random.uniform(0, 0.05))
            return False
        return True

    def _too_busy(self) -> ArtifactError:
        text = f"{MAX_ATTEMPTS} commits in a row lost against other writers. Stop one of the jobs."
        return ArtifactError(f"{self.uri}: {text}")

    def _missing(self, handle: DeltaTable, fragments: Sequence[Fragment]) -> list[Fragment]:
        missing = []
        present = {
            version: self._contains(
                handle, version, {shard for f in fragments if f.encoder_version == version for shard in f.shard_ids}
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

    def _contains(self, handle: DeltaTable, encoder_version: str, shard_ids: set[str]) -> set[str]:
        found: set[str] = set()
        if shard_ids:
            first, last = min(shard_ids), max(shard_ids)
            for file in self._files(handle):
                if file.encoder_version == encoder_version and file.may_hold(first, last):
                    marks = self.marks_of(file)
                    found |= shard_ids & marks.shards | shard_ids & marks.segments
        return found

    def marks_of(self, file: DataFile) -> Marks:
        """The file's marks; footers are read once (files never change)."""
        if file.batch_shard is not None:
            return file.marks()
        if file.path not in self._marks:
            self._marks[file.path] = file.marks()
        return self._marks[file.path]


def current_row_numbers(rows: pa.Table, *, deleted: bool = False) -> np.ndarray:
    """The rule of this module: (m,) int64 ascending numbers of the current rows among `rows`.

    Args:
        rows: columns item_id, content_at, commit_version, shard_id, deleted of one encoder version.
        deleted: keep items whose last row is a deletion, too.
    """
    if not rows.num_rows:
        return np.empty(0, np.int64)
    items = _codes(rows["item_id"])
    order = np.lexsort((_ranks(rows["shard_id"]), rows["commit_version"].to_numpy(), times(rows["content_at"]), items))
    ordered = items[order]
    last = np.append(ordered[1:] != ordered[:-1], True)
    winners = np.sort(order[last])
    return winners if deleted else winners[~rows["deleted"].to_numpy()[winners]]


def times(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) int64 microseconds of a time column; NO_TIME for null."""
    return pc.fill_null(pc.cast(column, pa.int64()), NO_TIME).to_numpy()


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    return _dictionary(column).indices.to_numpy()


def _ranks(column: pa.ChunkedArray) -> np.ndarray:
    encoded = _dictionary(column)
    ranks = np.empty(len(encoded.dictionary), np.int64)
    ranks[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(ranks))
    return ranks[encoded.indices.to_numpy()]


def _dictionary(column: pa.ChunkedArray) -> pa.DictionaryArray:
    return pc.dictionary_encode(pa.concat_arrays([chunk.cast(pa.large_string()) for chunk in column.chunks]))


def _add_action(fragment: Fragment, version: int, data_change: bool = True) -> AddAction:
    stats: dict[str, object] = {"numRecords": fragment.num_rows}
    if fragment.shard_ids:
        stats |= {
            "minValues": {"shard_id": min(fragment.shard_ids)},
            "maxValues": {"shard_id": max(fragment.shard_ids)},
        }
    return AddAction(
        path=fragment.path,
        size=fragment.num_bytes,
        partition_values=_partition_values(fragment.encoder_version, version),
        modification_time=int(time.time() * 1000),
        data_change=data_change,
        stats=json.dumps(stats),
    )


def _remove_action(file: DataFile) -> RemoveAction:
    return RemoveAction(
        path=file.path,
        data_change=False,
        deletion_timestamp=int(time.time() * 1000),
        size=file.num_bytes,
        partition_values=_partition_values(file.encoder_version, file.commit_version),
    )


def _partition_values(encoder_version: str, commit_version: int) -> dict[str, str | None]:
    return {"encoder_version": encoder_version, "commit_version": str(commit_version)}
