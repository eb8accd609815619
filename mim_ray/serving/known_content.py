"""Which content each item has now, as a hash: so that the same content sent again is not encoded again."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from mim_ray.data.ids import IdIndex
from mim_ray.data.schema import TIME
from mim_ray.representation_center.snapshot import NO_TIME
from mim_ray.representation_center.table import EmbeddingTable, current_row_numbers, times
from mim_ray.representation_center.updates import WindowTail

_COLUMNS = ["item_id", "content_hash", "content_at", "commit_version", "shard_id", "deleted"]


class KnownContent:
    """Content hashes of the table's current rows when it was opened, and of the window segments since.

    Holds about 100 bytes per item of the table.
    """

    def __init__(self, table: EmbeddingTable, window: str, encoder_version: str) -> None:
        self._tail = WindowTail(window, encoder_version)
        self._newer: dict[str, tuple[int, str | None]] = {}
        self.refresh()  # before the table is read: a segment that is folded in between is seen in either
        rows = _table_rows(table, encoder_version)
        self._hashes, self._times = rows["content_hash"].combine_chunks(), times(rows["content_at"])
        self._index = IdIndex(pa.concat_arrays(rows["item_id"].cast(pa.large_string()).chunks))

    def refresh(self) -> None:
        """Take in what any process has added to the window."""
        for _, rows in self._tail.poll():
            self.add(rows)

    def add(self, rows: pa.Table) -> None:
        """Take in the rows of a window segment."""
        hashes = [
            None if deleted else content
            for deleted, content in zip(rows["deleted"].to_pylist(), rows["content_hash"].to_pylist(), strict=True)
        ]
        for item_id, content, at in zip(
            rows["item_id"].to_pylist(), hashes, times(rows["content_at"]).tolist(), strict=True
        ):
            if at >= self._newer.get(item_id, (NO_TIME, None))[0]:
                self._newer[item_id] = (at, content)

    def current(self, item_ids: Sequence[str]) -> list[tuple[int, str | None]]:
        """(time in microseconds, hash) of each item's current content; (NO_TIME, None) where there is none."""
        rows = self._index.rows(item_ids)
        found = []
        for item_id, row in zip(item_ids, rows.tolist(), strict=True):
            stored = (int(self._times[row]), self._hashes[row].as_py()) if row >= 0 else (NO_TIME, None)
            newer = self._newer.get(item_id, stored)
            found.append(newer if newer[0] >= stored[0] else stored)
        return found


def _table_rows(table: EmbeddingTable, encoder_version: str) -> pa.Table:
    """Keys and hashes of the current rows; an empty table where nothing was extracted yet."""
    empty = pa.table({"item_id": pa.array([], pa.string()), "content_hash": pa.array([], pa.string())})
    empty = empty.append_column("content_at", pa.array([], TIME))
    if not table.exists():
        return empty
    _, files = table.scan(encoder_version)
    if not files:
        return empty
    rows = pa.concat_tables([file.read(_COLUMNS) for file in files])
    return rows.take(pa.array(current_row_numbers(rows)))
