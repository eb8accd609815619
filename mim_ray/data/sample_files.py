"""The files that the samples stage leaves, and what is counted while they are written."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mim_ray import artifacts
from mim_ray.data.queries import with_query_ids, write_queries
from mim_ray.data.schema import SPLITS, TIME

IMPRESSION_GROUP, PAIR_GROUP = 2_048, 512  # rows: the units that training shuffles
BEHAVIORS = pa.schema(
    [("user_id", pa.string()), ("behaviors", pa.list_(pa.string())), ("behavior_times", pa.list_(TIME))]
)
PART_RESULT = pa.schema(
    [
        ("train_items", pa.list_(pa.string())),
        ("train_first", pa.list_(pa.int64())),
        ("train_positives", pa.list_(pa.int64())),
        ("test_items", pa.list_(pa.string())),
        ("test_rows", pa.list_(pa.int64())),
        ("test_positives", pa.list_(pa.int64())),
        ("counts", pa.string()),
        ("rejects", pa.string()),
    ]
)


class Tallies:
    """What is counted while impressions are written: positives of train and rows of test by item, sizes of the splits."""

    def __init__(self) -> None:
        self._train: list[pa.Table] = []
        self._test: list[pa.Table] = []
        self._counts: dict[str, int] = {}

    def add(self, split: str, rows: pa.Table) -> None:
        labels = pc.fill_null(pc.equal(rows["label"], 1), False)
        slim = pa.table(
            {"item": rows["item_id"], "time": rows["timestamp"].cast(pa.int64()), "label": labels.cast(pa.int64())}
        )
        num, positive = rows.num_rows, int(pc.sum(slim["label"]).as_py() or 0)
        for name, count in ((f"{split} rows", num), (f"{split} positives", positive)):
            self._counts[name] = self._counts.get(name, 0) + count
        if split == "train":
            positives = slim.filter(labels)
            self._train.append(positives.group_by("item").aggregate([("time", "min"), ("label", "sum")]))
        elif split == "test":
            self._test.append(slim.group_by("item").aggregate([("label", "count"), ("label", "sum")]))

    def result(self, counts: dict[str, int], rejects: list[tuple[str, str, str]]) -> pa.Table:
        """One row of PART_RESULT."""
        row: dict[str, Any] = {"counts": json.dumps({**counts, **self._counts}), "rejects": json.dumps(rejects)}
        for prefix, tables, names in (
            ("train", self._train, ("first", "positives")),
            ("test", self._test, ("rows", "positives")),
        ):
            joined = pa.concat_tables(tables) if tables else None
            row[f"{prefix}_items"] = [] if joined is None else joined["item"].to_pylist()
            columns = ("time_min", "label_sum") if prefix == "train" else ("label_count", "label_sum")
            for name, column in zip(names, columns, strict=True):
                row[f"{prefix}_{name}"] = [] if joined is None else joined[column].to_pylist()
        return pa.Table.from_pylist([row], schema=PART_RESULT)


def write_impressions(samples: pa.Table, output: str, part: int, tallies: Tallies) -> None:
    """One file per split, in the order of time, and the queries; `samples` has the column split."""
    samples, queries = with_query_ids(samples)
    write_queries(queries, output, f"{part:05d}")
    for split in SPLITS:
        rows = samples.filter(pc.equal(samples["split"], split)).sort_by("timestamp")
        if rows.num_rows:
            tallies.add(split, rows)
            write_parquet(f"{output}/impressions/{split}/part-{part:05d}.parquet", rows, IMPRESSION_GROUP)


def write_parquet(uri: str, table: pa.Table, group: int) -> None:
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=group, compression="zstd")
    artifacts.write_bytes(uri, sink.getvalue())
