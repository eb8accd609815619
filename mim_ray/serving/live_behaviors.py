"""Each user's newest behaviors, those of the last seconds included: the behavior store and, over it, the log of events.

A replica that stores an event shows it in its next answer; the others follow the log and show it a moment later. What
counts as a behavior is what counted when the samples were made (samples.positive_events, samples.min_rating).

Events reach the store when jobs/build_samples.py runs with them in its log (jobs/export_events.py puts them there); a replica
that runs takes the newer store over (`reopen`).
One that is in both, with the same time and item, counts once. Memory is bounded: the newest `max_behaviors` of a user, and
beyond `max_live_behaviors` in all, the users whose last event came the longest time ago are forgotten here.
"""

from __future__ import annotations

import logging
import random
import sys
import threading
from bisect import insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mim_ray import artifacts
from mim_ray.config.scenario import Samples, Serving
from mim_ray.data.event_log import is_in
from mim_ray.serving.background import repeat
from mim_ray.serving.behavior_store import BehaviorStore
from mim_ray.serving.events import event_log, identities, without_repeated
from mim_ray.serving.row_log import RowLog
from mim_ray.serving.row_log_files import SEGMENT

logger = logging.getLogger("ray.serve")
FOLLOW_EVERY_S = 0.1
REOPEN_EVERY_S = 10.0  # how often a newer build of the store is looked for
_MADE = "made "
REMEMBERED = 200_000  # newest events: a repeated post is not even written


class Behavior(NamedTuple):
    time: int  # microseconds
    item: str
    event: int  # hash of which event it is


