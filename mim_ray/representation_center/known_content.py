"""Which content each item has now, as a hash: so that the same content sent again is not encoded again.

The snapshot answers for what it shows (mapped, nothing is loaded); the table's rows after it and the window segments are held
beside it, about 200 bytes for each item that changed since the snapshot. Who stays open for long asks now and then whether
there is a newer snapshot (`opened_again`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray import artifacts
from mim_ray.data.ids import Ids, hash_ids
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.current_rows import current_row_numbers, times
from mim_ray.representation_center.data_files import SCHEMA, DataFile
from mim_ray.representation_center.key_index import KeyIndex, build_key_index, string_array
from mim_ray.representation_center.snapshot import NO_TIME, Snapshot
from mim_ray.representation_center.snapshot_files import read_manifest
from mim_ray.representation_center.snapshot_line import current_snapshot
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.table_tail import TableTail
from mim_ray.representation_center.updates import WindowTail

logger = logging.getLogger(__name__)
_NOT_COMMITTED = np.iinfo(np.int64).max  # of a segment that is not folded yet: after all commits
_COLUMNS = ["item_id", "content_hash", "content_at", "commit_version", "shard_id", "deleted", "category"]


class Content(NamedTuple):
    """One item's current content.

    Attributes:
        at: microseconds; NO_TIME where there is no content or its time is not known.
        hash: None where there is no content.
        category: None: it names none, or that is not known.
        category_known: not where a snapshot alone shows the item, which holds no categories.
    """

    at: int
    hash: str | None
    category: str | None = None
    category_known: bool = False


@dataclass(frozen=True)
class Known:
    """What is known of n items.

    Attributes:
        hashes: (n,) content hash; null where unknown or deleted.
        content_at: (n,) int64 microseconds of that content or deletion; NO_TIME where there is none.
        found: (n,) bool: there is a row, were it a deletion.
    """

    hashes: pa.Array
    content_at: np.ndarray
    found: np.ndarray


class KnownContent:
    """Content of the current rows of an encoder version, followed through the window and the table's commits.

    Args:
        line: of the encoder version's snapshots; there may be none yet.
    """

    def __init__(self, table: EmbeddingTable, window: str, encoder_version: str, *, line: str) -> None:
        self.encoder_version = encoder_version
        self._source = (table, window, line)
        self._tail = WindowTail(window, encoder_version)
        self._commits: TableTail | None = None
        self._problem = ""
        self._newer: dict[str, tuple[int, int, str | None, str | None]] = {}  # item -> time, commit, hash, category
        self.refresh()  # before the table is read: a segment that is folded in between is seen in either
        self.snapshot = _open(line)
        version, self._rows = _Rows.after(table, encoder_version, self.snapshot)
        self._commits = TableTail(table, encoder_version, version)

    @property
    def is_empty(self) -> bool:
        """Nothing was ever stored of this encoder version."""
        shown = 0 if self.snapshot is None else self.snapshot.num_rows
        return not (shown or len(self._rows.index) or self._newer)

    def refresh(self) -> None:
        """Take in what any process has added to the window or committed (a refresh's deletions, say).

        A damaged segment is left out; the others are taken in.
        """
        try:
            segments = self._tail.poll()
        except ArtifactError as error:
            segments = []
            if str(error) != self._problem:
                logger.error("%s", error)
            self._problem = str(error)
        for _, rows in segments:
            self.add(rows)
        if self._commits is not None:
            for file in self._commits.poll():
                for rows in file.batches(_COLUMNS):
                    self.add(rows)
            self._commits.done()

    def opened_again(self) -> KnownContent | None:
        """The same upon the newest snapshot, where that shows later commits than this one's; else None. This one stays usable,
        and what is added to it meanwhile the other one sees with its next `refresh`, if it is stored."""
        table, window, line = self._source
        shown = -1 if self.snapshot is None else self.snapshot.delta_version
        state = current_snapshot(line)
        if state is None or read_manifest(f"{line}/{state}")["delta_version"] <= shown:
            return None
        return KnownContent(table, window, self.encoder_version, line=line)

    def add(self, rows: pa.Table) -> None:
        """Take in rows of a window segment, or of the table."""
        hashes = [
            None if deleted else content
            for deleted, content in zip(rows["deleted"].to_pylist(), rows["content_hash"].to_pylist(), strict=True)
        ]
        in_table = "commit_version" in rows.column_names
        commits = rows["commit_version"].to_pylist() if in_table else [_NOT_COMMITTED] * len(rows)
        columns = (rows["item_id"].to_pylist(), times(rows["content_at"]).tolist(), commits, hashes)
        for item_id, at, commit, content, named in zip(*columns, rows["category"].to_pylist(), strict=True):
            if (at, commit) >= self._newer.get(item_id, (NO_TIME, -1))[:2]:
                category = None if named is None else sys.intern(named)  # items have categories in common
                self._newer[item_id] = (at, commit, content, category)

    def look_up(self, item_ids: Ids) -> Known:
        """What is known of these items."""
        keys = string_array(item_ids)
        hashes = pa.nulls(len(keys), pa.string())
        content_at = np.full(len(keys), NO_TIME, np.int64)
        found = np.zeros(len(keys), bool)
        if self.snapshot is not None:
            rows = self.snapshot.lookup(keys)
            found = rows >= 0
            hashes = self.snapshot.content_hashes(rows)
            if self.snapshot.content_at is not None and found.any():
                content_at[found] = self.snapshot.content_at[rows[found]]
        rows = self._rows.index.find(keys)
        hit = rows >= 0
        hit[hit] = self._rows.content_at[rows[hit]] >= content_at[hit]
        if hit.any():
            content_at[hit] = self._rows.content_at[rows[hit]]
            hashes = pc.replace_with_mask(hashes, pa.array(hit), self._rows.hashes.take(pa.array(rows[hit])))
            found |= hit
        if self._newer:
            hashes = self._with_newer(keys, hashes, content_at, found)
        return Known(hashes, content_at, found)

    def current(self, item_ids: Sequence[str]) -> list[Content]:
        """Each item's current content."""
        keys = pa.array(item_ids, pa.large_string())
        known = self.look_up(keys)
        found = zip(
            item_ids, known.content_at.tolist(), known.hashes.to_pylist(), self._rows.index.find(keys), strict=True
        )
        return [Content(at, content, *self._category(item_id, at, row)) for item_id, at, content, row in found]

    def _category(self, item_id: str, at: int, row: int) -> tuple[str | None, bool]:
        """
        Args:
            at: of the item's current content: who tells of that tells of its category. row: the item's in `_rows`, or -1.
        """
        newer = self._newer.get(item_id)
        if newer is not None and newer[0] >= at:
            return newer[3], True
        if row >= 0 and self._rows.content_at[row] >= at:
            return self._rows.categories[int(row)].as_py(), True
        return None, False

    def id_hashes(self) -> np.ndarray:
        """Ascending uint64 hashes of the ids of all items that have content (mapped, if nothing is newer than the snapshot)."""
        shown = np.empty(0, np.uint64) if self.snapshot is None else self.snapshot.hashes
        more = [hash_ids(ids) for ids in self._newer_ids() if len(ids)]
        return np.union1d(shown, np.concatenate(more)) if more else shown

    def ids_of(self, hashes: np.ndarray) -> pa.Array:
        """Ids of the known items with these hashes (ascending uint64); unknown hashes give none."""
        found = [pa.array([], pa.large_string())]
        if self.snapshot is not None and self.snapshot.num_rows:
            shown = self.snapshot.hashes
            first, end = np.searchsorted(shown, hashes, "left"), np.searchsorted(shown, hashes, "right")
            while (first < end).any():
                found.append(self.snapshot.ids.take(pa.array(first[first < end])))
                first = np.minimum(first + 1, end)
        for ids in self._newer_ids():
            if len(ids):
                found.append(ids.filter(pa.array(np.isin(hash_ids(ids), hashes))))
        return pc.unique(pa.concat_arrays(found))

    def _newer_ids(self) -> Iterator[pa.Array]:
        yield self._rows.index.ids
        yield pa.array(list(self._newer), pa.large_string())

    def _with_newer(self, keys: pa.Array, hashes: pa.Array, content_at: np.ndarray, found: np.ndarray) -> pa.Array:
        changed = np.zeros(len(keys), bool)
        values = []
        for place, item_id in enumerate(keys.to_pylist()):
            newer = self._newer.get(item_id)
            if newer is not None and (newer[0] >= content_at[place] or not found[place]):
                content_at[place], found[place], changed[place] = newer[0], True, True
                values.append(newer[2])
        return pc.replace_with_mask(hashes, pa.array(changed), pa.array(values, pa.string())) if values else hashes


class _Rows:
    """The newest rows of some items, deletions too."""

    def __init__(self, rows: pa.Table) -> None:
        rows = rows.take(pa.array(current_row_numbers(rows, deleted=True)))
        self.index: KeyIndex
        self.index, order = build_key_index(rows["item_id"])
        rows = rows.take(pa.array(order)).combine_chunks()
        hashes = pc.if_else(rows["deleted"], pa.scalar(None, pa.string()), rows["content_hash"])
        self.hashes = pa.concat_arrays(hashes.chunks) if hashes.num_chunks else pa.array([], pa.string())
        self.content_at = times(rows["content_at"])
        self.categories: pa.ChunkedArray = rows["category"]

    @classmethod
    def after(cls, table: EmbeddingTable, encoder_version: str, snapshot: Snapshot | None) -> tuple[int, _Rows]:
        """The table's version, and its rows that the snapshot does not show."""
        nothing = pa.schema([SCHEMA.field(name) for name in _COLUMNS]).empty_table()
        after = -1 if snapshot is None else snapshot.delta_version
        if not table.exists():
            return after, cls(nothing)
        version, files = table.scan(encoder_version, newer_than=after)
        return version, cls(pa.concat_tables([nothing, *(part for file in files for part in _unshown(file, snapshot))]))


def _unshown(file: DataFile, snapshot: Snapshot | None) -> Iterator[pa.Table]:
    """A file's rows, without those of a compacted one that the snapshot has."""
    for rows in file.batches(_COLUMNS):
        if snapshot is not None and snapshot.num_rows:
            shown = snapshot.lookup(rows["item_id"])
            same = pc.fill_null(pc.equal(snapshot.content_hashes(shown), rows["content_hash"].combine_chunks()), False)
            keep = ~np.asarray(same, bool) | rows["deleted"].to_numpy()
            if snapshot.content_at is not None:
                keep |= snapshot.content_at[np.maximum(shown, 0)] != times(rows["content_at"])
            rows = rows.filter(pa.array(keep))
        yield rows


def _open(line: str) -> Snapshot | None:
    return Snapshot.open(line, verify=False) if artifacts.exists(f"{line}/current.json") else None
