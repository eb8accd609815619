"""Raw events, checked one by one: which items exist, which events are positive, which rows cannot be used."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray.config.scenario import Samples
from mim_ray.data.features import features_in
from mim_ray.data.ids import IdIndex, hash_ids
from mim_ray.data.rejects import reject_rows
from mim_ray.data.schema import TIME
from mim_ray.data.sources import Shard

STAGE = "samples"
DAY_US = 86_400_000_000
UNKNOWN_TIME = np.iinfo(np.int64).max
POSITIVE, PAIR, SHOWN, SEARCHED = 1, 2, 4, 8  # bits of the column `kind`

EVENT_COLUMNS = ("user_id", "item_id", "event", "rating", "timestamp")
EVENTS = pa.schema(
    [
        ("part", pa.int32()),  # users' hash modulo the number of parts
        ("user_id", pa.string()),
        ("item", pa.int64()),  # row in the catalogue
        ("time", pa.int64()),  # microseconds UTC
        ("seq", pa.int64()),  # number of the row in the log: breaks ties of time
        ("kind", pa.int8()),
        ("impression_id", pa.string()),
        ("query_text", pa.string()),
        ("query_image", pa.binary()),  # of impressions only
        ("revenue", pa.float64()),
    ]
)


@dataclass
class Items:
    """What the checks know of the items: 24 bytes and the id of each.

    Attributes:
        created: (num_items,) microseconds as given by the catalogue, UNKNOWN_TIME where it is not.
    """

    index: IdIndex
    created: np.ndarray


@dataclass
class ShardStats:
    """What one shard of the log says about the whole.

    Attributes:
        first_seen: items that occur and the time of their first event.
        shown_times, positive_times: of an even sample of the impressions and positives.
        below_rating: events too low to be positive. num_searches: usable image searches.
    """

    rejects: pa.Table
    first_seen: tuple[np.ndarray, np.ndarray]
    shown_times: np.ndarray
    positive_times: np.ndarray
    counts: dict[str, int] = field(default_factory=dict)


def clean_shard(
    shard: Shard, items: Items, settings: Samples, num_parts: int, stride: int
) -> tuple[pa.Table, tuple[np.ndarray, np.ndarray], ShardStats]:
    """Check the events of one shard.

    Returns:
        the usable rows (EVENTS and declared features), (time, item) of the positives in the order of time, and ShardStats.
    """
    features = features_in(shard.table.schema, "interactions")
    columns = [*EVENT_COLUMNS, "impression_id", "query_text", "query_image", "revenue", *(f.name for f in features)]
    rows = shard.read(columns)
    checked = check_events(rows, shard, items, settings)
    keep, kind = checked.keep, checked.kind
    kept = rows.filter(pa.array(keep))
    kind, item, times = kind[keep], checked.item[keep], checked.time[keep]
    seq = (np.arange(rows.num_rows) + shard.first_row)[keep]
    shown = kind & SHOWN != 0
    part = (hash_ids(kept["user_id"]) % np.uint64(num_parts)).astype(np.int32)
    images = pc.if_else(pa.array(shown), kept["query_image"], pa.scalar(None, pa.binary()))
    events = pa.table(
        [
            pa.array(part),
            kept["user_id"],
            pa.array(item),
            pa.array(times),
            pa.array(seq),
            pa.array(kind.astype(np.int8)),
            kept["impression_id"],
            kept["query_text"],
            images,
            kept["revenue"],
            *(kept[f.name] for f in features),
        ],
        schema=pa.schema([*EVENTS, *features]),
    )
    positive = np.flatnonzero(kind & POSITIVE)
    in_time = positive[np.argsort(times[positive], kind="stable")]
    unique, first = _first_times(item, times)
    sampled = seq % stride == 0
    stats = ShardStats(
        rejects=checked.rejects,
        first_seen=(unique, first),
        shown_times=times[shown & sampled],
        positive_times=times[(kind & POSITIVE != 0) & sampled],
        counts={
            "events": rows.num_rows,
            "usable events": len(kind),
            "positives": len(positive),
            "impression events": int(shown.sum()),
            "image searches": int(((kind & PAIR != 0) & (kind & SEARCHED != 0)).sum()),
            "events below samples.min_rating": checked.below_rating,
        },
    )
    return events, (times[in_time], item[in_time]), stats


def signals(events: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """`click` stays click; every other event counts as the strong signal, purchase."""
    return pc.if_else(pc.equal(events, "click"), "click", "purchase")


def complete(columns: dict[str, pa.Array | pa.ChunkedArray], num_rows: int, schema: pa.Schema) -> pa.Table:
    """A table of `schema`; columns that are not given are null."""
    filled = [columns[f.name].cast(f.type) if f.name in columns else pa.nulls(num_rows, f.type) for f in schema]
    return pa.table(filled, schema=schema)


@dataclass
class Checked:
    """What is known of each row of a shard; `kind` are the bits above, `item` is -1 where it is unknown."""

    keep: np.ndarray
    item: np.ndarray
    time: np.ndarray
    kind: np.ndarray
    rejects: pa.Table
    below_rating: int


def check_events(rows: pa.Table, shard: Shard, items: Items, settings: Samples) -> Checked:
    """Decide for each row whether it can be used and what it says; `rows` has EVENT_COLUMNS."""
    item = items.index.rows(rows["item_id"])
    times = times_us(rows["timestamp"])
    created = np.append(items.created, UNKNOWN_TIME)[item]
    if settings.time_resolution == "day":
        early = (created != UNKNOWN_TIME) & (times // DAY_US < created // DAY_US)
    else:
        early = (created != UNKNOWN_TIME) & (times < created)
    reasons = [
        ("no user id", is_blank(rows["user_id"])),
        ("no item id", is_blank(rows["item_id"])),
        ("no event name", is_blank(rows["event"])),
        *bad_times(times),
        ("unknown item", item < 0),
        ("event before its item existed", early),
    ]
    why = np.full(rows.num_rows, -1, np.int64)
    for number in range(len(reasons) - 1, -1, -1):  # the first reason of the list wins
        why[reasons[number][1]] = number
    bad = np.flatnonzero(why >= 0)
    ids, at = rows["item_id"].take(pa.array(bad)).to_pylist(), times[bad].tolist()
    rejects = reject_rows(
        STAGE,
        "interactions",
        [
            (str(row + shard.first_row), reasons[why[row]][0], f"item {name!r} at {when_text(when)}, row of {shard.source}")
            for row, name, when in zip(bad.tolist(), ids, at, strict=True)
        ],
    )  # fmt: skip
    rating_ok = np.ones(rows.num_rows, bool)
    if settings.min_rating is not None:
        rating_ok = np.asarray(pc.fill_null(pc.greater_equal(rows["rating"], settings.min_rating), True))
    searched = np.asarray(rows["query_image"].is_valid()) if "query_image" in rows.column_names else rating_ok & False
    positive, pair = is_in(rows["event"], settings.positive_events), is_in(rows["event"], settings.pair_events)
    shown = is_in(rows["event"], (settings.impression_event,))
    kind = (
        POSITIVE * (positive & rating_ok) + PAIR * (pair & rating_ok) + SHOWN * shown + SEARCHED * searched
    )  # bits, so plus is or
    below = int(((positive | pair) & ~rating_ok & (why < 0)).sum())
    return Checked(why < 0, item, times, kind.astype(np.int64), rejects, below)


def times_us(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Microseconds of a TIME column; UNKNOWN_TIME for nulls."""
    return np.asarray(column.cast(TIME).cast(pa.int64()).fill_null(UNKNOWN_TIME)).astype(np.int64)


def bad_times(times: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Reasons and masks of times that cannot be: missing, at or before 1970, more than a day ahead of this machine."""
    ahead = int((time.time() + 86_400) * 1_000_000)
    return [
        ("no timestamp", times == UNKNOWN_TIME),
        ("timestamp before 1970", times <= 0),
        ("timestamp in the future", (times > ahead) & (times != UNKNOWN_TIME)),
    ]


def is_blank(column: pa.ChunkedArray) -> np.ndarray:
    """(n,) bool: null, empty or only white space."""
    return np.asarray(pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0), True))


def is_in(column: pa.ChunkedArray, values: tuple[str, ...]) -> np.ndarray:
    return np.asarray(pc.fill_null(pc.is_in(column, pa.array(values, pa.string())), False))


def when_text(us: int) -> str:
    """A time as a person reads it, in details of rejects."""
    if us == UNKNOWN_TIME or not 0 < us < 4 * 10**15:
        return "an impossible time" if us != UNKNOWN_TIME else "no time"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(us // 1_000_000))


def _first_times(item: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((times, item))
    unique, place = np.unique(item[order], return_index=True)
    return unique, times[order][place]