class LiveBehaviors:
    """
    Args:
        store: behaviors of the last samples. log: of events. rules: what counts as a behavior.
        max_behaviors: newest of a user that are kept. max_live_behaviors: of all users, not counting those in the store.
    """

    def __init__(
        self, store: BehaviorStore, log: RowLog, rules: Samples, *, max_behaviors: int, max_live_behaviors: int
    ) -> None:
        self._store, self._log, self._rules = store, log, rules
        self._max_behaviors, self._max_live_behaviors = max_behaviors, max_live_behaviors
        self._tail = log.follow()
        # By last event. Its lists are replaced, never changed: `history` reads without the lock.
        self._users: OrderedDict[str, list[Behavior]] = OrderedDict()
        self._num_live = 0
        self._known: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()
        self._polling = threading.Lock()
        self._stop = threading.Event()
        self._uri, self._build, self._coming = "", "", ""

    @classmethod
    def open(cls, behaviors: str, center: str, serving: Serving) -> LiveBehaviors:
        """With the events of the last `serving.live_behaviors_days`; it follows the log, and folds it, until `stop`.

        Args:
            behaviors: URI of the store's Parquet files. center: of the representation center with the log.

        Raises:
            ArtifactError: no store is there.
        """
        rules = rules_of(behaviors)
        build = build_of(behaviors, with_manifest=False) if artifacts.exists(behaviors) else ""
        live = cls(
            BehaviorStore.open(behaviors),
            event_log(center),
            rules,
            max_behaviors=rules.max_behaviors,  # the most that any model of these samples looks at
            max_live_behaviors=serving.max_live_behaviors,
        )
        live._uri, live._build = behaviors, build
        live.load(datetime.now(UTC) - timedelta(days=serving.live_behaviors_days))
        live.start(FOLLOW_EVERY_S, serving.fold_events_s)
        repeat(live, live._stop, "reopen-behaviors", lambda: REOPEN_EVERY_S, LiveBehaviors.reopen)
        return live

    def __len__(self) -> int:
        """Users in the store."""
        return len(self._store)

    @property
    def num_live(self) -> int:
        """Behaviors that are held here, beside those of the store."""
        return self._num_live

    def history(self, user_id: str) -> tuple[list[str], list[int] | None]:
        """As BehaviorStore.history, with what happened since. In a store without times the new ones come last."""
        items, times = self._store.history(user_id)
        live = self._users.get(user_id)
        if live is None:
            return items, times
        if items and times is None:
            return _without_repeats([*items, *(one.item for one in live)]), None
        pairs = dict.fromkeys([*zip(times or (), items, strict=True), *(one[:2] for one in live)])
        merged = sorted(pairs, key=itemgetter(0))  # stable: at the same time the stored ones come first
        # a purchase after the click on the same item is not another behavior: as in the samples
        kept = [pair for place, pair in enumerate(merged) if not place or merged[place - 1][1] != pair[1]]
        return [item for _, item in kept], [time for time, _ in kept]

    def store(self, rows: pa.Table) -> None:
        """Store events durably, those that are known to be stored excepted; `history` has them when this returns.

        Args:
            rows: of events.SCHEMA.
        """
        with self._lock:
            new = pa.array([one not in self._known for one in identities(rows).to_pylist()], pa.bool_())
        fresh = rows.filter(new)
        if fresh.num_rows:
            self._log.append(fresh)
            self.add(fresh)

    def add(self, rows: pa.Table) -> None:
        """Take in events that are stored; what is known already changes nothing."""
        found = _listed(rows.filter(pa.array(self._is_behavior(rows))))
        with self._lock:
            self._add(found)
            self._known.update(dict.fromkeys(identities(rows).to_pylist()))
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
            self._forget()

    def load(self, since: datetime) -> None:
        """Take in the events received since then, the newest first, until memory's bound is reached; call it before any other
        method. Damaged files are left out: a replica that cannot start is worse."""
        parts, num = [], 0
        for rows in self._log.read_newest_first(since, skip_damaged=True):
            parts.append(rows.filter(pa.array(self._is_behavior(rows))))
            num += parts[-1].num_rows
            if num >= self._max_live_behaviors:
                logger.warning("serving.max_live_behaviors is reached: older events are not read back")
                break
        if num:
            received = without_repeated(pa.concat_tables(parts).sort_by(SEGMENT))
            users = {}
            for user, found in groupby(
                _listed(received.sort_by([("user_id", "ascending"), ("timestamp", "ascending")])), itemgetter(0)
            ):
                users[user] = [behavior for _, behavior in found][-self._max_behaviors :]
            with self._lock:
                self._users = OrderedDict(sorted(users.items(), key=lambda entry: entry[1][-1].time))
                self._num_live = sum(map(len, users.values()))
                self._forget()

    def refresh(self) -> None:
        """Look once for events that other replicas stored."""
        with self._polling:
            for rows in self._tail.poll():
                self.add(rows)

    def start(self, follow_every_s: float, fold_every_s: float) -> None:
        """Follow the log, and fold it, in threads that end with `stop` or when nobody holds this object any more."""
        repeat(self, self._stop, "follow-events", lambda: follow_every_s, LiveBehaviors.refresh)
        often = lambda: fold_every_s * random.uniform(0.2, 0.3)  # noqa: E731 - replicas drift apart
        repeat(self, self._stop, "fold-events", often, lambda live: live._log.fold(wait_s=fold_every_s))

    def reopen(self) -> None:
        """Take a newer build of the store over when it is whole: the same at two looks, and, where the store had a manifest
        before, with one. Its rules count for events from now on; those that are held stay.

        Raises:
            ArtifactError: it cannot be read; the one before goes on.
        """
        build = build_of(self._uri, with_manifest=self._build.startswith(_MADE))
        if build == self._build or build != self._coming:
            self._coming = build
            return
        if build:
            store, self._rules = BehaviorStore.open(self._uri), rules_of(self._uri)
            self._max_behaviors = self._rules.max_behaviors
            self._store, self._build = store, build
            logger.info("behaviors of %d users are read from a newer build of the samples", len(store))

    def stop(self) -> None:
        self._stop.set()

    def _is_behavior(self, rows: pa.Table) -> np.ndarray:
        """(n,) bool."""
        positive = is_in(rows["event"], self._rules.positive_events)
        if self._rules.min_rating is None:
            return positive
        rating = rows["rating"].to_numpy(zero_copy_only=False)  # NaN where there is none
        return positive & ~(rating < self._rules.min_rating)

    def _add(self, found: Iterable[tuple[str, Behavior]]) -> None:
        for user, behavior in found:
            old = self._users.get(user, [])
            if any(one.event == behavior.event for one in old):
                continue
            new = list(old)
            insort(new, behavior, key=itemgetter(0))  # at the same time: in the order of receipt
            new = new[-self._max_behaviors :]
            self._num_live += len(new) - len(old)
            self._users[user] = new
            self._users.move_to_end(user)

    def _forget(self) -> None:
        while self._num_live > self._max_live_behaviors:
            self._num_live -= len(self._users.popitem(last=False)[1])


def rules_of(behaviors: str) -> Samples:
    """The settings with which the samples beside `behaviors` were made."""
    manifest = artifacts.read_manifest(behaviors.rpartition("/")[0])
    return Samples() if manifest is None else Samples.model_validate(manifest.scenario.get("samples", {}))


def build_of(behaviors: str, *, with_manifest: bool) -> str:
    """Names what is there: the samples' manifest, or, where there never was one, the files. "" while the samples are made.

    Args:
        with_manifest: a finished build has one here.
    """
    manifest = artifacts.read_manifest(behaviors.rpartition("/")[0])
    if manifest is not None:
        return f"{_MADE}{manifest.fingerprint} {manifest.created_at}"
    return "" if with_manifest else artifacts.source_fingerprint(behaviors)


def _listed(rows: pa.Table) -> Iterator[tuple[str, Behavior]]:
    """User and behavior of each row."""
    times = rows["timestamp"].cast(pa.int64()).to_pylist()
    events = map(hash, identities(rows).to_pylist())
    items = map(sys.intern, rows["item_id"].to_pylist())  # users have items in common
    return zip(rows["user_id"].to_pylist(), map(Behavior, times, items, events), strict=True)


def _without_repeats(items: list[str]) -> list[str]:
    return [item for place, item in enumerate(items) if not place or items[place - 1] != item]
