"""Queries leave the impressions and are kept once each, named by their content."""

import pyarrow as pa
import pyarrow.parquet as pq

from mim_ray.data.queries import QUERIES, drop_repeated, with_query_ids, write_queries
from mim_ray.data.schema import IMPRESSIONS
from mim_ray.data.transforms import content_hash


def impressions(queries):
    rows = [{"query_text": text, "query_image": image} for text, image in queries]
    full = [{name: row.get(name) for name in IMPRESSIONS.schema.names} for row in rows]
    return pa.Table.from_pylist(full, schema=IMPRESSIONS.schema)


def test_a_query_is_its_picture_else_its_text():
    asked = [("red mug", None), (" red  mug ", b"a"), (None, b"a"), (None, None), (" ", None), ("red mug ", None)]
    rows, queries = with_query_ids(impressions(asked))
    picture, text = content_hash(None, b"a"), content_hash("red mug", None)
    assert rows["query_id"].to_pylist() == [text, picture, picture, None, None, text]
    assert rows["query_image"].null_count == 6
    assert rows["query_text"].to_pylist() == [text for text, _ in asked]
    assert rows.schema == IMPRESSIONS.schema
    assert queries.schema == QUERIES
    assert {tuple(row.values()) for row in queries.to_pylist()} == {(picture, None, b"a"), (text, "red mug", None)}


def test_a_text_that_only_stands_beside_pictures_is_no_query_of_its_own():
    _, queries = with_query_ids(impressions([("blue", b"x"), ("blue", b"y")]))
    assert queries["title"].null_count == queries.num_rows == 2


def test_impressions_without_queries_write_none(tmp_path):
    rows, queries = with_query_ids(impressions([(None, None)]))
    write_queries(queries, str(tmp_path), "00000")
    assert rows.equals(impressions([(None, None)]))
    assert not (tmp_path / "queries").exists()
    assert drop_repeated(str(tmp_path)) == 0


def test_parts_keep_each_query_once(tmp_path):
    for number, texts in enumerate((["a", "b", "a "], ["b", "c"], ["c", "a"])):
        write_queries(with_query_ids(impressions([(text, None) for text in texts]))[1], str(tmp_path), f"{number:05d}")
    assert drop_repeated(str(tmp_path)) == 3
    kept = {file.name: pq.read_table(file)["title"].to_pylist() for file in sorted((tmp_path / "queries").iterdir())}
    assert kept == {"part-00000.parquet": ["a", "b"], "part-00001.parquet": ["c"]}
    assert drop_repeated(str(tmp_path)) == 3
