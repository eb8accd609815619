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
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from deltalake import DeltaTable, Schema
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, CommitProperties

from mim_ray import artifacts
from mim_ray.data.schema import ITEM_EMBEDDINGS
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.snapshot import NO_TIME

PARTITIONS = ["encoder_version", "commit_version"]
SCHEMA = pa.schema([*ITEM_EMBEDDINGS.schema, pa.field("category", pa.string()), pa.field("commit_version", pa.int64())])
"""SPEC's columns; `category` of a new item, which the catalogue may not know yet; `commit_version` as above."""

FILE_SCHEMA = pa.schema([field for field in SCHEMA if field.name not in PARTITIONS])

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


@dataclass(frozen=True)
class Fragment:
    """A data file below the table that no commit names yet. `path` is relative to the table; JSON-able by asdict."""

    path: str
    num_bytes: int
    num_rows: int
    encoder_version: str
    shard_ids: Sequence[str]


class EmbeddingTable:
    """The Delta log at `uri`. Holds no open state: every call sees the newest version."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._known: tuple[int, dict[str, set[str]]] = (-1, {})

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
        return self._load().version()

    def commit(self, fragments: Sequence[Fragment]) -> int:
        """Make the fragments' rows visible, all in one Delta commit; shards that are in already are left out.

        Give all fragments of a shard in one call. Returns the table's version that shows them.

        Raises:
            PartlyCommittedError: a fragment of several shards, of which some are in.
        """
        for _ in range(MAX_ATTEMPTS):
            handle = self._load()
            missing = self._missing(handle, fragments)
            if not missing:
                return handle.version()
            version = handle.version() + 1
            try:
                handle.create_write_transaction(
                    [_add_action(fragment, version) for fragment in missing],
                    mode="append",
                    schema=Schema.from_arrow(SCHEMA),
                    partition_by=PARTITIONS,
                    commit_properties=CommitProperties(max_commit_retries=0),
                )
            except CommitFailedError:
                if self.version == handle.version():
                    raise  # not a faster writer: the storage itself refused
                time.sleep(random.uniform(0, 0.05))
                continue
            self._remember(version, missing)
            return version
        raise ArtifactError(
            f"{self.uri}: {MAX_ATTEMPTS} commits in a row lost against other writers. Stop one of the jobs."
        )

    def append(
        self, rows: pa.Table, *, encoder_version: str, shard_id: str | None = None, origin: str = "batch"
    ) -> int:
        """Write and commit rows of one shard (see `write_fragment`); for small writers and tests."""
        shard = uuid.uuid4().hex if shard_id is None else shard_id
        fragment = write_fragment(self.uri, rows, encoder_version=encoder_version, shard_id=shard, origin=origin)
        return self.commit([fragment])

    def encoder_versions(self) -> list[str]:
        """Encoder versions with at least one file."""
        return sorted({_version_of(path) for path in self._paths(self._load())})

    def committed_files(self, encoder_version: str) -> list[str]:
        """Paths, relative to the table, of the encoder version's data files."""
        return sorted(path for path in self._paths(self._load()) if _version_of(path) == encoder_version)

    def committed_shards(self, encoder_version: str) -> set[str]:
        """Batch shards of the encoder version that are in. Reads the log only."""
        return set(self._shards(self._load()).get(encoder_version, set()))

    def contains(self, encoder_version: str, shard_ids: Iterable[str]) -> set[str]:
        """Those of `shard_ids` that are in, batch or realtime. Files whose range of ids excludes them are not opened."""
        return self._contains(self._load(), encoder_version, set(shard_ids))

    def scan(
        self, encoder_version: str, *, newer_than: int = -1
    ) -> tuple[int, list[pads.ParquetFileFragment], pa.Schema]:
        """(version, data files in a fixed order, schema) of an encoder version, for readers that stream.

        Args:
            newer_than: only files of later commits than this Delta version.
        """
        handle = self._load()
        dataset = handle.to_pyarrow_dataset()
        wanted = (pc.field("encoder_version") == encoder_version) & (pc.field("commit_version") > newer_than)
        return handle.version(), sorted(dataset.get_fragments(wanted), key=lambda file: file.path), dataset.schema

    def current_rows(self, encoder_version: str, *, newer_than: int = -1, deleted: bool = False) -> pa.Table:
        """The current row of every item, as a table in memory (`build_snapshot` streams instead).

        Args:
            newer_than: look only at rows of later commits than this Delta version.
            deleted: keep items whose last row is a deletion, too.
        """
        _, files, schema = self.scan(encoder_version, newer_than=newer_than)
        tables = [file.to_table(schema=schema) for file in files]
        rows = pa.concat_tables(tables).select(SCHEMA.names) if tables else SCHEMA.empty_table()
        return rows.take(pa.array(current_row_numbers(rows, deleted=deleted)))

    def _load(self) -> DeltaTable:
        if not self.exists():
            raise ArtifactError(f"{self.uri} is no Delta table. Run the extraction first.")
        return DeltaTable(self.uri)

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
        found = shard_ids & self._shards(handle).get(encoder_version, set())
        rest = sorted(shard_ids - found)
        if rest and any(_shard_of(path) is None for path in self._paths(handle)):
            wanted = (
                (pc.field("encoder_version") == encoder_version)
                & (pc.field("shard_id") >= rest[0])
                & (pc.field("shard_id") <= rest[-1])
            )
            for file in handle.to_pyarrow_dataset().get_fragments(wanted):  # by the log's statistics
                if _shard_of(file.path) is None:
                    found |= set(rest) & set(pc.unique(file.to_table(columns=["shard_id"])["shard_id"]).to_pylist())
        return found

    def _shards(self, handle: DeltaTable) -> dict[str, set[str]]:
        """Batch shards by encoder version at the handle's version; kept until somebody else commits."""
        version = handle.version()
        if self._known[0] != version:
            shards: dict[str, set[str]] = {}
            for path in self._paths(handle):
                shard = _shard_of(path)
                if shard is not None:
                    shards.setdefault(_version_of(path), set()).add(shard)
            self._known = (version, shards)
        return self._known[1]

    def _remember(self, version: int, fragments: Sequence[Fragment]) -> None:
        known, shards = self._known
        if known == version - 1:
            for fragment in fragments:
                if _shard_of(fragment.path) is not None:
                    shards.setdefault(fragment.encoder_version, set()).update(fragment.shard_ids)
            self._known = (version, shards)

    @staticmethod
    def _paths(handle: DeltaTable) -> list[str]:
        return pa.table(handle.get_add_actions())["path"].to_pylist()


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
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=["origin", "shard_id", "category"])
    content = sink.getvalue()
    artifacts.write_bytes(f"{table_uri}/{path}", content.to_pybytes())
    return Fragment(path, content.size, num, encoder_version, shard_ids)


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


def _add_action(fragment: Fragment, version: int) -> AddAction:
    stats: dict[str, object] = {"numRecords": fragment.num_rows}
    if fragment.num_rows:
        stats |= {
            "minValues": {"shard_id": min(fragment.shard_ids)},
            "maxValues": {"shard_id": max(fragment.shard_ids)},
        }
    return AddAction(
        path=fragment.path,
        size=fragment.num_bytes,
        partition_values={"encoder_version": fragment.encoder_version, "commit_version": str(version)},
        modification_time=int(time.time() * 1000),
        data_change=True,
        stats=json.dumps(stats),
    )


def _version_of(path: str) -> str:
    return path.partition("/")[0].removeprefix("encoder_version=")


def _shard_of(path: str) -> str | None:
    """The shard id in a batch file's name, None for a file of window segments."""
    name = path.rpartition("/")[2]
    return name.removeprefix("batch-").rpartition("-")[0] if name.startswith("batch-") else None
