"""All samples of some users, from all their events: labels, behaviors, drawn negatives, built pairs. Arrays only, no Ray.

Point in time: the behaviors of a sample at time t are the user's positives with time < t (with day resolution: of an
earlier day). A positive on the same item as the user's positive before it (a purchase after its click) is not repeated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mim_ray.data.event_log import DAY_US, POSITIVE, SEARCHED
from mim_ray.data.ids import uniform

_UNIFORM, _CHOICE, _ROUNDS, _UNIFORM_ROUNDS = 10, 100, 8, 6


@dataclass
class UserEvents:
    """Events of some users, sorted by user, time and row of the log.

    Attributes:
        user: (n,) number of the user. impression: (n,) code of the impression id, -1 without one. The rest as EVENTS.
    """

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    seq: np.ndarray
    kind: np.ndarray
    impression: np.ndarray
    revenue: np.ndarray

    def take(self, rows: np.ndarray) -> UserEvents:
        return UserEvents(
            self.user[rows], self.item[rows], self.time[rows], self.seq[rows], self.kind[rows],
            self.impression[rows], self.revenue[rows],
        )  # fmt: skip


@dataclass
class History:
    """Behaviors by user, oldest first: rows starts[i] … stops[i] - 1 of `item` and `time` belong to sample i (or user i)."""

    item: np.ndarray
    time: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def lists(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(items, times, offsets) as Arrow holds lists."""
        lengths = self.stops - self.starts
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        rows = np.repeat(self.starts, lengths) + within
        return self.item[rows], self.time[rows], offsets


def cutoffs(times: np.ndarray, time_resolution: str) -> np.ndarray:
    """The instant before which an event must have happened to be known at each time."""
    return times // DAY_US * DAY_US if time_resolution == "day" else times


def positives_of(events: UserEvents, kind: int = POSITIVE) -> UserEvents:
    """Events with the bits `kind`, without those that repeat the item of the same user's one before."""
    chosen = events.take(np.flatnonzero(events.kind & kind == kind))
    again = (chosen.user[1:] == chosen.user[:-1]) & (chosen.item[1:] == chosen.item[:-1])
    return chosen.take(np.flatnonzero(np.concatenate([[True], ~again])[: len(chosen.user)]))


def behaviors_before(
    positives: UserEvents, user: np.ndarray, cutoff: np.ndarray, max_behaviors: int, time_resolution: str = "exact"
) -> History:
    """The newest `max_behaviors` positives of each user strictly before each cutoff (already at a day's start for days)."""
    times = np.unique(positives.time)
    width = len(times) + 1
    keys = positives.user * width + np.searchsorted(times, positives.time)  # sorted like the positives
    begins = np.searchsorted(keys, user * width)
    stops = np.searchsorted(keys, user * width + np.searchsorted(times, cutoff, "left"))
    return History(positives.item, positives.time, np.maximum(begins, stops - max_behaviors), stops)


def newest_behaviors(positives: UserEvents, max_behaviors: int) -> tuple[np.ndarray, History]:
    """Users with positives, and the newest of each, for serving."""
    users, starts = np.unique(positives.user, return_index=True)
    stops = np.append(starts[1:], len(positives.user)).astype(np.int64)
    return users, History(positives.item, positives.time, np.maximum(starts, stops - max_behaviors), stops)


def first_of_each(events: UserEvents) -> np.ndarray:
    """(n,) bool: False where the same user, impression id and item came before (an impression logged twice)."""
    first = events.impression < 0
    named = np.flatnonzero(~first)
    chosen = events.take(named)
    _, places = np.unique(_row_codes(chosen.user, chosen.impression, chosen.item), return_index=True)
    first[named[places]] = True
    return first


def match_positives(impressions: UserEvents, positives: UserEvents, window_us: int) -> np.ndarray:
    """(num_positives,) row of the impression that each positive answers, -1 where there is none.

    A positive with an impression id answers the impression of this id, user and item. One without answers the user's last
    impression of the item not later and at most `window_us` earlier, unless it comes from an image search.
    """
    if not len(impressions.user) or not len(positives.user):
        return np.full(len(positives.user), -1, np.int64)
    num = len(impressions.user)
    both = [np.concatenate(pair) for pair in ((impressions.user, positives.user), (impressions.item, positives.item))]
    pair = _row_codes(*both)
    full = _row_codes(pair, np.concatenate([impressions.impression, positives.impression]))
    named = np.full(full.max() + 1, -1, np.int64)
    named[full[:num][::-1]] = np.arange(num)[::-1]
    named = named[full[num:]]
    answer = np.where(positives.impression >= 0, named, -1)
    times = np.unique(impressions.time)
    width = len(times) + 1
    keys = pair[:num] * width + np.searchsorted(times, impressions.time)
    order = np.argsort(keys, kind="stable")
    upto = pair[num:] * width + np.searchsorted(times, positives.time, "right")
    last = order[np.maximum(np.searchsorted(keys[order], upto) - 1, 0)]
    same = (impressions.user[last] == positives.user) & (impressions.item[last] == positives.item)
    age = positives.time - impressions.time[last]
    near = same & (age >= 0) & (age <= window_us)
    free = (positives.impression < 0) & (positives.kind & SEARCHED == 0)
    return np.where(free & near, last, answer)


