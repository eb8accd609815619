"""Batched reads of the newest embedding of many items: a snapshot under an overlay of what came after it.

    lookup = EmbeddingLookup(Snapshot.open(uri), table=EmbeddingTable(…), window=f"{center}/window")
    lookup.refresh()                  # pick up new window segments and commits; cheap, call it every 100 ms
    lookup.push(segment_id, rows)     # a segment that its writer sends at once
    result = lookup.get(ids)          # result.matrix (n, D), result.found (n,), result.category (n,)

Three sources bring rows after the snapshot: pushed segments, the window folder, and commits of the table (a refresh, or the
fold of segments that are known already, whose rows are not read again). Which row wins is the table's rule: last by
(content_at, commit_version, shard_id), a segment that is not folded yet being after all commits; so older content never
hides newer. A row enters the overlay only where it wins.

*Unknown items* (never encoded, or deleted): `found` is False and the vector is all zeros, which makes every cosine 0.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake.exceptions import DeltaError

from mim_ray.data.ids import hash_ids
from mim_ray.errors import ArtifactError, MimRayError
from mim_ray.representation_center.current_rows import current_row_numbers, times
from mim_ray.representation_center.data_files import segment_time
from mim_ray.representation_center.deletions import Deletions
from mim_ray.representation_center.key_index import shard_of, string_array
from mim_ray.representation_center.layered_rows import LayeredRows
from mim_ray.representation_center.log_rows import embedding_matrix
from mim_ray.representation_center.overlay import DTYPES, Overlay
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.table_tail import TableTail
from mim_ray.representation_center.updates import WindowTail

logger = logging.getLogger(__name__)
NOT_COMMITTED = np.iinfo(np.int64).max  # commit_version of a segment that is not folded yet: after all commits
STORAGE_PROBLEMS = (MimRayError, OSError, DeltaError)
"""What `EmbeddingLookup.refresh` may raise: storage is away for a moment, or a segment is damaged. Go on and try again."""
LATE_PUSH_S = 600.0  # an older segment is not taken from a push: the window or the table brings it

_COLUMNS = ["item_id", "embedding", "category", "content_at", "commit_version", "shard_id", "deleted"]
_BATCH_ROWS = 65_536


class EmbeddingLookup(LayeredRows):
    """Reads of one encoder version, kept up to date.

    Args:
        table, window: what may hold newer rows; None: the snapshot alone.
        shard: (s, S), the part of the keys that this reader holds (`shard_of`). Other keys are unknown to it.
        folder: where the overlay's files go, for readers in other processes; None: in memory.
        table_every_s: commits are looked for this often at most.

    `get` may run in many threads beside `refresh` and `push`.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        table: EmbeddingTable | None = None,
        window: str | None = None,
        shard: tuple[int, int] = (0, 1),
        folder: Path | None = None,
        table_every_s: float = 0.5,
    ) -> None:
        dtype = snapshot.dtype if snapshot.dtype in DTYPES else "float32"
        self.overlay = Overlay.create(folder, width=snapshot.width, dtype=dtype)
        super().__init__(snapshot, [self.overlay])
        self.shard = shard
        version = snapshot.encoder_version
        self._window = None if window is None else WindowTail(window, version)
        self._source = table
        self._table = None if table is None else TableTail(table, version, snapshot.delta_version)
        self._deletions = Deletions.until(table, version, snapshot.delta_version, shard)
        self._table_every_s, self._table_at = table_every_s, float("-inf")
        self._source_names: list[str] = []
        self._source_numbers: dict[str, int] = {}
        self._commits = np.empty(0, np.int64)  # of each source
        self._segments: set[str] = set()
        self.newest_ns = 0
        """When the newest segment that was taken in was stored (time_ns); 0 before the first."""
        self._waiting: list[tuple[str, pa.Table]] = []  # read from the window, not taken in yet
        self._lock = threading.Lock()
        self.catch_up()

    @property
    def encoder_version(self) -> str:
        return self.snapshot.encoder_version

    @property
    def num_overlay_rows(self) -> int:
        """Items that came after the snapshot."""
        return self.overlay.num_items

    @property
    def behind_s(self) -> float:
        """Seconds since the beginning of the last successful `refresh`: what was stored before that is in."""
        return (time.monotonic_ns() - self.overlay.synced_ns) / 1e9

    def refresh(self, *, now: bool = False) -> int:
        """Take in new window segments and commits; the number of rows that changed something.

        Args:
            now: look for commits however short ago that was done last.

        Raises:
            ArtifactError: a segment is damaged; all others are taken in.
            OSError, DeltaError: storage does not answer; the next call tries again.
        """
        num, damaged = self._refresh(now)
        if damaged is not None:
            raise damaged
        return num

    def catch_up(self) -> None:
        """`refresh`, where a damaged segment is told in the log only: a reader that does not start because of it is worse.

        Raises:
            OSError, DeltaError: storage does not answer.
        """
        _, damaged = self._refresh(now=True)
        if damaged is not None:
            logger.error("%s", damaged)

    def _refresh(self, now: bool) -> tuple[int, ArtifactError | None]:
        """Rows that changed something; what is wrong with a segment of the window."""
        with self._lock:
            started = time.monotonic_ns()
            # The window first: what is folded and deleted in between is then in the table.
            damaged = None
            if self._window is not None:
                try:
                    self._waiting += self._window.poll(known=self._segments)
                except ArtifactError as error:  # no reason to look away from all other items
                    damaged = error
            folded = set[str]()
            if self._waiting and self._table_at < 0 and self._source is not None and self._source.exists():
                # At the start: what is folded already is in the snapshot or comes with the commits.
                folded = self._source.contains(self.encoder_version, [name for name, _ in self._waiting])
            num = self._take_segments([(name, rows) for name, rows in self._waiting if name not in folded])
            self._waiting = []
            if self._table is not None and (now or started / 1e9 - self._table_at >= self._table_every_s):
                num += self._take_commits(self._table)
                self._table_at = started / 1e9
                self._segments |= folded
            self.overlay.synced(started)
            return num, damaged

    def push(self, segment_id: str, rows: pa.Table) -> int:
        """Take in a segment (rows of `updates.segment_rows`) that is stored already; the number of rows that changed something.

        One that is known, or older than `LATE_PUSH_S`, changes nothing.
        """
        if int(segment_id.partition("-")[0]) < time.time_ns() - int(LATE_PUSH_S * 1e9):
            return 0
        with self._lock:
            return self._take_segments([(segment_id, rows)])

    def _take_segments(self, segments: Sequence[tuple[str, pa.Table]]) -> int:
        new = [(name, rows) for name, rows in segments if name not in self._segments]
        num = 0
        for start in range(0, len(new), 1_000):
            part = new[start : start + 1_000]
            num += self._take(pa.concat_tables([_as_uncommitted(name, rows) for name, rows in part]))
        self._segments.update(name for name, _ in new)
        self.newest_ns = max([self.newest_ns, *(segment_time(name) for name, _ in new)])
        return num

    def _take_commits(self, tail: TableTail) -> int:
        num = 0
        for file in tail.poll():
            if file.batch_shard is None:
                segments = file.marks().segments
                known = segments & self._segments
                for name in known:
                    if (number := self._source_numbers.get(name)) is not None:
                        self._commits[number] = file.commit_version
                if file.is_realtime and len(known) == len(segments):
                    continue  # the fold of segments that were taken in before
                self._segments |= segments
            for rows in file.batches(_COLUMNS, _BATCH_ROWS):
                num += self._take(rows)
        tail.done()
        return num

    def _take(self, rows: pa.Table) -> int:
        """Append those of the rows (`_COLUMNS`) that are this shard's and win."""
        hashes = hash_ids(rows["item_id"])
        if self.shard[1] > 1:
            mine = np.flatnonzero(shard_of(hashes, self.shard[1]) == self.shard[0])
            rows, hashes = rows.take(pa.array(mine)), hashes[mine]
        if not rows.num_rows:
            return 0
        last = current_row_numbers(rows, deleted=True)
        rows, hashes = rows.take(pa.array(last)).combine_chunks(), hashes[last]
        keys = string_array(rows["item_id"])
        content_at, commit = times(rows["content_at"]), rows["commit_version"].to_numpy()
        sources = self._sources(rows["shard_id"], commit)
        matrix = embedding_matrix(rows["embedding"], self.snapshot.width, self.snapshot.uri)
        deleted = rows["deleted"].to_numpy()
        wins = np.ones(len(keys), bool)
        held = self.overlay.find(hashes, keys)
        here = np.flatnonzero(held >= 0)
        if len(here):
            wins[here] = self._newer(held[here], content_at[here], commit[here], sources[here])
        below = np.flatnonzero(held < 0)
        if len(below):
            wins[below] = self._above_snapshot(
                keys.take(pa.array(below)),
                hashes[below],
                content_at[below],
                commit[below],
                deleted[below],
                matrix[below],
            )
        winners = np.flatnonzero(wins)
        if len(winners):
            self.overlay.append(
                hashes[winners],
                keys.take(pa.array(winners)),
                matrix[winners],
                content_at=content_at[winners],
                sources=sources[winners],
                deleted=deleted[winners],
                category=rows["category"].combine_chunks().take(pa.array(winners)),
            )
        return len(winners)

    def _newer(self, held: np.ndarray, content_at: np.ndarray, commit: np.ndarray, sources: np.ndarray) -> np.ndarray:
        """Whether rows come after those that the overlay holds, by the table's rule."""
        held_at, held_sources = self.overlay.content_at(held), self.overlay.sources(held)
        held_commit = self._commits[held_sources]
        newer = (content_at > held_at) | ((content_at == held_at) & (commit > held_commit))
        for place in np.flatnonzero((content_at == held_at) & (commit == held_commit)):
            newer[place] = self._source_names[sources[place]] > self._source_names[held_sources[place]]
        return newer & ~((content_at == held_at) & (sources == held_sources))  # the same row again

    def _above_snapshot(
        self,
        keys: pa.Array,
        hashes: np.ndarray,
        content_at: np.ndarray,
        commit: np.ndarray,
        deleted: np.ndarray,
        matrix: np.ndarray,
    ) -> np.ndarray:
        """Whether rows come after those that the snapshot shows; a row that it shows already does not."""
        rows = self.snapshot.lookup(keys, hashes)
        known = rows >= 0
        held_at = self._deletions.content_at(hashes)  # of items that the snapshot does not show
        if self.snapshot.content_at is not None and len(self.snapshot.content_at):
            held_at = np.where(known, self.snapshot.content_at.take(rows, mode="clip"), held_at)
        newer = (commit > self.snapshot.delta_version) & (content_at >= held_at)
        if self.snapshot.content_at is None:
            newer |= (commit > self.snapshot.delta_version) & known
            return newer
        again = np.flatnonzero(newer & known & (content_at == held_at) & (commit != NOT_COMMITTED) & ~deleted)
        if len(again):  # compaction brings old rows with a later commit
            shown = self.snapshot.gather_stored(rows[again]).astype(np.float32)
            tolerance: np.ndarray | float = 0.0
            if self.snapshot.scales is not None:
                tolerance = self.snapshot.scales[rows[again]][:, None]
                shown *= tolerance
            stored = matrix[again].astype(DTYPES[self.overlay.dtype]).astype(np.float32)
            newer[again] = (np.abs(stored - shown) > tolerance).any(axis=1)
        return newer

    def _sources(self, shard_ids: pa.ChunkedArray, commit: np.ndarray) -> np.ndarray:
        """(n,) number of each row's shard id; the commit of each is noted."""
        encoded = pc.dictionary_encode(shard_ids.combine_chunks())
        encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
        numbers = np.empty(len(encoded.dictionary), np.int64)
        for place, name in enumerate(encoded.dictionary.to_pylist()):
            if name not in self._source_numbers:
                self._source_numbers[name] = len(self._source_names)
                self._source_names.append(name)
            numbers[place] = self._source_numbers[name]
        if len(self._source_names) > len(self._commits):
            self._commits = np.append(
                self._commits, np.full(len(self._source_names), NOT_COMMITTED)
            )  # doubles: constant cost a name
        indices = encoded.indices.to_numpy()
        self._commits[numbers[indices]] = commit
        return numbers[indices]


def _as_uncommitted(segment_id: str, rows: pa.Table) -> pa.Table:
    num = rows.num_rows
    rows = rows.append_column("commit_version", pa.repeat(pa.scalar(NOT_COMMITTED, pa.int64()), num))
    return rows.append_column("shard_id", pa.repeat(pa.scalar(segment_id), num)).select(_COLUMNS)
