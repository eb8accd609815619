"""Rows of the catalogue that are to be encoded, as if they were a slice of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray.data.schema import TIME
from mim_ray.data.sources import Shard
from mim_ray.representation_center.snapshot import NO_TIME


@dataclass(frozen=True)
class ChosenRows:
    """Some rows of a slice of the catalogue as if they were a slice of their own, with the times of their content as
    created_at.

    Attributes:
        rows: ascending numbers in the slice; None: all. content_at: (n,) int64 microseconds; None: `floor`, or created_at
            where that is later and not after `now`.
    """

    shard: Shard
    rows: np.ndarray | None
    content_at: np.ndarray | None
    floor: int
    now: int

    @property
    def source(self) -> str:
        return self.shard.source

    @property
    def num_rows(self) -> int:
        return self.shard.num_rows if self.rows is None else len(self.rows)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows in order."""
        table = self.shard.read(columns)
        if self.rows is not None:
            table = table.take(pa.array(self.rows))
        if "created_at" not in table.column_names:
            return table
        return with_times(table, self.content_at if self.content_at is not None else self._times(table))

    def _times(self, table: pa.Table) -> np.ndarray:
        created = pc.fill_null(pc.cast(table["created_at"], pa.int64()), NO_TIME).to_numpy()
        return np.maximum(np.where(created <= self.now, created, NO_TIME), self.floor)


@dataclass(frozen=True)
class Change:
    """Rows of one slice to be encoded.

    Attributes:
        details: item_id, content_hash, category, content_at, known (the item's content hash up to now), place (number among
            the slice's candidates) of each; None in a round of so many rows that they are read again instead.
        carried: the candidates' content in the object store, or None where there are no details.
    """

    chosen: ChosenRows
    details: pa.Table | None
    carried: Any

    def keep(self, which: np.ndarray) -> Change:
        """Some of the rows, as (n,) bool."""
        rows = np.arange(self.chosen.num_rows) if self.chosen.rows is None else self.chosen.rows
        times = self.chosen.content_at
        chosen = replace(self.chosen, rows=rows[which], content_at=None if times is None else times[which])
        return Change(chosen, None if self.details is None else self.details.filter(pa.array(which)), self.carried)


def with_times(table: pa.Table, content_at: np.ndarray) -> pa.Table:
    """Rows of the catalogue with created_at replaced."""
    place = table.column_names.index("created_at")
    return table.set_column(place, "created_at", pa.array(content_at, pa.int64()).cast(TIME))
