"""The user's own impressions, which replace the built ones: checked, split, never thinned out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray.config.scenario import Samples
from mim_ray.data.event_log import (
    STAGE,
    UNKNOWN_TIME,
    bad_times,
    complete,
    is_blank,
    is_in,
    times_us,
)
from mim_ray.data.features import num_missing
from mim_ray.data.own_behaviors import past_behaviors
from mim_ray.data.rejects import reject_rows
from mim_ray.data.sample_files import BEHAVIORS, Tallies, write_impressions
from mim_ray.data.schema import SPLITS
from mim_ray.data.sources import Shard
from mim_ray.data.splits import Split, split_by_time
from mim_ray.errors import DataError


@dataclass(frozen=True)
class OwnSplit:
    """How an own impressions table is split.

    Attributes:
        column: its split column is obeyed. by_time: rows that the column does not settle (train rows from the validation
            start on, where the column names no validation rows; all rows without a column).
        not_by_time: rows of train are later than the first ones of validation or test.
    """

    column: bool
    takes_validation: bool
    by_time: Split
    not_by_time: bool


def own_split(shards: list[Shard], settings: Samples) -> OwnSplit:
    """
    Raises:
        DataError: the split column holds other words than train, validation and test, or no test or train rows.
    """
    rows = pa.concat_tables([shard.read(["timestamp", "split"]) for shard in shards])
    times, known = times_us(rows["timestamp"]), ~_bad(times_us(rows["timestamp"]))
    if rows["split"].null_count == rows.num_rows:
        return OwnSplit(False, False, split_by_time(times[known], settings), False)
    words = set(pc.unique(rows["split"]).to_pylist())
    if words - set(SPLITS):
        raise DataError(
            f"{shards[0].source}: the split column holds {sorted(map(str, words - set(SPLITS)))}. "
            f"Use {', '.join(SPLITS)} in every row, or leave the column out to split by time."
        )
    of = {name: times[np.asarray(pc.equal(rows["split"], name)) & known] for name in SPLITS}
    if not len(of["train"]) or "test" not in words:
        raise DataError(
            f"{shards[0].source}: the split column names no {'test' if len(of['train']) else 'train'} rows."
        )
    takes_validation = "validation" not in words
    if takes_validation:
        in_train = settings.model_copy(
            update={"test_ratio": 0.0, "test_start": None, "validation_ratio": settings.validation_ratio}
        )
        validation = split_by_time(of["train"], in_train).validation_start
    else:
        validation = int(min(of["validation"].min(initial=UNKNOWN_TIME), of["test"].min(initial=UNKNOWN_TIME)))
    test = int(of["test"].min(initial=UNKNOWN_TIME))
    not_by_time = bool(of["train"].max() >= min(test, UNKNOWN_TIME if takes_validation else validation))
    return OwnSplit(True, takes_validation, Split(min(validation, test), test), not_by_time)


def write_own_impressions(
    shard: Shard, number: int, split: OwnSplit, settings: Samples, output: str
) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Write one shard of the user's impressions.

    A test row is never dropped: a missing user id becomes "", a missing label stays null, unknown items stay. Train and
    validation rows without a label of 0 or 1, and rows that cannot be placed in time without a split, are rejected.

    Returns:
        one row of PART_RESULT, the newest behaviors of each user in this shard with their time, and the rejects.
    """
    rows = shard.read()
    times = times_us(rows["timestamp"])
    if split.column:
        names = rows["split"]
        if split.takes_validation:
            late = pa.array(times >= split.by_time.validation_start)
            names = pc.if_else(pc.and_(pc.equal(names, "train"), late), "validation", names)
    else:
        names = pa.chunked_array([pa.array(SPLITS).take(pa.array(split.by_time.of(times)))])
    label = np.asarray(pc.fill_null(rows["label"], -1))
    test = is_in(names, ("test",))
    bad_label = ~np.isin(label, (0, 1))
    untimed = _bad(times) & (not split.column)
    reasons = np.where(is_blank(rows["impression_id"]), "no impression id", "")
    reasons = np.where(untimed, "no usable timestamp", reasons)
    reasons = np.where((reasons == "") & bad_label & ~test, "label is not 0 or 1", reasons)
    bad = np.flatnonzero(reasons != "")
    rejects = reject_rows(
        STAGE,
        "impressions",
        [(str(row + shard.first_row), str(reasons[row]), f"row of {shard.source}") for row in bad.tolist()],
    )
    behaviors, counts = past_behaviors(rows["behaviors"], rows["behavior_times"], times, settings)
    columns = {name: rows[name] for name in rows.column_names}
    columns |= {
        "user_id": pc.fill_null(rows["user_id"], ""),
        "label": pc.if_else(pa.array(bad_label), pa.scalar(None, pa.int8()), rows["label"]),
        **behaviors,
        "split": names,
        "drawn": pc.fill_null(rows["drawn"], False),
    }
    kept = complete(columns, rows.num_rows, shard.table.schema).filter(pa.array(reasons == ""))
    tallies = Tallies()
    write_impressions(kept, output, number, tallies)
    counts["test rows without label"] = int((bad_label & test & (reasons == "")).sum())
    counts |= num_missing(kept)
    newest = newest_of_users(kept.select(["timestamp", *BEHAVIORS.names]))
    return tallies.result(counts, []), newest, rejects


def newest_of_users(rows: pa.Table) -> pa.Table:
    """Of each user the row with the latest timestamp (columns user_id, timestamp, …)."""
    rows = rows.take(pc.sort_indices(rows, [("timestamp", "ascending", "at_start")]))
    numbered = pa.table({"user_id": rows["user_id"], "row": pa.array(np.arange(rows.num_rows))})
    last = numbered.group_by("user_id").aggregate([("row", "max")])["row_max"]
    return rows.take(pa.array(np.sort(np.asarray(last))))


def _bad(times: np.ndarray) -> np.ndarray:
    return np.any([mask for _, mask in bad_times(times)], axis=0)
