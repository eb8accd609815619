"""Tables enter with the schema's types or are refused by a sentence that names file, column, type and remedy."""

import datetime
import pickle

import deltalake
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_ray.data.rejects import read_rejects, reject_rows, write_rejects
from mim_ray.data.schema import INTERACTIONS, ITEMS, TIME
from mim_ray.data.sources import find_table, open_dataset, read_table, require_table, shards
from mim_ray.errors import DataError

DAY = datetime.datetime(2024, 1, 2)


def events(num=10, **changes):
    columns = {
        "user_id": pa.array([f"u{i}" for i in range(num)]),
        "item_id": pa.array([f"i{i}" for i in range(num)]),
        "event": pa.array(["click"] * num),
        "timestamp": pa.array([DAY] * num, TIME),
    }
    return pa.table({name: column for name, column in (columns | changes).items() if column is not None})


@pytest.mark.parametrize("form", ["file", "folder", "plain folder", "delta"])
def test_a_table_is_found_in_every_form(tmp_path, form):
    if form == "file":
        pq.write_table(events(), tmp_path / "interactions.parquet")
    elif form == "delta":
        deltalake.write_deltalake(str(tmp_path / "interactions"), events(), partition_by=["event"])
    else:
        folder = tmp_path / ("interactions.parquet" if form == "folder" else "interactions")
        folder.mkdir()
        pq.write_table(events().slice(0, 4), folder / "a.parquet")
        pq.write_table(events().slice(4), folder / "b.parquet")
    uri = require_table(str(tmp_path), "interactions")
    parts = shards(uri, "interactions", 3)
    joined = pa.concat_tables([pickle.loads(pickle.dumps(part)).read() for part in parts])  # noqa: S301
    assert joined.schema.equals(INTERACTIONS.schema)
    assert joined["user_id"].to_pylist() == [f"u{i}" for i in range(10)]
    assert joined["event"].to_pylist() == ["click"] * 10
    assert joined["rating"].null_count == 10
    assert [part.first_row for part in parts] == [sum(p.num_rows for p in parts[:i]) for i in range(len(parts))]


def test_shards_are_whole_row_groups_of_about_the_asked_size(tmp_path):
    pq.write_table(events(100), tmp_path / "interactions.parquet", row_group_size=10)
    parts = shards(str(tmp_path / "interactions.parquet"), "interactions", 35)
    assert [part.num_rows for part in parts] == [30, 30, 30, 10]
    assert parts[2].read(["user_id"])["user_id"][0].as_py() == "u60"
    assert len(shards(str(tmp_path / "interactions.parquet"), "interactions", 35, max_bytes=1)) == 10


def test_harmless_types_are_cast(tmp_path):
    table = events(
        3,
        user_id=pa.array([1, 2, 3]),
        item_id=pa.array(["a", "b", "a"]).dictionary_encode(),
        timestamp=pa.array([DAY] * 3, pa.timestamp("ms")),
        rating=pa.array([1, 2, None], pa.int8()),
        query_image=pa.array([b"x", None, None], pa.large_binary()),
    )
    pq.write_table(table, tmp_path / "interactions.parquet")
    (part,) = shards(str(tmp_path / "interactions.parquet"), "interactions")
    rows = part.read()
    assert rows.schema.equals(INTERACTIONS.schema)
    assert rows["user_id"].to_pylist() == ["1", "2", "3"]
    assert rows["item_id"].to_pylist() == ["a", "b", "a"]
    assert rows["timestamp"][0].as_py() == DAY.replace(tzinfo=datetime.UTC)
    assert rows["rating"].to_pylist() == [1.0, 2.0, None]
    zoned = events(1, timestamp=pa.array([DAY], pa.timestamp("ns", "Asia/Tokyo")))
    pq.write_table(zoned, tmp_path / "interactions.parquet")
    (part,) = shards(str(tmp_path / "interactions.parquet"), "interactions")
    assert (
        part.read()["timestamp"].cast(pa.int64())[0].as_py() == zoned["timestamp"].cast(pa.int64())[0].as_py() // 1_000
    )


def test_every_problem_is_named_at_once(tmp_path):
    pq.write_table(events(2, item_id=None, timestamp=pa.array(["today"] * 2)), tmp_path / "interactions.parquet")
    with pytest.raises(DataError) as error:
        open_dataset(str(tmp_path / "interactions.parquet"), "interactions")
    text = str(error.value)
    assert "interactions.parquet has no column 'item_id' (it has user_id, event, timestamp). Add it as string" in text
    assert "column 'timestamp' is string, but must be timestamp[us, tz=UTC]. Convert it" in text


def test_empty_missing_and_damaged_tables_are_refused(tmp_path):
    assert find_table(str(tmp_path), "items") is None
    with pytest.raises(DataError, match=r"has no table items: .* at least the columns item_id"):
        require_table(str(tmp_path), "items")
    pq.write_table(events(0), tmp_path / "interactions.parquet")
    with pytest.raises(DataError, match="is empty"):
        open_dataset(str(tmp_path / "interactions.parquet"), "interactions")
    (tmp_path / "items.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(DataError, match=r"items.parquet cannot be read as Parquet"):
        open_dataset(str(tmp_path / "items.parquet"), "items")


def test_files_that_differ_in_type_are_named(tmp_path):
    (tmp_path / "items").mkdir()
    pq.write_table(pa.table({"item_id": ["a"], "title": ["t"]}), tmp_path / "items" / "a.parquet")
    pq.write_table(pa.table({"item_id": ["b"], "title": [[1.5]]}), tmp_path / "items" / "b.parquet")
    parts = shards(str(tmp_path / "items"), "items", 1)
    with pytest.raises(DataError, match=r"b.parquet"):
        [part.read() for part in parts]


def test_rejects_of_a_stage_are_replaced(tmp_path):
    uri = str(tmp_path / "rejects")
    assert read_rejects(uri).num_rows == 0
    first = reject_rows("samples", "items", [("a", "no id", ""), ("b", "no id", ""), ("c", "other", "x")])
    assert write_rejects(uri, "samples", first) == {"no id": 2, "other": 1}
    write_rejects(uri, "o'stage", reject_rows("o'stage", "items", [("z", "why", "")]))
    assert write_rejects(uri, "samples", first.slice(0, 1)) == {"no id": 1}
    assert read_rejects(uri, "samples").to_pylist() == first.slice(0, 1).to_pylist()
    assert read_rejects(uri).num_rows == 2
    assert write_rejects(uri, "samples", first.slice(0, 0)) == {}
    assert read_rejects(uri)["stage"].to_pylist() == ["o'stage"]


@pytest.mark.ray
@pytest.mark.parametrize("form", ["parquet", "delta"])
def test_a_table_is_read_as_a_dataset(ray_cluster, tmp_path, form):
    table = pa.table({"item_id": pa.array([1, 2]), "title": ["a", None]})
    if form == "parquet":
        pq.write_table(table, tmp_path / "items.parquet")
    else:
        deltalake.write_deltalake(str(tmp_path / "items"), table)
    rows = read_table(str(tmp_path), "items", ["item_id", "title", "image"]).take_all()
    assert sorted(rows, key=lambda row: row["item_id"]) == [
        {"item_id": "1", "title": "a", "image": None},
        {"item_id": "2", "title": None, "image": None},
    ]
    assert ITEMS.required == ["item_id"]
