"""Rows of the catalogue against what is known of their items: which of them are encoded, and what is deleted.

A row is a *candidate* when it was not seen before with this content (changes.py, feed_changes.py). Of the candidates only
those are encoded whose content differs from the item's current content and is not older than it:

*When did it change?* The time of a row's content is the latest of its created_at, of the time of its file (Delta: the commit;
Parquet: the file's time), and of the listing before this one, which did not have it yet; never later than now. So a copy with
an old date counts as news, a real-time item that came after the catalogue's change stays, and a clock that runs ahead cannot
lock an item.

*Deleted* is what the catalogue had at the last refresh and has no more. An item that only came in real time was never there,
so it stays; and it stays when its content is newer than the deletion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray.data.ids import hash_ids
from mim_ray.data.schema import TIME
from mim_ray.data.sources import Shard
from mim_ray.errors import DataError
from mim_ray.extraction.catalogue_state import Piece, SeenFile
from mim_ray.extraction.chosen import ChosenRows
from mim_ray.extraction.read import COLUMNS, Decoding, prepare_items
from mim_ray.extraction.records import contained
from mim_ray.extraction.scan import Scanned
from mim_ray.extraction.scanners import Scanners
from mim_ray.representation_center.key_index import string_array
from mim_ray.representation_center.known_content import KnownContent
from mim_ray.representation_center.snapshot import NO_TIME
from mim_ray.representation_center.table import EmbeddingTable, times

SCAN_ROWS = 16_384  # looked at by one task
MAX_CLOCK_SKEW_US = 300_000_000
MANY_DELETIONS = 100


@dataclass
class Changes:
    """What a refresh has to do.

    Attributes:
        files, feed: the catalogue as it is now, for the next state. kept: those of the files that did not change.
        deletions: item_id, content_at. rejects: (key, reason, detail).
        void_rejects: id hashes, in parts: of the items rejected earlier, those that changed or vanished.
        num_older: changes that are older than what is known, and so have no effect.
    """

    files: dict[str, SeenFile]
    kept: frozenset[str] = frozenset()
    feed: tuple[Piece, ...] = ()
    void_rejects: list[np.ndarray] = field(default_factory=list)
    changes: list[ChosenRows] = field(default_factory=list)
    deletions: pa.Table = field(default_factory=lambda: deletion_rows([], []))
    rejects: list[tuple[str, str, str]] = field(default_factory=list)
    num_rows: int = 0
    num_new: int = 0
    num_changed: int = 0
    num_older: int = 0

    @property
    def num_to_encode(self) -> int:
        return sum(chosen.num_rows for chosen in self.changes)

    def check_deletions(self, catalogue: str, known: KnownContent, max_ratio: float) -> None:
        """
        Raises:
            DataError: so much is gone at once that it may be a mistake.
        """
        gone = self.deletions.num_rows
        shown = known.snapshot.num_rows if known.snapshot is not None else 0
        if gone > max(MANY_DELETIONS, max_ratio * shown):
            raise DataError(
                f"{catalogue} lacks {gone:,} of {shown:,} known items, more than refresh.max_deleted_ratio = "
                f"{max_ratio}. Nothing was changed. If they are really gone, run it once with "
                "refresh.max_deleted_ratio=1."
            )

    def limit_content(self, start: int, warm_rows: int) -> int:
        """Where more rows than `warm_rows` are to be encoded, let go of the content carried since change `start`.

        Returns:
            the next call's `start`.
        """
        if self.num_new + self.num_changed <= warm_rows:
            return start
        self.changes[start:] = [chosen.without_content() for chosen in self.changes[start:]]
        return len(self.changes)


@dataclass(frozen=True)
class Looking:
    """How a round looks at rows.

    Attributes:
        rejected: ascending id hashes of items rejected earlier. now: microseconds.
        warm_rows: of so many rows to encode, the content is kept.
        full: at the whole catalogue, although there may be a state, which then only tells what was deleted.
    """

    decoding: Decoding
    rejected: np.ndarray
    now: int
    warm_rows: int
    scanners: Scanners
    full: bool = False


@dataclass(frozen=True)
class Clock:
    """Microseconds: now, and when the catalogue was listed before (NO_TIME if it was not)."""

    now: int
    before: int

    def floor(self, changed_at: int) -> int:
        """Time of content that a file brought which came at `changed_at`."""
        return max(min(changed_at, self.now), self.before)


def deletion_rows(ids: Sequence[str], content_at: Sequence[int] | np.ndarray) -> pa.Table:
    """A table of item_id and content_at."""
    return pa.table({"item_id": pa.array(ids, pa.string()), "content_at": pa.array(content_at, pa.int64()).cast(TIME)})


def compare(
    shard: Shard,
    start: int,
    changed_at: int,
    scanned: Scanned,
    carried: Any,
    known: KnownContent,
    decoding: Decoding,
    clock: Clock,
    found: Changes,
) -> None:
    """Add what is to be encoded of a slice's candidates; its file begins at row `start` and came at `changed_at`."""
    for row in scanned.blank.tolist():
        key = f"{shard.source}: row {shard.first_row - start + row}"
        found.rejects.append((key, "no item id", "the row has no item_id"))
    early = scanned.created_at > clock.now + MAX_CLOCK_SKEW_US
    for place in np.flatnonzero(early).tolist():
        at = pa.scalar(int(scanned.created_at[place]), pa.int64()).cast(TIME)
        detail = f"created_at is {at}; the content counts as of the time when the catalogue had it"
        found.rejects.append((scanned.ids[place].as_py(), "created_at in the future", detail))
    floor = clock.floor(changed_at)
    if known.is_empty:
        everything = len(scanned.rows) == scanned.num_rows
        places = np.arange(len(scanned.rows))
        chosen = ChosenRows(shard, None if everything else scanned.rows, None, floor, clock.now, carried, places)
        found.num_new += len(places)
    else:
        state = known.look_up(scanned.ids)
        at = np.maximum(np.where(scanned.created_at <= clock.now, scanned.created_at, NO_TIME), floor)
        at = np.where(state.content_at > clock.now, np.maximum(state.content_at, at), at)
        same = np.asarray(pc.fill_null(pc.equal(state.hashes, scanned.hashes), False), bool)
        by_title = np.asarray(pc.fill_null(pc.equal(state.hashes, scanned.title_hashes), False), bool) & ~same
        if by_title.any():
            same |= _still_unusable(shard, scanned, np.flatnonzero(by_title), decoding, found)
        older = ~same & state.found & (state.content_at > at)
        places = np.flatnonzero(~same & ~older)
        there = np.asarray(state.hashes.is_valid(), bool)[places]
        found.num_older += int(older.sum())
        found.num_new += int((~there).sum())
        found.num_changed += int(there.sum())
        chosen = ChosenRows(shard, scanned.rows[places], at[places], floor, clock.now, carried, places)
    if len(places):
        found.changes.append(chosen if carried is not None else chosen.without_content())


