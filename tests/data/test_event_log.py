"""Events that cannot be used are rejected with the first reason that applies; the others say what they say."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mim_ray.config.scenario import Data, Samples
from mim_ray.data.catalogue import Catalogue, write_index
from mim_ray.data.event_log import PAIR, POSITIVE, SEARCHED, SHOWN, UNKNOWN_TIME, Items, clean_shard
from mim_ray.data.ids import IdIndex
from mim_ray.data.image_files import ImageFiles
from mim_ray.data.items import choose_items, write_items_part
from mim_ray.data.pairs import write_search_pairs
from mim_ray.data.schema import INTERACTIONS
from mim_ray.data.sources import shards

SECOND = 1_000_000
DAY = 86_400 * SECOND


def picture():
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    return stream.getvalue()


def shard_of(tmp_path, rows):
    full = [{name: row.get(name) for name in INTERACTIONS.schema.names} for row in rows]
    pq.write_table(pa.Table.from_pylist(full, schema=INTERACTIONS.schema), tmp_path / "interactions.parquet")
    (shard,) = shards(str(tmp_path / "interactions.parquet"), "interactions")
    return shard


def items():
    return Items(IdIndex(pa.array(["a", "b", "c"])), np.array([10 * DAY + 5, UNKNOWN_TIME, 0]))


def event(**changes):
    return {"user_id": "u", "item_id": "b", "event": "click", "timestamp": 20 * DAY} | changes


def test_each_unusable_event_has_its_reason(tmp_path):
    future = 4 * 10**15
    cases = [
        (event(user_id=None, item_id="zzz"), "no user id"),
        (event(user_id="  "), "no user id"),
        (event(item_id=None), "no item id"),
        (event(event=None), "no event name"),
        (event(timestamp=None), "no timestamp"),
        (event(timestamp=0), "timestamp before 1970"),
        (event(timestamp=future), "timestamp in the future"),
        (event(item_id="zzz"), "unknown item"),
        (event(item_id="a", timestamp=10 * DAY), "event before its item existed"),
    ]
    good = [event(), event(item_id="a", timestamp=10 * DAY + 5), event(item_id="c")]
    shard = shard_of(tmp_path, [row for row, _ in cases] + good)
    rows, positives, stats = clean_shard(shard, items(), Samples(), 4, 1)
    assert stats.rejects["reason"].to_pylist() == [reason for _, reason in cases]
    assert stats.rejects["key"].to_pylist() == [str(i) for i in range(len(cases))]
    assert "'a' at 1970-01-11 00:00:00" in stats.rejects["detail"][8].as_py()
    assert rows["item"].to_pylist() == [1, 0, 2]
    assert rows["seq"].to_pylist() == [9, 10, 11]
    assert positives[0].tolist() == [10 * DAY + 5, 20 * DAY, 20 * DAY]
    assert dict(zip(*(part.tolist() for part in stats.first_seen), strict=True)) == {
        0: 10 * DAY + 5,
        1: 20 * DAY,
        2: 20 * DAY,
    }


def test_with_days_only_earlier_days_are_before_an_item(tmp_path):
    shard = shard_of(tmp_path, [event(item_id="a", timestamp=10 * DAY), event(item_id="a", timestamp=9 * DAY)])
    _, _, stats = clean_shard(shard, items(), Samples(time_resolution="day"), 4, 1)
    assert stats.rejects["key"].to_pylist() == ["1"]


def test_kinds_follow_the_configuration(tmp_path):
    settings = Samples(
        positive_events=("click", "rating"), pair_events=("buy",), impression_event="show", min_rating=4.0
    )
    rows = [
        event(),
        event(event="rating", rating=4.0),
        event(event="rating", rating=3.9),
        event(event="buy", query_image=b"x"),
        event(event="show"),
        event(event="other"),
    ]
    table, _, stats = clean_shard(shard_of(tmp_path, rows), items(), settings, 4, 1)
    assert table["kind"].to_pylist() == [POSITIVE, POSITIVE, 0, PAIR | SEARCHED, SHOWN, 0]
    assert stats.counts["events below samples.min_rating"] == 1
    assert stats.counts["image searches"] == 1
    assert table["query_image"].null_count == 6  # pictures of pairs do not travel
    assert set(table["part"].to_pylist()) <= {0, 1, 2, 3}


def test_search_pairs_are_from_before_the_cut_and_have_usable_pictures(tmp_path):
    good = picture()
    rows = [
        event(event="purchase", query_image=good, timestamp=20 * DAY),
        event(event="purchase", query_image=b"junk", timestamp=20 * DAY),
        event(event="purchase", query_image=good, timestamp=30 * DAY),
        event(event="click", query_image=good, timestamp=20 * DAY),
        event(event="purchase", timestamp=20 * DAY),
        event(event="purchase", query_image=good, item_id="zzz"),
    ]
    categories = pa.array(["x", "y", None])
    counts, bad = write_search_pairs(
        shard_of(tmp_path, rows), 3, items(), categories, Samples(), Data(), 30 * DAY, str(tmp_path)
    )
    (pair,) = pq.read_table(tmp_path / "interest_pairs" / "part-00003.parquet").to_pylist()
    assert counts == {"interest pairs": 1}
    assert (pair["item_id"], pair["category"], pair["signal"], pair["query_image"]) == ("b", "y", "purchase", good)
    assert not pair["built"]
    assert bad.to_pylist()[0]["reason"] == "image format"


def test_items_are_cleaned_and_the_first_of_an_id_counts(tmp_path):
    good = picture()
    table = pa.table(
        {
            "item_id": ["a", "b", "a", None, " ", "c", "d"],
            "title": [" A  title ", "", "second", "x", "y", None, "t"],
            "category": ["p|q", None, "z", "z", "z", "|q", "r"],
            "image": [good, good[:40], None, None, None, b"", None],
            "image_uri": ["d.png", None, None, None, None, "d.png", "http://x/y.jpg"],
            "created_at": pa.array([5, None, 1, 1, 1, None, None], pa.timestamp("us", "UTC")),
        }
    )
    pq.write_table(table, tmp_path / "items.parquet", row_group_size=3)
    (tmp_path / "d.png").write_bytes(good)
    parts = shards(str(tmp_path / "items.parquet"), "items", 3)
    keep, ids, created, rejects = choose_items(parts)
    assert keep.tolist() == [True, True, False, False, False, True, True]
    assert ids.to_pylist() == ["a", "b", "c", "d"]
    assert created.tolist() == [5, UNKNOWN_TIME, UNKNOWN_TIME, UNKNOWN_TIME]
    assert sorted(rejects["reason"].to_pylist()) == ["duplicate item id", "no item id", "no item id"]
    first_seen, start, bad = np.array([7, 8, UNKNOWN_TIME, 9]), 0, []
    for number, part in enumerate(parts):
        chosen = keep[part.first_row : part.first_row + part.num_rows]
        stop = start + int(chosen.sum())
        files = ImageFiles(str(tmp_path), 10_000)
        result = write_items_part(part, chosen, first_seen[start:stop], Data(), files, str(tmp_path / "c"), number)
        bad += result[2]["reason"].to_pylist()
        start = stop
    write_index(str(tmp_path / "c"))
    rows = Catalogue.open(str(tmp_path / "c")).take(np.arange(4)).to_pylist()
    assert [row["title"] for row in rows] == ["A title", None, None, "t"]
    assert [row["category"] for row in rows] == ["p", None, None, "r"]
    assert [row["categories"] for row in rows] == ["p|q", None, "|q", "r"]
    assert [row["image"] for row in rows] == [good, None, good, None]
    assert [row["created_at"] and row["created_at"].microsecond for row in rows] == [5, 8, None, 9]
    assert [row["first_seen_at"] and row["first_seen_at"].microsecond for row in rows] == [7, 8, None, 9]
    assert bad == ["image corrupt", "image_uri outside data.images_root"]


def test_a_log_without_optional_columns_is_fine(tmp_path):
    rows = pa.table(
        {name: [event()[name]] for name in ("user_id", "item_id", "event")}
        | {"timestamp": pa.array([DAY * 20], pa.timestamp("us"))}
    )
    pq.write_table(rows, tmp_path / "interactions.parquet")
    (shard,) = shards(str(tmp_path / "interactions.parquet"), "interactions")
    table, _, stats = clean_shard(shard, items(), Samples(min_rating=3.0), 4, 1)
    assert table["kind"].to_pylist() == [POSITIVE]
    assert stats.rejects.num_rows == 0
    assert table["impression_id"].null_count == 1
