"""mim_ray/data/change_feed.py: the same rows as deltalake's own reader of the feed."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from mim_ray.data.change_feed import FeedUnusableError, read_feed
from mim_ray.data.listing import delta_head

FEED = {"delta.enableChangeDataFeed": "true"}


def rows(first: int, num: int, text: str = "title", categories: tuple[str | None, ...] = ("a", "b", None)) -> pa.Table:
    numbers = range(first, first + num)
    return pa.table(
        {
            "item_id": [f"i{number}" for number in numbers],
            "title": [f"{text} {number}" for number in numbers],
            "category": [categories[number % 3] for number in numbers],
        }
    )


def told(uri: str, after: int) -> list[tuple[object, ...]]:
    head = delta_head(uri)
    assert head is not None
    found: list[tuple[object, ...]] = []
    for piece in read_feed(uri, head, after, 3)[0]:
        ids, came = piece.ids()
        content = piece.rows.read(["title", "category"])
        columns = (ids, came, content["title"], content["category"])
        found += [(piece.version, *row) for row in zip(*(column.to_pylist() for column in columns), strict=True)]
    return sorted(found, key=str)


def by_deltalake(uri: str, after: int) -> list[tuple[object, ...]]:
    table = pa.table(DeltaTable(uri).load_cdf(after + 1))
    names = ("_commit_version", "_change_type", "item_id", "title", "category")
    found = zip(*(table[name].to_pylist() for name in names), strict=True)
    return sorted(
        ((version, item, kind in ("insert", "update_postimage"), *more) for version, kind, item, *more in found),
        key=str,
    )


@pytest.mark.parametrize("partitions", [None, ["category"]])
def test_every_commit_tells_what_deltalake_says(tmp_path: Path, partitions: list[str] | None) -> None:
    uri = f"{tmp_path}/items"
    write_deltalake(uri, rows(0, 10), configuration=FEED, partition_by=partitions)
    write_deltalake(uri, rows(10, 7), mode="append")
    merge = DeltaTable(uri).merge(rows(8, 12, "merged"), "t.item_id = s.item_id", "s", "t")
    merge.when_matched_update_all().when_not_matched_insert_all().execute()
    DeltaTable(uri).delete("item_id = 'i1'")
    DeltaTable(uri).update(predicate="item_id in ('i2', 'i9')", new_values={"title": "updated"})
    write_deltalake(uri, rows(30, 3), mode="append")
    DeltaTable(uri).optimize.compact()
    assert told(uri, 5) == []
    write_deltalake(uri, rows(0, 4, "whole"), mode="overwrite")
    DeltaTable(uri).delete()
    last = DeltaTable(uri).version()
    assert last == 8
    for after in range(last):
        assert told(uri, after) == by_deltalake(uri, after)
    head = delta_head(uri)
    assert head is not None
    _, committed_at = read_feed(uri, head, 0, 3)
    assert committed_at == 1_000 * DeltaTable(uri).history(1)[0]["timestamp"]
    with pytest.raises(FeedUnusableError, match="more than 10 rows since version 0"):
        read_feed(uri, head, 0, 3, max_rows=10)
    with pytest.raises(FeedUnusableError, match="went from 8 to 8"):
        read_feed(uri, head, 8, 3)


def test_places_with_any_characters_tell_their_rows(tmp_path: Path) -> None:
    for name, partitions in (("plain", None), ("parts", ["category"])):
        uri, places = f"{tmp_path}/{name}", ("a b", "ä=%/", None)
        write_deltalake(uri, rows(0, 9, "title", places), configuration=FEED, partition_by=partitions)
        write_deltalake(uri, rows(9, 9, "title", places), mode="append")
        DeltaTable(uri).update(predicate="item_id in ('i1', 'i2', 'i3')", new_values={"title": "updated"})
    assert len(told(f"{tmp_path}/parts", 0)) == 15
    assert told(f"{tmp_path}/parts", 0) == told(f"{tmp_path}/plain", 0)


def test_a_table_without_the_feed_says_so(tmp_path: Path) -> None:
    write_deltalake(f"{tmp_path}/items", rows(0, 3))
    head = delta_head(f"{tmp_path}/items")
    assert head is not None
    with pytest.raises(FeedUnusableError, match=r"is off \(delta.enableChangeDataFeed\)"):
        read_feed(f"{tmp_path}/items", head, 0, 3)
    assert delta_head(f"{tmp_path}") is None


def test_a_feed_in_files_outside_the_table_is_not_read(tmp_path: Path) -> None:
    uri = f"{tmp_path}/items"
    write_deltalake(uri, rows(0, 3), configuration=FEED)
    write_deltalake(uri, rows(3, 3), mode="append")
    entry = Path(uri) / f"_delta_log/{1:020}.json"
    before = entry.read_text()
    head = delta_head(uri)
    assert head is not None
    entry.write_text(before.replace('"path":"', '"path":"s3://elsewhere/'))
    with pytest.raises(FeedUnusableError, match="outside the table"):
        read_feed(uri, head, 0, 3)
    entry.write_text(before.replace('"commitInfo"', '"other"'))
    with pytest.raises(FeedUnusableError, match="does not say when"):
        read_feed(uri, head, 0, 3)
