"""The user's own impressions and pairs are obeyed, and no test row is lost."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_ray.config.scenario import Data, Feature, Samples
from mim_ray.data.event_log import Items
from mim_ray.data.features import feature_fields
from mim_ray.data.ids import IdIndex
from mim_ray.data.own_tables import own_split, write_own_impressions
from mim_ray.data.pairs import write_own_pairs
from mim_ray.data.schema import IMPRESSIONS, INTEREST_PAIRS, TIME
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


def test_behaviors_with_times_are_put_in_order_and_none_is_from_the_future(tmp_path):
    known = {"split": "train", "behaviors": ["x", "y", "z"]}  # of row n at day n + 1
    rows = [
        impression(9, **known, behavior_times=[DAY, 2 * DAY, 3 * DAY]),
        impression(9, **known, behavior_times=[3 * DAY, DAY, 2 * DAY]),  # unsorted
        impression(9, **known, behavior_times=[10 * DAY, 11 * DAY, 3 * DAY]),  # x at the same time, y later
        impression(9, **known, behavior_times=[DAY, 2 * DAY]),  # not one for each
        impression(9, **known, behavior_times=[DAY, None, 2 * DAY]),
        impression(9, **known, behavior_times=None),
        impression(9, split="train", behaviors=None, behavior_times=[]),
        impression(9, split="test", behaviors=["x", "y"], behavior_times=[DAY, 2 * DAY], timestamp=None),
    ]
    rows = [row | {"impression_id": f"i{number}"} for number, row in enumerate(rows)]
    parts = shards_of(tmp_path, rows)
    out, (result, newest, _) = written(tmp_path, parts, own_split(parts, Samples()), Samples(max_behaviors=2))
    made = {row["impression_id"]: (row["behaviors"], row["behavior_times"]) for row in out["validation"] + out["test"]}
    made = {name: (items, times and [time.day - 1 for time in times]) for name, (items, times) in made.items()}
    assert made == {
        "i0": (["y", "z"], [2, 3]),
        "i1": (["z", "x"], [2, 3]),
        "i2": (["z"], [3]),
        "i3": (["y", "z"], None),
        "i4": (["y", "z"], None),
        "i5": (["y", "z"], None),
        "i6": ([], []),
        "i7": (["x", "y"], [1, 2]),
    }
    counts = json.loads(result.to_pylist()[0]["counts"])
    assert counts["future behaviors dropped"] == 2
    assert counts["impressions with unsorted behaviors"] == 2
    assert counts["impressions without usable behavior times"] == 3
    assert newest.column_names == ["timestamp", "user_id", "behaviors", "behavior_times"]


def test_with_dates_a_behavior_of_the_same_day_is_not_past(tmp_path):
    times = [DAY, 9 * DAY, 9 * DAY + 1]
    rows = [impression(9, split="train", behavior_times=times, timestamp=9 * DAY + 5), impression(20, split="test")]
    parts = shards_of(tmp_path, rows)
    out, _ = written(tmp_path, parts, own_split(parts, Samples()), Samples(time_resolution="day"))
    assert [row["behaviors"] for row in out["validation"]] == [["x"]]


@pytest.mark.parametrize("kind", [pa.timestamp("ns"), pa.timestamp("ms", "Europe/Berlin"), pa.date32()])
def test_behavior_times_of_other_types_are_cast(tmp_path, kind):
    parts = shards_of(tmp_path, [impression(9, behavior_times=[DAY, 2 * DAY, 3 * DAY])])
    path = tmp_path / "impressions.parquet"
    table, given = pq.read_table(path), parts[0].read(["behavior_times"])
    times = pa.array([[DAY, 2 * DAY, 3 * DAY]], pa.list_(pa.int64())).cast(pa.list_(TIME)).cast(pa.large_list(kind))
    pq.write_table(table.set_column(table.schema.get_field_index("behavior_times"), "behavior_times", times), path)
    assert shards(str(path), "impressions")[0].read(["behavior_times"]).equals(given)


FIELDS = feature_fields(
    [Feature(name=name, kind=kind) for name, kind in (("device", "categorical"), ("price", "dense"), ("tags", "multi"))]
)


def with_columns(tmp_path, **columns):
    """Shards of an own table of two rows with these columns beside."""
    shards_of(tmp_path, [impression(0, split="train"), impression(1, split="test")])
    path = tmp_path / "impressions.parquet"
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.append_column(name, values)
    pq.write_table(table, path)
    return shards(str(path), "impressions", features=FIELDS)


def test_declared_features_are_carried_and_what_lacks_them_is_counted(tmp_path):
    columns = {"device": pa.array([3, None]), "price": pa.array([1, 2]), "other": pa.array([0, 0])}
    columns["tags"] = pa.array([[1, 2], None], pa.large_list(pa.int64()))
    parts = with_columns(tmp_path, **columns)
    out, (result, *_) = written(tmp_path, parts, own_split(parts, Samples()))
    rows = out["validation"] + out["train"] + out["test"]
    assert [(row["device"], row["price"], row["tags"]) for row in rows] == [("3", 1.0, ["1", "2"]), (None, 2.0, None)]
    assert "other" not in rows[0]
    counts = json.loads(result.to_pylist()[0]["counts"])
    assert counts["impressions without device"] == counts["impressions without tags"] == 1
    assert "impressions without price" not in counts
    parts = with_columns(tmp_path, **columns | {"price": pa.array([float("nan"), float("inf")])})
    _, (result, *_) = written(tmp_path, parts, own_split(parts, Samples()))
    assert json.loads(result.to_pylist()[0]["counts"])["impressions without price"] == 2


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("device", pa.array([0.5, 1.5]), "column 'device' is double, but must be string"),
        ("price", pa.array(["cheap", "dear"]), "column 'price' is string, but must be double"),
        ("tags", pa.array(["x", "y"]), "column 'tags' is string, but must be list"),
        ("price", None, "has no column 'price'"),
    ],
)
def test_a_feature_of_another_type_or_without_its_column_is_a_sentence(tmp_path, name, values, said):
    columns = {"device": pa.array(["a", "b"]), "price": pa.array([1.0, 2.0]), "tags": pa.array([["x"], []])}
    columns[name] = values
    with pytest.raises(DataError, match=said):
        with_columns(tmp_path, **{key: column for key, column in columns.items() if column is not None})


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
