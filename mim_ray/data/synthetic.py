"""The synthetic shop on disk: items with pictures and titles, an event stream, and the truth behind it.

    items.parquet/, interactions.parquet/     as a shop would hand them over; events in the order of time
    truth/impressions.parquet/                impression_id, prob: the true click probability
    truth/styles.parquet/                     item_id, style: the true style vector
    shop.json                                 the settings, and what came out: shares of variance, the oracle's AUC

`shop.py` says what the shop is; here its parts are made side by side by Ray tasks, each part on its own and alike however
often it is made. A test bed, not an advertisement: with `synthetic.style_share=0` content says nothing about clicks.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from mim_ray import artifacts
from mim_ray.config import Scenario
from mim_ray.data.ids import random_bits, uniform
from mim_ray.data.pictures import NUM_STYLES, PALETTES, PATTERNS, SHAPES, render, style_factors
from mim_ray.data.schema import TIME
from mim_ray.data.shop import SECOND_US, START_US, STYLE_WIDTH, ShopModel, sigmoid, style_vectors
from mim_ray.data.titles import noun, titles
from mim_ray.runtime.progress import Progress
from mim_ray.runtime.summary import StageResult

__all__ = ["ShopModel", "make_events", "make_items", "render", "run"]

_ITEM_GROUP, _EVENT_GROUP = 1_000, 50_000
_NUM_BINS = 4_000  # of the oracle's AUC
_CLICK_DELAY_S, _BUY_DELAY_S, _BUY_RATIO = (2.0, 90.0), (60.0, 1_500.0), 0.25
_MAX_DELAY_US = 1_600 * SECOND_US
# Streams of random numbers, apart from those of shop.py.
_TIME, _USER, _ITEM, _CLICK, _CLICK_AT, _BUY, _BUY_AT, _NO_IMAGE, _NO_TITLE, _PICTURE = range(100, 110)
_SEARCH_TIME, _SEARCH_USER, _SEARCH_STYLE, _SEARCH_BLOCK, _SEARCH_PICTURE, _SEARCH_NEAR, _SEARCH_CATEGORY = range(
    120, 127
)
_NUM_SHOWN, _NUM_SHOWN_EXACT = 9, 3  # items that a search shows, and those of exactly the wanted style


def run(scenario: Scenario, *, output: str) -> StageResult:
    """Make the shop of `scenario.synthetic` under the URI `output`."""
    settings = scenario.synthetic
    model = ShopModel(scenario.run.seed, settings)
    model.shares, model.intercept  # noqa: B018  (a wrong setting fails here, not in a task)
    item_parts = _ranges(settings.num_items, 10_000)
    event_parts = _ranges(settings.num_impressions, 200_000)
    item_tasks = {_write_items.remote(model, n, a, b, output): b - a for n, (a, b) in enumerate(item_parts)}
    event_tasks = {_write_events.remote(model, n, a, b, output): b - a for n, (a, b) in enumerate(event_parts)}
    _collect("make items", item_tasks, "items")
    counts = _collect("make events", event_tasks, "impressions")
    histogram = np.sum([part["histogram"] for part in counts], axis=0)  # (2, _NUM_BINS)
    moments = np.sum([part["moments"] for part in counts], axis=0)  # (3, 3): count, sum, sum of squares by part
    variances = moments[2] / moments[0] - (moments[1] / moments[0]) ** 2
    shares = {
        name: float(v / variances.sum())
        for name, v in zip(("style", "individual", "popularity"), variances, strict=True)
    }
    num = {
        name: sum(part[name] for part in counts) for name in ("impressions", "clicks", "purchases", "searches", "rows")
    }
    metrics: dict[str, Any] = {
        "num_items": settings.num_items,
        "num_users": settings.num_users,
        **{f"num_{name}": count for name, count in num.items()},
        "ctr": num["clicks"] / max(1, num["impressions"]),
        "oracle_auc": _auc(histogram),
        "variance_shares": shares,
        "logit_std": float(np.sqrt(variances.sum())),
        "intercept": model.intercept,
    }
    levels = {"shapes": SHAPES, "palettes": PALETTES, "patterns": PATTERNS}
    artifacts.write_json(
        f"{output}/shop.json", {"seed": model.seed, "settings": settings.model_dump(), "style": levels, **metrics}
    )
    rows = [
        ("items, users", f"{settings.num_items:,}, {settings.num_users:,}"),
        ("impressions", f"{num['impressions']:,} over {settings.num_weeks} weeks, {metrics['ctr']:.1%} clicked"),
        ("purchases", f"{num['purchases']:,}, of which {num['searches']:,} after an image search"),
        ("variance of the logit", ", ".join(f"{share:.0%} {name}" for name, share in shares.items())),
        ("AUC of the true probability", f"{metrics['oracle_auc']:.4f}"),
    ]
    return StageResult(metrics=metrics, rows=rows)


def make_items(model: ShopModel, start: int, stop: int) -> pa.Table:
    """Rows of the items table for items `start` … `stop` - 1."""
    settings, numbers = model.settings, np.arange(start, stop)
    styles, categories = model.styles(numbers), model.categories(numbers)
    keys = random_bits(model.seed, _PICTURE, numbers)
    no_image = uniform(model.seed, _NO_IMAGE, numbers) < settings.missing_image_ratio
    no_title = uniform(model.seed, _NO_TITLE, numbers) < settings.missing_title_ratio
    images = [
        None if gone else render(int(style), int(category), int(key), settings.image_size)
        for gone, style, category, key in zip(no_image, styles, categories, keys, strict=True)
    ]
    return pa.table(
        {
            "item_id": item_ids(numbers),
            "title": pa.array(
                titles(model.seed, numbers, styles, categories, settings.title_style_ratio), mask=no_title
            ),
            "category": [noun(category) for category in categories.tolist()],
            "image": pa.array(images, pa.binary()),
            "created_at": pa.array(model.created_us(numbers), TIME),
            "attributes": [json.dumps({"price": price}) for price in model.prices(numbers).tolist()],
        }
    )


def make_events(model: ShopModel, start: int, stop: int) -> tuple[pa.Table, pa.Table, dict[str, Any]]:
    """The events between the times of impressions `start` and `stop`.

    Returns:
        rows of the interactions table in the order of time, the truth (impression_id, prob) of impressions `start` …
        `stop` - 1, and counts for the summary.
    """
    settings = model.settings
    step = model.duration_us / settings.num_impressions
    begin = -np.inf if start == 0 else START_US + start * step
    end = np.inf if stop == settings.num_impressions else START_US + stop * step

    early = max(0, start - int(_MAX_DELAY_US / step) - 1)  # their clicks may fall into this part
    numbers = np.arange(early, stop)
    times = (START_US + (numbers + uniform(model.seed, _TIME, numbers)) * step).astype(np.int64)
    users = (uniform(model.seed, _USER, numbers) ** 1.6 * settings.num_users).astype(np.int64)
    existing = model.num_existing(times)
    items = existing - 1 - (uniform(model.seed, _ITEM, numbers) ** 1.3 * existing).astype(np.int64)  # newer ones more
    parts = model.logit_parts(users, items)
    probs = sigmoid(model.intercept + parts.sum(-1))
    clicked = uniform(model.seed, _CLICK, numbers) < probs
    bought = clicked & (uniform(model.seed, _BUY, numbers) < _BUY_RATIO)
    click_times = times + _delay(model, _CLICK_AT, numbers, _CLICK_DELAY_S)
    buy_times = click_times + _delay(model, _BUY_AT, numbers, _BUY_DELAY_S)
    own = numbers >= start

    shown = impression_ids(numbers)
    pieces = [_events("impression", own, times, users, items, shown)]
    for name, done, at in (("click", clicked, click_times), ("purchase", bought, buy_times)):
        inside = done & (at >= begin) & (at < end)
        revenue = model.prices(items) if name == "purchase" else None
        pieces.append(_events(name, inside, at, users, items, shown, revenue=revenue))
    searches = _searches(model, begin, end)
    table = pa.concat_tables([*pieces, searches]).sort_by("timestamp")
    histogram = np.zeros((2, _NUM_BINS), np.int64)
    np.add.at(histogram, (clicked[own].astype(int), (probs[own] * _NUM_BINS).astype(int)), 1)
    counts = {
        "impressions": int(own.sum()),
        "clicks": int((clicked & own).sum()),
        "purchases": pieces[2].num_rows + searches.num_rows,
        "searches": searches.num_rows,
        "rows": table.num_rows,
        "histogram": histogram.tolist(),
        "moments": [[int(own.sum())] * 3, parts[own].sum(0).tolist(), (parts[own] ** 2).sum(0).tolist()],
    }
    truth = pa.table({"impression_id": shown.filter(pa.array(own)), "prob": probs[own]})
    return table, truth, counts


def item_ids(numbers: np.ndarray) -> pa.Array:
    return _named("item-", numbers, 8)


def impression_ids(numbers: np.ndarray) -> pa.Array:
    return _named("imp-", numbers, 10)


def _searches(model: ShopModel, begin: float, end: float) -> pa.Table:
    """Image searches in [begin, end): the user wants a style by taste, and buys one of the items that the search shows.

    The style is drawn by softmax over the user's style logits; the picture shows it on a thing of any category. Shown are items from random parts of the catalogue:
    some of that very style, and more that differ from it in one factor. The one with the largest click logit is bought;
    where the catalogue is too young for this, the item of the nearest style.
    """
    settings = model.settings
    step = model.duration_us / max(1, settings.num_image_searches)
    low = 0 if begin == -np.inf else max(0, int((begin - START_US) / step) - 1)
    high = (
        settings.num_image_searches
        if end == np.inf
        else min(settings.num_image_searches, int((end - START_US) / step) + 2)
    )
    numbers = np.arange(low, max(low, high))
    times = (START_US + (numbers + uniform(model.seed, _SEARCH_TIME, numbers)) * step).astype(np.int64)
    inside = (times >= begin) & (times < end)
    numbers, times = numbers[inside], times[inside]
    users = (uniform(model.seed, _SEARCH_USER, numbers) ** 1.6 * settings.num_users).astype(np.int64)
    taste = model.style_taste(users[:, None], np.arange(NUM_STYLES)[None, :])  # (n, NUM_STYLES)
    chances = np.exp(taste * np.sqrt(model.shares[0]) * settings.logit_std)
    reached = np.cumsum(chances, 1) / chances.sum(1, keepdims=True)
    wanted = (reached < uniform(model.seed, _SEARCH_STYLE, numbers)[:, None]).sum(1)
    wanted = np.minimum(wanted, NUM_STYLES - 1)
    existing = model.num_existing(times)
    blocks = existing // NUM_STYLES
    shown = numbers[:, None] * _NUM_SHOWN + np.arange(_NUM_SHOWN)
    draws = uniform(model.seed, _SEARCH_BLOCK, shown)
    near = _one_factor_apart()
    other = near[wanted[:, None], (uniform(model.seed, _SEARCH_NEAR, shown) * near.shape[1]).astype(np.int64)]
    styles = np.where(np.arange(_NUM_SHOWN) < _NUM_SHOWN_EXACT, wanted[:, None], other)
    found = model.items_of_style(styles, (draws * blocks[:, None]).astype(np.int64))  # (n, _NUM_SHOWN)
    for row in np.flatnonzero(blocks == 0):  # only in a shop of few items
        some = np.arange(existing[row])
        equal = (style_factors(model.styles(some)) == style_factors(wanted[row])).sum(-1)
        found[row] = some[np.argmax(equal)]
    logits = model.click_logit(np.repeat(users, _NUM_SHOWN), found.reshape(-1)).reshape(-1, _NUM_SHOWN)
    items = np.take_along_axis(found, logits.argmax(1)[:, None], 1)[:, 0]
    keys = random_bits(model.seed, _SEARCH_PICTURE, numbers)
    categories = (uniform(model.seed, _SEARCH_CATEGORY, numbers) * settings.num_categories).astype(np.int64)
    images = [
        render(int(style), int(category), int(key), settings.image_size)
        for style, category, key in zip(wanted, categories, keys, strict=True)
    ]
    every = np.ones(len(numbers), bool)
    return _events("purchase", every, times, users, items, None, images=images, revenue=model.prices(items))


def _one_factor_apart() -> np.ndarray:
    """(NUM_STYLES, n) the styles that differ from each style in exactly one factor."""
    levels = style_factors(np.arange(NUM_STYLES))  # (NUM_STYLES, 3)
    apart = (levels[:, None] != levels[None]).sum(-1) == 1
    return np.stack([np.flatnonzero(row) for row in apart])


def _events(
    event: str,
    keep: np.ndarray,
    times: np.ndarray,
    users: np.ndarray,
    items: np.ndarray,
    impressions: pa.Array | None,
    *,
    images: list[bytes] | None = None,
    revenue: np.ndarray | None = None,
) -> pa.Table:
    num = int(keep.sum())
    return pa.table(
        {
            "user_id": _named("user-", users[keep], 7),
            "item_id": item_ids(items[keep]),
            "event": pa.array([event] * num, pa.string()),
            "timestamp": pa.array(times[keep], TIME),
            "impression_id": pa.nulls(num, pa.string()) if impressions is None else impressions.filter(pa.array(keep)),
            "query_image": pa.nulls(num, pa.binary()) if images is None else pa.array(images, pa.binary()),
            "revenue": pa.nulls(num, pa.float64()) if revenue is None else pa.array(revenue[keep]),
        }
    )


def _named(prefix: str, numbers: np.ndarray, digits: int) -> pa.Array:
    text = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), digits, "0")
    return pc.binary_join_element_wise(pa.scalar(prefix), text, "")


def _delay(model: ShopModel, stream: int, numbers: np.ndarray, seconds: tuple[float, float]) -> np.ndarray:
    low, high = seconds
    return ((low + (high - low) * uniform(model.seed, stream, numbers)) * SECOND_US).astype(np.int64)


def _auc(histogram: np.ndarray) -> float:
    """AUC of probabilities counted in bins (2, bins) of label 0 and 1; rows of one bin count as ties."""
    negatives, positives = histogram
    below = np.cumsum(negatives) - negatives
    pairs = int(negatives.sum()) * int(positives.sum())
    return float((positives * (below + 0.5 * negatives)).sum() / pairs) if pairs else float("nan")


def _ranges(total: int, largest: int) -> list[tuple[int, int]]:
    """[0, total) in about equal parts of at most `largest`; eight of them where there is little."""
    size = max(1, min(largest, -(-total // 8)))
    return [(start, min(total, start + size)) for start in range(0, total, size)]


@ray.remote
def _write_items(model: ShopModel, number: int, start: int, stop: int, output: str) -> dict[str, Any]:
    items = make_items(model, start, stop)
    _write(f"{output}/items.parquet/part-{number:05d}.parquet", items, _ITEM_GROUP)
    vectors = style_vectors(model.styles(np.arange(start, stop)))
    offsets = np.arange(0, vectors.size + 1, STYLE_WIDTH, dtype=np.int32)
    styles = pa.table({"item_id": items["item_id"], "style": pa.ListArray.from_arrays(offsets, vectors.reshape(-1))})
    _write(f"{output}/truth/styles.parquet/part-{number:05d}.parquet", styles, _EVENT_GROUP)
    return {"items": stop - start}


@ray.remote
def _write_events(model: ShopModel, number: int, start: int, stop: int, output: str) -> dict[str, Any]:
    events, truth, counts = make_events(model, start, stop)
    _write(f"{output}/interactions.parquet/part-{number:05d}.parquet", events, _EVENT_GROUP)
    _write(f"{output}/truth/impressions.parquet/part-{number:05d}.parquet", truth, _EVENT_GROUP)
    return counts


def _write(uri: str, table: pa.Table, group: int) -> None:
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=group, compression="zstd")
    artifacts.write_bytes(uri, sink.getvalue())


def _collect(label: str, tasks: dict[ray.ObjectRef, int], unit: str) -> list[dict[str, Any]]:
    results = {}
    wait: Callable[..., Any] = ray.wait
    with Progress(label, total=sum(tasks.values()), unit=unit) as progress:
        pending = list(tasks)
        while pending:
            done, pending = wait(pending)
            for task in done:
                results[task] = ray.get(task)
                progress.add(tasks[task])
    return [results[task] for task in tasks]