def _still_unusable(
    shard: Shard, scanned: Scanned, places: np.ndarray, decoding: Decoding, found: Changes
) -> np.ndarray:
    """(n,) bool: which of the candidates `places`, known by their titles alone, have a picture that cannot be used."""
    result = np.zeros(len(scanned.rows), bool)
    rows = ChosenRows(shard, scanned.rows[places], scanned.created_at[places], 0, 0)
    prepared = pa.concat_tables(
        prepare_items(piece, np.zeros(piece.num_rows, bool), decoding) for piece in rows.batches(COLUMNS, 256)
    )
    columns = (prepared[name].to_pylist() for name in ("item_id", "image_reason", "image_detail"))
    for place, (item_id, reason, detail) in zip(places.tolist(), zip(*columns, strict=True), strict=True):
        result[place] = reason is not None
        if reason is not None:
            found.rejects.append((item_id, reason, detail or ""))
    return result


def delete(
    hashes: np.ndarray, table: EmbeddingTable | None, known: KnownContent, at: int, clock: Clock, found: Changes
) -> None:
    """Add deletions of the known items with these id hashes.

    Args:
        table: where it is given, only of those whose current row in it came from the catalogue.
    """
    ids = known.ids_of(hashes)
    if table is not None and len(ids):
        ids = _from_catalogue(table, known, ids)
    if not len(ids):
        return
    state = known.look_up(ids)
    newer = (state.content_at > at) & (state.content_at <= clock.now)
    going = np.asarray(state.hashes.is_valid(), bool) & ~newer
    found.num_older += int((newer & np.asarray(state.hashes.is_valid(), bool)).sum())
    rows = deletion_rows(ids.filter(pa.array(going)).to_pylist(), np.maximum(state.content_at, at)[going])
    found.deletions = pa.concat_tables([found.deletions, rows])


def _from_catalogue(table: EmbeddingTable, known: KnownContent, ids: pa.Array) -> pa.Array:
    """Those of the items whose newest row did not come in real time. Reads ids, times and origins of the table."""
    wanted = np.sort(hash_ids(ids))
    found = [pa.array([], pa.large_string())]
    for file in table.scan(known.encoder_version)[1]:
        for rows in file.batches(["item_id", "content_at", "origin", "deleted"]):
            batch = rows.filter(pc.and_(pc.equal(rows["origin"], "batch"), pc.invert(rows["deleted"])))
            here = batch.filter(pa.array(contained(hash_ids(batch["item_id"]), wanted)))
            if here.num_rows:
                newest = known.look_up(here["item_id"]).content_at <= times(here["content_at"])
                found.append(string_array(here["item_id"].filter(pa.array(newest))))
    return ids.filter(pc.is_in(ids, pc.unique(pa.concat_arrays(found))))
