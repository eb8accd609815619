"""The user's own impressions and pairs are obeyed, and no test row is lost."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_ray.config.scenario import Data, Samples
from mim_ray.data.event_log import Items
from mim_ray.data.ids import IdIndex
from mim_ray.data.own_tables import own_split, write_own_impressions
from mim_ray.data.pairs import write_own_pairs
from mim_ray.data.schema import IMPRESSIONS, INTEREST_PAIRS
from mim_ray.data.sources import shards
from mim_ray.errors import DataError

DAY = 86_400_000_000


def impression(number, **changes):
    row = {"impression_id": f"i{number}", "user_id": "u", "timestamp": (number + 1) * DAY, "item_id": "a", "label": 0}
    return row | {"behaviors": ["x", "y", "z"]} | changes


def shards_of(tmp_path, rows, schema=IMPRESSIONS, drop=()):
    full = [{name: row.get(name) for name in schema.schema.names} for row in rows]
    table = pa.Table.from_pylist(full, schema=schema.schema).drop_columns(list(drop))
    pq.write_table(table, tmp_path / f"{schema.name}.parquet")
    return shards(str(tmp_path / f"{schema.name}.parquet"), schema.name)


def written(tmp_path, parts, split, settings=None):
    for number, part in enumerate(parts):
        result = write_own_impressions(part, number, split, settings or Samples(), str(tmp_path / "out"))
    rows = {}
    for name in ("train", "validation", "test"):
        folder = tmp_path / "out" / "impressions" / name
        rows[name] = pq.read_table(folder).to_pylist() if folder.exists() else []
    return rows, result


def test_the_split_column_is_obeyed_and_every_test_row_stays(tmp_path):
    rows = [
        impression(0, split="train", label=1, behaviors=["a", "b", "c"]),
        impression(1, split="train", label=None),
        impression(2, split="train", label=3),
        impression(3, split="validation"),
        impression(4, split="test", item_id="never seen", label=1),
        impression(5, split="test", user_id=None, behaviors=None),
        impression(6, split="test", label=None, timestamp=None),
        impression(7, split="train", impression_id=None),
    ]
    parts = shards_of(tmp_path, rows)
    split = own_split(parts, Samples())
    assert split.not_by_time  # row 7
    out, (result, newest, rejects) = written(tmp_path, parts, split, Samples(max_behaviors=2))
    assert [row["impression_id"] for row in out["train"]] == ["i0"]
    assert out["train"][0]["behaviors"] == ["b", "c"]
    assert [row["impression_id"] for row in out["validation"]] == ["i3"]
    assert sorted(row["impression_id"] for row in out["test"]) == ["i4", "i5", "i6"]
    test = {row["impression_id"]: row for row in out["test"]}
    assert (test["i5"]["user_id"], test["i5"]["behaviors"]) == ("", [])
    assert test["i6"]["label"] is None
    assert rejects["reason"].to_pylist() == ["label is not 0 or 1", "label is not 0 or 1", "no impression id"]
    row = result.to_pylist()[0]
    assert (row["train_items"], row["train_positives"]) == (["a"], [1])
    assert sorted(zip(row["test_items"], row["test_rows"], row["test_positives"], strict=True)) == [
        ("a", 2, 0),
        ("never seen", 1, 1),
    ]
    assert {r["user_id"]: r["timestamp"].day for r in newest.to_pylist()} == {"u": 6, "": 7}


def test_without_validation_rows_the_last_part_of_train_serves(tmp_path):
    rows = [impression(i, split="train" if i < 80 else "test") for i in range(100)]
    parts = shards_of(tmp_path, rows)
    split = own_split(parts, Samples(validation_ratio=0.25))
    assert not split.not_by_time
    out, _ = written(tmp_path, parts, split)
    assert [len(out[name]) for name in ("train", "validation", "test")] == [60, 20, 20]
    given = own_split(parts, Samples(validation_start="1970-01-11"))
    assert given.by_time.validation_start == 10 * DAY


def test_without_a_split_column_the_split_is_by_time(tmp_path):
    parts = shards_of(tmp_path, [impression(i) for i in range(100)] + [impression(100, timestamp=None)], drop=["split"])
    out, (_, _, rejects) = written(tmp_path, parts, own_split(parts, Samples()))
    assert [len(out[name]) for name in ("train", "validation", "test")] == [70, 10, 20]
    assert rejects["reason"].to_pylist() == ["no usable timestamp"]


def test_wrong_split_words_are_named(tmp_path):
    with pytest.raises(DataError, match=r"holds \['dev'\]"):
        own_split(shards_of(tmp_path, [impression(0, split="dev")]), Samples())
    with pytest.raises(DataError, match="names no test rows"):
        own_split(shards_of(tmp_path, [impression(0, split="train")]), Samples())


def test_own_pairs_are_checked_and_cut_at_the_validation_start(tmp_path):
    base = {"item_id": "a", "signal": "purchase", "timestamp": DAY, "user_id": "u", "query_item_id": "b"}
    rows = [
        base,
        base | {"timestamp": 5 * DAY},
        base | {"item_id": "zzz"},
        base | {"query_item_id": None},
        base | {"query_image": b"junk"},
        base | {"user_id": None},
        base | {"category": "own", "signal": "click"},
    ]
    (part,) = shards_of(tmp_path, rows, INTEREST_PAIRS)
    items = Items(IdIndex(pa.array(["a", "b"])), np.zeros(2, np.int64))
    counts, rejects = write_own_pairs(
        part, 0, items, pa.array(["ca", None]), Samples(), Data(), 5 * DAY, str(tmp_path / "out")
    )
    pairs = pq.read_table(tmp_path / "out" / "interest_pairs").to_pylist()
    assert [(p["item_id"], p["query_item_id"], p["category"], p["signal"]) for p in pairs] == [
        ("a", "b", "ca", "purchase"),
        ("a", "b", "own", "click"),
    ]
    assert counts == {"interest pairs": 2, "interest pairs after train": 1}
    assert rejects["reason"].to_pylist() == ["unknown item", "no query image", "image format", "no user id"]
