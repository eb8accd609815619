"""One part of the users: from their checked events to files of impressions, built pairs and behaviors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray.config.scenario import Samples
from mim_ray.data.event_log import DAY_US, EVENTS, PAIR, POSITIVE, SHOWN, complete
from mim_ray.data.features import num_missing
from mim_ray.data.sample_files import BEHAVIORS, IMPRESSION_GROUP, PAIR_GROUP, Tallies, write_impressions, write_parquet
from mim_ray.data.schema import IMPRESSIONS, INTEREST_PAIRS, SPLITS, TIME
from mim_ray.data.splits import Split
from mim_ray.data.user_samples import (
    History,
    Pool,
    UserEvents,
    behaviors_before,
    built_pairs,
    cutoffs,
    draw_negatives,
    first_of_each,
    match_positives,
    newest_behaviors,
    positives_of,
)


@dataclass(frozen=True)
class PartJob:
    """What every part needs to know.

    Attributes:
        impressions: from logged ones, drawn, or none to write (the user brought an own table).
        build_pairs: whether consecutive positives stand for image searches.
        ids, categories, has_image: of the items by row. pool: for drawn negatives.
    """

    settings: Samples
    seed: int
    output: str
    impressions: str
    build_pairs: bool
    split: Split
    ids: pa.Array
    categories: pa.Array
    has_image: np.ndarray
    pool: Pool | None


def write_part_of_users(events: pa.Table, job: PartJob) -> pa.Table:
    """Write the samples of the users of one part.

    Args:
        events: rows of EVENTS and declared features, all with the same `part`, with all events of their users.

    Returns:
        one row of PART_RESULT.
    """
    part = events["part"][0].as_py()
    users, table, log = _sorted_events(events)
    positives = positives_of(log)
    settings = job.settings
    counts: dict[str, int] = {"users": len(users)}
    rejects: list[tuple[str, str, str]] = []
    tallies = Tallies()
    if job.impressions == "logged":
        samples, twice = _logged(table, log, positives, users, job)
        rejects = [(str(seq), "impression logged twice", "the first one is used") for seq in log.seq[twice].tolist()]
        write_impressions(samples, job.output, part, tallies)
        counts |= num_missing(samples)
    elif job.impressions == "drawn":
        samples = _drawn(table, log, positives, users, job)
        counts["negatives not found"] = settings.num_drawn_negatives * int(pc.sum(samples["label"]).as_py() or 0) - int(
            pc.sum(samples["drawn"]).as_py() or 0
        )
        write_impressions(samples, job.output, part, tallies)
        counts |= num_missing(samples)
    if job.build_pairs:
        pairs = _pairs(positives_of(log, PAIR), users, job)
        counts["interest pairs"] = pairs.num_rows
        write_parquet(f"{job.output}/interest_pairs/part-{part:05d}.parquet", pairs, PAIR_GROUP)
    known, newest = newest_behaviors(positives, settings.max_behaviors)
    columns = {"user_id": users.take(pa.array(known)), **_behavior_columns(newest, job.ids)}
    behaviors = complete(columns, len(known), BEHAVIORS)
    write_parquet(f"{job.output}/behaviors/part-{part:05d}.parquet", behaviors, IMPRESSION_GROUP)
    counts["users with behaviors"] = len(known)
    return tallies.result(counts, rejects)


def _sorted_events(events: pa.Table) -> tuple[pa.Array, pa.Table, UserEvents]:
    """User ids by number, the events sorted by (user, time, row of the log), and their columns as arrays."""
    events = events.sort_by(
        "seq"
    )  # the shuffle brings rows in any order; all that follows is then a function of the log
    encoded = events["user_id"].combine_chunks().dictionary_encode()
    codes = np.asarray(encoded.indices).astype(np.int64)
    order = np.lexsort((np.asarray(events["seq"]), np.asarray(events["time"]), codes))
    table = events.take(pa.array(order)).combine_chunks()
    named = table["impression_id"].combine_chunks().dictionary_encode()
    column: Callable[[str], np.ndarray] = lambda name: np.asarray(table[name])  # noqa: E731
    log = UserEvents(
        user=codes[order],
        item=column("item"),
        time=column("time"),
        seq=column("seq"),
        kind=column("kind").astype(np.int64),
        impression=np.asarray(named.indices.fill_null(-1)).astype(np.int64),
        revenue=np.asarray(table["revenue"].fill_null(0.0)),
    )
    return encoded.dictionary, table, log


def _logged(
    table: pa.Table, log: UserEvents, positives: UserEvents, users: pa.Array, job: PartJob
) -> tuple[pa.Table, np.ndarray]:
    """Impressions of the log with their labels; the second value are rows of repeated ones."""
    settings = job.settings
    shown = np.flatnonzero(log.kind & SHOWN)
    first = first_of_each(log.take(shown))
    rows = shown[first]
    impressions = log.take(rows)
    answers = log.take(np.flatnonzero(log.kind & POSITIVE))
    answered = match_positives(impressions, answers, round(settings.click_window_s * 1e6))
    matched = answered >= 0
    label = np.zeros(len(rows), np.int8)
    label[answered[matched]] = 1
    revenue = np.bincount(answered[matched], answers.revenue[matched], minlength=len(rows))
    cutoff = cutoffs(impressions.time, settings.time_resolution)
    history = behaviors_before(positives, impressions.user, cutoff, settings.max_behaviors)
    names, request = _impression_names(table["impression_id"].take(pa.array(rows)), impressions, job.ids)
    columns = {
        "impression_id": names,
        "request_id": request,
        "label": pa.array(label),
        "query_text": table["query_text"].take(pa.array(rows)),
        "query_image": table["query_image"].take(pa.array(rows)),
        "revenue": pa.array(revenue, mask=revenue == 0),
        "drawn": pa.array(np.zeros(len(rows), bool)),
        **_features(table, rows),
        **_shared_columns(impressions.user, impressions.time, impressions.item, users, job),
        **_behavior_columns(history, job.ids),
    }
    return complete(columns, len(rows), _schema(table)), shown[~first]


def _drawn(table: pa.Table, log: UserEvents, positives: UserEvents, users: pa.Array, job: PartJob) -> pa.Table:
    """Every positive with its drawn negatives after it; these have the features of the positive's event."""
    settings, num = job.settings, job.settings.num_drawn_negatives
    assert job.pool is not None
    negatives = draw_negatives(
        positives,
        log,
        job.pool,
        seed=job.seed,
        num=num,
        window_us=round(settings.drawn_window_days * DAY_US),
        uniform_ratio=settings.drawn_uniform_ratio,
        num_items=len(job.ids),
        time_resolution=settings.time_resolution,
    )
    items = np.concatenate([positives.item[:, None], negatives], 1)  # (n, 1 + num)
    sample, slot = np.nonzero(items >= 0)
    cutoff = cutoffs(positives.time, settings.time_resolution)[sample]
    history = behaviors_before(positives, positives.user[sample], cutoff, settings.max_behaviors)
    request = _join("p", pa.array(positives.seq[sample]))
    columns = {
        "impression_id": pc.binary_join_element_wise(request, pa.array(slot).cast(pa.string()), "-"),
        "request_id": request,
        "label": pa.array((slot == 0).astype(np.int8)),
        "drawn": pa.array(slot > 0),
        **_features(table, _rows_of(log, positives)[sample]),
        **_shared_columns(positives.user[sample], positives.time[sample], items[sample, slot], users, job),
        **_behavior_columns(history, job.ids),
    }
    return complete(columns, len(sample), _schema(table))


