"""A snapshot state's rows from those of the state before and the log's rows since.

*Why only the rows since are enough.* The state before shows each item's last row (`current_rows`) at its Delta version. A
row with a later commit_version comes after it unless its content is older, so the state's content_at decides; of an item that
the state does not show, the time of its last deletion does. Compaction may bring old rows again under a later commit_version:
either it is the very row that is shown, or it lost to a row with newer content, because a merge takes contiguous commits
and leaves each row's place among the others as it was. Only a purge takes rows away; build.py looks for that.

Without a state before, all rows are since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mim_ray.data.ids import hash_ids
from mim_ray.representation_center.content_hashes import content_digests
from mim_ray.representation_center.current_rows import current_row_numbers, times
from mim_ray.representation_center.deletions import Deletions
from mim_ray.representation_center.key_index import shard_start, string_array
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.stored_rows import NO_TIME, PIECE_ROWS, StoredRows


@dataclass(frozen=True)
class Target:
    """What rows are made for: a state's width and dtype, and its name in errors."""

    width: int
    dtype: str
    source: str


def merged_rows(
    base: Snapshot | None,
    rows: pa.Table | None,
    part: tuple[int, int],
    target: Target,
    deletions: Callable[[], Deletions],
) -> Iterator[StoredRows]:
    """The new state's rows of range r of R (`shard_of`), in pieces.

    Args:
        base: the state before, if any.
        rows: the log's rows of the range that are not in `base` (`RowRanges.pop`); of rows that it shows, any.
        part: (r, R).
        deletions: gives those that `base` leaves out.
    """
    news = None if rows is None else _News.of(base, rows, target, deletions)
    del rows  # what is needed of them is copied
    if base is None:
        for start in range(0, 0 if news is None else len(news), PIECE_ROWS):
            assert news is not None
            yield news.encoded(start, min(start + PIECE_ROWS, len(news)))
        return
    first, end = _row_range(base, part)
    if news is None:
        for start in range(first, end, PIECE_ROWS):
            yield base.stored_rows(start, min(start + PIECE_ROWS, end))
        return
    for row, next_row, new, next_new in _pieces(first, end, news.places):
        stays = np.ones(next_row - row, bool)
        leave, rest = np.searchsorted(news.replaced, [row, next_row])
        stays[news.replaced[leave:rest] - row] = False
        kept = np.flatnonzero(stays)
        shown = base.stored_rows(row, next_row)
        if new == next_new and len(kept) == len(shown):
            yield shown
            continue
        at = np.searchsorted(kept + row, news.places[new:next_new]) + np.arange(next_new - new)
        source = np.empty(len(kept) + next_new - new, np.int64)
        is_shown = np.ones(len(source), bool)
        is_shown[at] = False
        source[is_shown], source[at] = kept, len(shown) + np.arange(next_new - new)
        yield shown.mixed(news.encoded(new, next_new), source)


class _News:
    """Rows of a range that come after what the state before shows, in the order of their hashes.

    Attributes:
        places: (n,) int64 ascending: the row of the state before, in front of which each stands.
        replaced: rows of the state before that leave, ascending.
    """

    def __init__(
        self,
        rows: pa.Table,
        numbers: np.ndarray,
        hashes: np.ndarray,
        places: np.ndarray,
        replaced: np.ndarray,
        target: Target,
    ) -> None:
        self.places, self.replaced = places, replaced
        self._numbers, self._hashes, self._target = numbers, hashes, target
        self._ids, self._contents = string_array(rows["item_id"]), string_array(rows["content_hash"])
        self._content_at = times(rows["content_at"])
        embeddings = rows["embedding"].combine_chunks().flatten()
        self._matrix = embeddings.to_numpy(zero_copy_only=False).reshape(-1, target.width)

    def __len__(self) -> int:
        return len(self._numbers)

    @classmethod
    def of(cls, base: Snapshot | None, rows: pa.Table, target: Target, deletions: Callable[[], Deletions]) -> _News:
        last = current_row_numbers(rows, deleted=True)
        ids = string_array(rows["item_id"]).take(pa.array(last))
        hashes = hash_ids(ids)
        live = ~rows["deleted"].to_numpy()[last]
        places, replaced = np.zeros(len(last), np.int64), np.empty(0, np.int64)
        if base is not None:
            shown = base.lookup(ids, hashes)
            known = shown >= 0
            assert base.content_at is not None
            held_at = np.where(known, base.content_at.take(shown, mode="clip"), NO_TIME)
            if (live & ~known).any():
                held_at[~known] = deletions().content_at(hashes[~known])
            wins = times(rows["content_at"])[last] >= held_at
            replaced = np.sort(shown[wins & known])
            live &= wins
            places = np.where(known, shown, np.searchsorted(base.hashes, hashes, "right"))
        last, hashes, places = last[live], hashes[live], places[live]
        order = np.argsort(hashes, kind="stable")
        # Hashes ascend, so places do, but where ids share a hash: any order of these is right.
        return cls(rows, last[order], hashes[order], np.maximum.accumulate(places[order]), replaced, target)

    def encoded(self, first: int, end: int) -> StoredRows:
        numbers = self._numbers[first:end]
        return StoredRows.encoded(
            self._hashes[first:end],
            self._ids.take(pa.array(numbers)),
            self._matrix[numbers],
            dtype=self._target.dtype,
            source=self._target.source,
            content_at=self._content_at[numbers],
            digests=content_digests(self._contents.take(pa.array(numbers)))[0],
        )


def _row_range(base: Snapshot, part: tuple[int, int]) -> tuple[int, int]:
    """First row of a range, and of the next one."""
    bounds = [shard_start(number, part[1]) for number in (part[0], part[0] + 1)]
    return tuple(  # type: ignore[return-value]
        base.num_rows if bound >= 2**64 else int(np.searchsorted(base.hashes, np.uint64(bound))) for bound in bounds
    )


def _pieces(first: int, end: int, places: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """(row, next row, new, next new): rows [first, end) with the new rows between them, some of each at a time."""
    row, new = first, 0
    while row < end or new < len(places):
        next_row = min(row + PIECE_ROWS, end)
        next_new = len(places) if next_row == end else int(np.searchsorted(places, next_row))
        if next_new - new > PIECE_ROWS:
            next_new = new + PIECE_ROWS
            next_row = int(places[next_new])
        yield row, next_row, new, next_new
        row, new = next_row, next_new
