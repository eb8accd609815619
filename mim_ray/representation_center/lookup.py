"""Batched reads of the newest embedding of many items: a snapshot under an overlay of what came after it.

    lookup = EmbeddingLookup(Snapshot.open(uri), table=EmbeddingTable(…), window=f"{center}/window")
    lookup.refresh()                  # pick up new window segments; cheap, call it every few hundred milliseconds
    result = lookup.get(ids)          # result.matrix (n, D), result.found (n,), result.category (n,)

The overlay starts with the table's rows after the snapshot's Delta version and follows the window folder. Which row wins is
the table's rule: last by (content_at, commit_version, shard_id), so older content never hides newer.

*Unknown items* (never encoded, or deleted): `found` is False and the vector is all zeros, which makes every cosine 0.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray.data.ids import Ids
from mim_ray.representation_center.build import embedding_matrix
from mim_ray.representation_center.key_index import KeyIndex, build_key_index, string_array
from mim_ray.representation_center.snapshot import NO_TIME, Snapshot
from mim_ray.representation_center.table import EmbeddingTable, current_row_numbers, times
from mim_ray.representation_center.updates import WindowTail

NOT_COMMITTED = np.iinfo(np.int64).max  # commit_version of a segment that is not folded yet: after all commits


@dataclass(frozen=True)
class Embeddings:
    """Answer to a lookup of n ids.

    Attributes:
        matrix: (n, D) float32, zeros where not found. found: (n,) bool.
        category: (n,) strings; null unless the item came after the snapshot and its message named one.
    """

    matrix: np.ndarray
    found: np.ndarray
    category: pa.Array


class EmbeddingLookup:
    """Reads of one encoder version. `get` may run in many threads beside `refresh`; it sees one state throughout."""

    def __init__(self, snapshot: Snapshot, *, table: EmbeddingTable | None = None, window: str | None = None) -> None:
        self.snapshot = snapshot
        self._table = table
        self._tail = None if window is None else WindowTail(window, snapshot.encoder_version)
        self._runs: tuple[_Run, ...] = ()
        self._lock = threading.Lock()
        # Read the window first: what is folded and deleted in between is then in the table.
        segments = [] if self._tail is None else self._tail.poll()
        folded: set[str] = set()
        if table is not None and table.exists():
            self._add(table.current_rows(snapshot.encoder_version, newer_than=snapshot.delta_version, deleted=True))
            folded = table.contains(snapshot.encoder_version, [name for name, _ in segments])
        for name, rows in segments:
            if name not in folded:
                self._add(_as_uncommitted(name, rows))

    @property
    def encoder_version(self) -> str:
        return self.snapshot.encoder_version

    @property
    def num_overlay_rows(self) -> int:
        """Items that came after the snapshot."""
        return sum(len(run.index) for run in self._runs)

    def refresh(self) -> int:
        """Take in new window segments; the number of their rows."""
        if self._tail is None:
            return 0
        num = 0
        for name, rows in self._tail.poll():
            self._add(_as_uncommitted(name, rows))
            num += rows.num_rows
        return num

    def get(self, ids: Ids) -> Embeddings:
        """The newest embedding of each id; see the module for unknown ones."""
        keys = string_array(ids)
        runs = self._runs
        rows = self.snapshot.lookup(keys)
        matrix = self.snapshot.gather(rows)
        found = rows >= 0
        category = pa.nulls(len(keys), pa.string())
        if not runs:
            return Embeddings(matrix, found, category)
        at = np.full(len(keys), NO_TIME, np.int64)
        if self.snapshot.content_at is not None:
            at[found] = self.snapshot.content_at[rows[found]]
        commit = np.where(found, np.int64(self.snapshot.delta_version), np.int64(-2))
        for run in runs:  # oldest first, so that equals replace
            rows = run.index.find(keys)
            hit = np.flatnonzero(rows >= 0)
            rows = rows[hit]
            newer = (run.content_at[rows] > at[hit]) | (
                (run.content_at[rows] == at[hit]) & (run.commit_version[rows] >= commit[hit])
            )
            newer |= commit[hit] == -2
            hit, rows = hit[newer], rows[newer]
            if not len(hit):
                continue
            matrix[hit] = np.where(run.deleted[rows][:, None], np.float32(0), run.matrix[rows])
            found[hit] = ~run.deleted[rows]
            at[hit], commit[hit] = run.content_at[rows], run.commit_version[rows]
            mask = np.zeros(len(keys), bool)
            mask[hit] = True
            category = pc.replace_with_mask(category, pa.array(mask), run.category.take(pa.array(rows)))
        return Embeddings(matrix, found, category)

    def _add(self, rows: pa.Table) -> None:
        """Append a run and merge neighbours of similar size: n messages make about log n runs."""
        if not rows.num_rows:
            return
        with self._lock:
            runs = [*self._runs, _Run(rows, self.snapshot.width, self.snapshot.uri)]
            while len(runs) > 1 and len(runs[-2].index) <= 2 * len(runs[-1].index):
                last = runs.pop()
                runs[-1] = _Run(pa.concat_tables([runs[-1].rows, last.rows]), self.snapshot.width, self.snapshot.uri)
            self._runs = tuple(runs)


class _Run:
    """Some rows after the snapshot, one per item, ready to be looked up."""

    index: KeyIndex

    def __init__(self, rows: pa.Table, width: int, source: str) -> None:
        rows = rows.select(_COLUMNS).take(pa.array(current_row_numbers(rows, deleted=True)))
        self.index, order = build_key_index(rows["item_id"])
        self.rows = rows.take(pa.array(order)).combine_chunks()
        self.matrix = embedding_matrix(self.rows["embedding"], width, source)
        self.content_at = times(self.rows["content_at"])
        self.commit_version = self.rows["commit_version"].to_numpy()
        self.deleted = self.rows["deleted"].to_numpy()
        self.category = self.rows["category"].combine_chunks()


_COLUMNS = ["item_id", "embedding", "category", "content_at", "commit_version", "shard_id", "deleted"]


def _as_uncommitted(segment_id: str, rows: pa.Table) -> pa.Table:
    num = rows.num_rows
    rows = rows.append_column("commit_version", pa.repeat(pa.scalar(NOT_COMMITTED, pa.int64()), num))
    return rows.append_column("shard_id", pa.repeat(pa.scalar(segment_id), num)).select(_COLUMNS)
