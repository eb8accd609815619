"""What changed in the catalogue since the last refresh, from its change data feed: only rows that changed are read and hashed.

The last event of an id says whether its row is there, and with which content; an item changed several times is looked at once.
What the feed cannot tell is left to the files (changes.py): which of several rows with one id counts, and where a row without an
id stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mim_ray.data.change_feed import FeedSlice, FeedUnusableError, read_feed
from mim_ray.data.event_log import is_blank
from mim_ray.data.ids import hash_ids
from mim_ray.data.listing import Head
from mim_ray.extraction.catalogue_state import CatalogueState, PackWriter, StateStore
from mim_ray.extraction.comparison import SCAN_ROWS, Changes, Clock, Looking, compare, delete
from mim_ray.extraction.records import Records, contained, newest
from mim_ray.extraction.scanners import Looked
from mim_ray.representation_center.known_content import KnownContent

MAX_TOLD = 16_000_000  # ids noted beside the files' records; the next comparison of files takes them in


class Events(NamedTuple):
    """Rows that came or went: uint64 hash of the id, number of the commit, bool whether it came, slice and row in it."""

    ids: np.ndarray
    commits: np.ndarray
    came: np.ndarray
    slices: np.ndarray
    rows: np.ndarray


def find_feed_changes(
    head: Head,
    state: CatalogueState,
    store: StateStore,
    pack: PackWriter,
    known: KnownContent,
    looking: Looking,
) -> Changes:
    """As `changes.find_changes`, for the rows that the feed names between the state's version and the head.

    Raises:
        FeedUnusableError: the files must be compared. Nothing was written to the pack then.
    """
    if sum(piece.count for piece in state.feed) > MAX_TOLD:
        raise FeedUnusableError(f"more than {MAX_TOLD:,} items changed since the files were compared")
    assert state.version is not None, "only a Delta table has a head"
    feed, committed_at = read_feed(state.catalogue, head, state.version, SCAN_ROWS)
    events = read_events(feed)
    ids, first = np.unique(events.ids, return_index=True)
    before, contents = store.rows_of(state, ids)
    last = last_events(events, before)
    there = events.came[last]
    clock = Clock(looking.now, state.listed_at)
    rejected = looking.rejected
    found = Changes(dict(state.files), frozenset(state.files))
    had = before > 0
    seen = np.sort(Records(ids[had], contents[had], first[had]).pairs)
    chosen = _by_slice(events, last[there])
    looked = [Looked(feed[number].rows, rows) for number, rows in chosen]
    told = []
    read_again = 0
    for (number, _), (shard, scanned, carried) in zip(
        chosen, looking.scanners.scan(looked, seen, looking.decoding, looking.warm_rows), strict=True
    ):
        told.append(scanned.records)
        found.void_rejects.append(rejected[np.isin(rejected, hash_ids(scanned.ids))])
        compare(shard, 0, feed[number].committed_at, scanned, carried, known, looking.decoding, clock, found)
        read_again = found.limit_content(read_again, looking.warm_rows)
    gone = ids[~there]  # also what only a round saw that was killed before it noted it
    found.void_rejects.append(rejected[contained(rejected, gone)])
    delete(gone, None, known, clock.floor(committed_at), clock, found)
    came = newest(told)
    noted = newest([Records(came.ids, came.contents, np.ones_like(came.rows)), _gone_records(gone)])
    found.feed = store.with_feed(state.feed, noted, pack)
    pack.close()
    found.num_rows = state.num_rows + int(there.sum()) - int(had.sum())
    return found


def read_events(feed: Sequence[FeedSlice]) -> Events:
    """What the feed names, as hashes.

    Raises:
        FeedUnusableError: a row has no id.
    """
    parts = [Events(*(np.empty(0, kind) for kind in (np.uint64, np.int64, bool, np.int64, np.int64)))]
    for number, piece in enumerate(feed):
        ids, came = piece.ids()
        if is_blank(ids).any():
            raise FeedUnusableError(f"version {piece.version} changed rows without an item_id")
        same = np.full(len(ids), piece.version), np.full(len(ids), number)
        parts.append(Events(hash_ids(ids), same[0], np.asarray(came, bool), same[1], np.arange(len(ids))))
    return Events(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def last_events(events: Events, before: np.ndarray) -> np.ndarray:
    """Number of the last event of each id, ids ascending. In a commit the row that went goes before the one that came.

    Args:
        before: (number of ids,) rows that the catalogue had with the id.

    Raises:
        FeedUnusableError: at some time there was more than one row with an id, or one went that was not there.
    """
    order = np.lexsort((events.came, events.commits, events.ids))
    ids = events.ids[order]
    starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1])) if len(ids) else np.empty(0, np.int64)
    counts = np.diff(np.append(starts, len(ids)))
    steps = np.where(events.came[order], 1, -1)
    total = np.cumsum(steps)
    rows = total - np.repeat(total[starts] - steps[starts] - before, counts)
    wrong = np.unique(ids[(rows < 0) | (rows > 1) | np.repeat(before > 1, counts)])
    if len(wrong):
        raise FeedUnusableError(f"{len(wrong):,} of the changed items stood in the catalogue twice")
    return order[starts + counts - 1]


def _by_slice(events: Events, chosen: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(number of a slice, ascending rows in it) of the chosen events."""
    chosen = chosen[np.lexsort((events.rows[chosen], events.slices[chosen]))]
    numbers, first = np.unique(events.slices[chosen], return_index=True)
    return list(zip(numbers.tolist(), np.split(events.rows[chosen], first[1:]), strict=True)) if len(numbers) else []


def _gone_records(ids: np.ndarray) -> Records:
    """Notes that these rows (ascending id hashes) are gone."""
    return Records(ids, np.zeros_like(ids), np.zeros(len(ids), np.uint32))