@dataclass(frozen=True)
class Pool:
    """From what negatives are drawn: 16 bytes a positive of the log and 16 an item with a known time.

    Attributes:
        event_time, event_item: all positives of all users in the order of time.
        created, created_item: when each item was first known, sorted, and the item.
    """

    event_time: np.ndarray
    event_item: np.ndarray
    created: np.ndarray
    created_item: np.ndarray


def draw_negatives(
    samples: UserEvents,
    own: UserEvents,
    pool: Pool,
    *,
    seed: int,
    num: int,
    window_us: int,
    uniform_ratio: float,
    num_items: int,
    time_resolution: str = "exact",
) -> np.ndarray:
    """Items that stand for "shown and not clicked" beside each positive sample.

    With chance 1 - uniform_ratio the item of a positive in the window that ends at the sample's time (so popular items
    come more often), else any item that existed then, evenly: the floor for items without events.

    Args:
        own: all events of the same users; none of their items is drawn for them, whenever they met it.

    Returns:
        (num_samples, num) int64 items, different within a row, -1 where none was found. A function of seed and the
        samples' rows in the log alone.
    """
    cutoff = cutoffs(samples.time, time_resolution)
    low = np.searchsorted(pool.event_time, cutoff - window_us, "left")
    high = np.searchsorted(pool.event_time, cutoff, "left")
    # of items created on the sample's day it is not known whether they came first
    until = cutoff if time_resolution == "day" else cutoff + 1
    existing = np.searchsorted(pool.created, until, "left")
    own_keys = np.unique(own.user * num_items + own.item)
    counters = samples.seq[:, None] * num + np.arange(num)
    evenly = uniform(seed, _CHOICE, counters) < uniform_ratio
    drawn = np.full((len(samples.seq), num), -1, np.int64)
    for attempt in range(_ROUNDS + _UNIFORM_ROUNDS):
        row, slot = np.nonzero(drawn < 0)
        if not len(row):
            break
        draw = uniform(seed, _UNIFORM + attempt, counters[row, slot])
        even = evenly[row, slot] | (high[row] == low[row]) | (attempt >= _ROUNDS)
        event = np.minimum(low[row] + (draw * (high[row] - low[row])).astype(np.int64), len(pool.event_item) - 1)
        place = np.minimum((draw * existing[row]).astype(np.int64), len(pool.created_item) - 1)
        item = np.where(even, _at(pool.created_item, place), _at(pool.event_item, event))
        ok = ~even | (existing[row] > 0)
        ok &= item >= 0
        keys = samples.user[row] * num_items + item
        ok &= own_keys[np.minimum(np.searchsorted(own_keys, keys), len(own_keys) - 1)] != keys
        ok &= (drawn[row] != item[:, None]).all(1)
        _, first = np.unique(row * num_items + item, return_index=True)  # not twice for a sample in one round
        once = np.zeros(len(row), bool)
        once[first] = True
        ok &= once
        drawn[row[ok], slot[ok]] = item[ok]
    return drawn


def built_pairs(
    positives: UserEvents, window_us: int, before: int, has_image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of consecutive positives of a user, as stand-ins for image searches.

    Returns:
        rows of the query items and of the bought items in `positives`: different items, at most `window_us` apart, bought
        before `before`, the query item with a picture.
    """
    first = np.arange(max(0, len(positives.user) - 1))
    second = first + 1
    ok = (positives.user[first] == positives.user[second]) & (positives.item[first] != positives.item[second])
    ok &= positives.time[second] - positives.time[first] <= window_us
    ok &= (positives.time[second] < before) & has_image[positives.item[first]]
    return first[ok], second[ok]


def _row_codes(*columns: np.ndarray) -> np.ndarray:
    """(n,) a number for each row of some integer columns (-1 or more), equal where the rows are."""
    codes = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        _, inverse = np.unique(codes * (column.max(initial=0) + 2) + column + 1, return_inverse=True)
        codes = inverse.reshape(-1)
    return codes


def _at(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    return values[places] if len(values) else np.full(len(places), -1, np.int64)