def _pairs(positives: UserEvents, users: pa.Array, job: PartJob) -> pa.Table:
    window_us = round(job.settings.pair_window_days * DAY_US)
    query, bought = built_pairs(positives, window_us, job.split.validation_start, job.has_image)
    item = positives.item[bought]
    only_clicks = set(job.settings.pair_events) == {"click"}
    columns = {
        "query_item_id": job.ids.take(pa.array(positives.item[query])),
        "item_id": job.ids.take(pa.array(item)),
        "category": job.categories.take(pa.array(item)),
        "signal": pa.array(["click" if only_clicks else "purchase"] * len(item), pa.string()),
        "timestamp": pa.array(positives.time[bought]).cast(TIME),
        "user_id": users.take(pa.array(positives.user[bought])),
        "built": pa.array(np.ones(len(item), bool)),
    }
    return complete(columns, len(item), INTEREST_PAIRS.schema).sort_by("timestamp")


def _shared_columns(
    user: np.ndarray, time: np.ndarray, item: np.ndarray, users: pa.Array, job: PartJob
) -> dict[str, pa.Array]:
    return {
        "user_id": users.take(pa.array(user)),
        "timestamp": pa.array(time).cast(TIME),
        "item_id": job.ids.take(pa.array(item)),
        "split": pa.array(SPLITS).take(pa.array(job.split.of(time))),
    }


def _schema(events: pa.Table) -> pa.Schema:
    """Of impressions made from these events."""
    return pa.schema([*IMPRESSIONS.schema, *(field for field in events.schema if field.name not in EVENTS.names)])


def _features(events: pa.Table, rows: np.ndarray) -> dict[str, pa.ChunkedArray]:
    return {name: events[name].take(pa.array(rows)) for name in events.column_names if name not in EVENTS.names}


def _rows_of(log: UserEvents, some: UserEvents) -> np.ndarray:
    """The row in `log` of each of some of its events."""
    order = np.argsort(log.seq)
    return order[np.searchsorted(log.seq[order], some.seq)]


def _impression_names(given: pa.ChunkedArray, impressions: UserEvents, ids: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Unique impression ids, and request ids: an id under which a user was shown several items is the request's."""
    given = given.combine_chunks()
    rows = _join("row", pa.array(impressions.seq))
    codes = impressions.user * (impressions.impression.max(initial=0) + 2) + impressions.impression + 1
    _, inverse, times = np.unique(codes, return_inverse=True, return_counts=True)
    several = pa.array((times[inverse.reshape(-1)] > 1) & (impressions.impression >= 0))
    both = pc.binary_join_element_wise(given, ids.take(pa.array(impressions.item)), "/")
    names = pc.coalesce(pc.if_else(several, both, given), rows)
    return names, pc.if_else(several, given, pa.scalar(None, pa.string()))


def _behavior_columns(history: History, ids: pa.Array) -> dict[str, pa.Array]:
    items, times, offsets = history.lists()
    starts = pa.array(offsets.astype(np.int32))
    texts = ids.take(pa.array(items)).cast(pa.string())
    return {
        "behaviors": pa.ListArray.from_arrays(starts, texts),
        "behavior_times": pa.ListArray.from_arrays(starts, pa.array(times).cast(TIME)),
    }


def _join(prefix: str, numbers: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(pa.scalar(prefix), numbers.cast(pa.string()), "")
