"""Rows of the catalogue that are to be encoded, as if they were a table of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from mim_ray.data.schema import TIME
from mim_ray.data.sources import Shard
from mim_ray.representation_center.snapshot import NO_TIME


@dataclass(frozen=True)
class ChosenRows:
    """Some rows of a slice of the catalogue, with the times of their content as created_at.

    Attributes:
        rows: ascending numbers in the slice; None: all. content_at: (n,) int64 microseconds; None: `floor`, or created_at
            where that is later and not after `now`.
        carried: where their content is in the object store, of all columns, as rows `places` of a table; None: it is read.
    """

    shard: Shard
    rows: np.ndarray | None
    content_at: np.ndarray | None
    floor: int
    now: int
    carried: Any = None
    places: np.ndarray | None = None

    @property
    def num_rows(self) -> int:
        return self.shard.num_rows if self.rows is None else len(self.rows)

    def keep(self, which: np.ndarray) -> ChosenRows:
        """Some of the rows, as (n,) bool."""
        rows = np.arange(self.num_rows) if self.rows is None else self.rows
        times = None if self.content_at is None else self.content_at[which]
        places = None if self.places is None else self.places[which]
        return replace(self, rows=rows[which], content_at=times, places=places)

    def without_content(self) -> ChosenRows:
        """The same rows, to be read again."""
        return self if self.carried is None else replace(self, carried=None, places=None)

    def batches(self, columns: Sequence[str], rows: int) -> Iterator[pa.Table]:
        """The rows in order, in pieces."""
        done = 0
        for piece in self._pieces(columns, rows):
            if piece.num_rows:
                done += piece.num_rows
                yield self._with_times(piece, done - piece.num_rows)

    def _pieces(self, columns: Sequence[str], rows: int) -> Iterator[pa.Table]:
        if self.carried is not None:
            yield ray.get(self.carried).select(list(columns)).take(pa.array(self.places))
            return
        start = 0
        for piece in self.shard.batches(columns, rows=rows):
            if self.rows is not None:
                first, end = np.searchsorted(self.rows, [start, start + piece.num_rows])
                yield piece.take(pa.array(self.rows[first:end] - start))
            else:
                yield piece
            start += piece.num_rows

    def _with_times(self, piece: pa.Table, first: int) -> pa.Table:
        if "created_at" not in piece.column_names:
            return piece
        if self.content_at is not None:
            times = self.content_at[first : first + piece.num_rows]
        else:
            created = pc.fill_null(pc.cast(piece["created_at"], pa.int64()), NO_TIME).to_numpy()
            times = np.maximum(np.where(created <= self.now, created, NO_TIME), self.floor)
        place = piece.column_names.index("created_at")
        return piece.set_column(place, "created_at", pa.array(times, pa.int64()).cast(TIME))


@dataclass(frozen=True)
class Gathered:
    """Chosen rows of several slices one after another; a source of rows for a plan's unit."""

    parts: tuple[ChosenRows, ...]

    @property
    def source(self) -> str:
        return self.parts[0].shard.source

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)

    def batches(
        self, columns: Sequence[str], *, start: int = 0, stop: int | None = None, rows: int = 65_536
    ) -> Iterator[pa.Table]:
        """Rows start … stop in pieces of `rows` rows, the last one smaller."""
        end = self.num_rows if stop is None else stop
        waiting: list[pa.Table] = []
        for piece in self._range(columns, start, end, rows):
            waiting.append(piece)
            while sum(table.num_rows for table in waiting) >= rows:
                joined = pa.concat_tables(waiting)
                yield joined.slice(0, rows)
                waiting = [joined.slice(rows)]
        if sum(table.num_rows for table in waiting):
            yield pa.concat_tables(waiting)

    def _range(self, columns: Sequence[str], start: int, end: int, rows: int) -> Iterator[pa.Table]:
        at = 0
        for part in self.parts:
            if at + part.num_rows > start and at < end:
                place = at
                for piece in part.batches(columns, rows):
                    first, last = max(start - place, 0), min(end - place, piece.num_rows)
                    place += piece.num_rows
                    if first < last:
                        yield piece.slice(first, last - first)
                    if place >= end:
                        return
            at += part.num_rows
