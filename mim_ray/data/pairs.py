"""Interest pairs that come with a query: from the log's image searches, or from the user's own table.

Pairs built from consecutive positives are made in user_samples.py.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray.config.scenario import Data, Samples
from mim_ray.data.event_log import (
    EVENT_COLUMNS,
    PAIR,
    SEARCHED,
    STAGE,
    Items,
    bad_times,
    check_events,
    complete,
    is_blank,
    signals,
    times_us,
)
from mim_ray.data.rejects import reject_rows
from mim_ray.data.sample_files import PAIR_GROUP, write_parquet
from mim_ray.data.schema import INTEREST_PAIRS
from mim_ray.data.sources import Shard
from mim_ray.data.transforms import BadImage, check_image


def write_search_pairs(
    shard: Shard,
    number: int,
    items: Items,
    categories: pa.Array,
    settings: Samples,
    data: Data,
    before: int,
    output: str,
) -> tuple[dict[str, int], pa.Table]:
    """Write the pairs of one shard of the log: its image searches from before `before` (microseconds).

    Returns:
        counts, and rejects for unusable query images (all other rejects were counted by clean_shard).
    """
    rows = shard.read([*EVENT_COLUMNS, "query_image"])
    checked = check_events(rows, shard, items, settings)
    wanted = np.flatnonzero(
        checked.keep & (checked.kind & PAIR != 0) & (checked.kind & SEARCHED != 0) & (checked.time < before)
    )
    usable, bad = [], []
    for row, image in zip(wanted.tolist(), rows["query_image"].take(pa.array(wanted)).to_pylist(), strict=True):
        try:
            check_image(image, data.max_image_bytes, data.max_image_pixels)
            usable.append(row)
        except BadImage as error:
            bad.append((str(row + shard.first_row), error.reason, f"query image: {error.detail}"))
    kept = rows.take(pa.array(usable, pa.int64()))
    pairs = {
        "query_image": kept["query_image"],
        "item_id": kept["item_id"],
        "category": categories.take(pa.array(checked.item[usable])),
        "signal": signals(kept["event"]),
        "timestamp": kept["timestamp"],
        "user_id": kept["user_id"],
        "built": pa.array(np.zeros(len(usable), bool)),
    }
    table = complete(pairs, len(usable), INTEREST_PAIRS.schema).sort_by("timestamp")
    if table.num_rows:
        write_parquet(f"{output}/interest_pairs/part-{number:05d}.parquet", table, PAIR_GROUP)
    return {"interest pairs": table.num_rows}, reject_rows(STAGE, "interactions", bad)


def write_own_pairs(
    shard: Shard,
    number: int,
    items: Items,
    categories: pa.Array,
    settings: Samples,
    data: Data,
    before: int,
    output: str,
) -> tuple[dict[str, int], pa.Table]:
    """Write the user's pairs of one shard that happened before `before` (microseconds); returns counts and rejects."""
    rows = shard.read()
    item, times = items.index.rows(rows["item_id"]), times_us(rows["timestamp"])
    query_item = items.index.rows(rows["query_item_id"])
    rejects: list[tuple[str, str, str]] = []
    keep = np.zeros(rows.num_rows, bool)
    blank = is_blank(rows["user_id"])
    untimed = np.any([mask for _, mask in bad_times(times)], axis=0)
    for row, image in enumerate(rows["query_image"].to_pylist()):
        key = str(row + shard.first_row)
        if item[row] < 0:
            rejects.append((key, "unknown item", f"row of {shard.source}"))
        elif untimed[row] or blank[row]:
            rejects.append((key, "no user id" if blank[row] else "no usable timestamp", f"row of {shard.source}"))
        elif image is None and query_item[row] < 0:
            rejects.append((key, "no query image", "neither query_image nor a known query_item_id"))
        else:
            try:
                if image is not None:
                    check_image(image, data.max_image_bytes, data.max_image_pixels)
                keep[row] = times[row] < before
            except BadImage as error:
                rejects.append((key, error.reason, f"query image: {error.detail}"))
    columns = {name: rows[name] for name in INTEREST_PAIRS.schema.names}
    given = pa.chunked_array([categories]).take(pa.array(np.maximum(item, 0)))
    columns |= {
        "category": pc.coalesce(rows["category"], given),
        "signal": signals(pc.fill_null(rows["signal"], "purchase")),
        "built": pc.fill_null(rows["built"], False),
    }
    pairs = complete(columns, rows.num_rows, INTEREST_PAIRS.schema).filter(pa.array(keep))
    write_parquet(f"{output}/interest_pairs/part-{number:05d}.parquet", pairs, PAIR_GROUP)
    late = rows.num_rows - len(rejects) - pairs.num_rows
    return {"interest pairs": pairs.num_rows, "interest pairs after train": late}, reject_rows(
        STAGE, "interest_pairs", rejects
    )
