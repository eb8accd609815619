"""What users searched with when items were shown: each distinct query once, named by the hash of its content.

    queries/part-*.parquet    query_id as item_id, and either the text as title or the picture as image

These are columns of the items table, so that extraction reads queries as it reads items. A query with a picture is that
picture, as C-SFT trains it; a text beside it stays in the impression and says no more here.
"""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mim_ray import artifacts
from mim_ray.data.ids import IdIndex
from mim_ray.data.transforms import clean_title, content_hash

QUERIES = pa.schema([("item_id", pa.string()), ("title", pa.string()), ("image", pa.binary())])
_GROUP = 1_024


def with_query_ids(impressions: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The impressions with query_id in the place of their pictures, and their distinct queries (QUERIES)."""
    images, of_image = _distinct(impressions["query_image"])
    texts, of_text = _distinct(impressions["query_text"])
    titles = [clean_title(text) for text in texts.to_pylist()]
    image_ids = [content_hash(None, image) for image in images.to_pylist()]
    text_ids = [None if title is None else content_hash(title, None) for title in titles]
    by_image = pa.array(image_ids, pa.string()).take(of_image)
    query_ids = pc.coalesce(by_image, pa.array(text_ids, pa.string()).take(of_text))
    of_pictures = pa.table([image_ids, pa.nulls(len(images), pa.string()), images], schema=QUERIES)
    asked = pc.is_in(pa.array(text_ids, pa.string()), pc.unique(query_ids).drop_null())  # not only beside a picture
    of_texts = pa.table([text_ids, titles, pa.nulls(len(titles), pa.binary())], schema=QUERIES).filter(asked)
    queries = pa.concat_tables([of_pictures, of_texts.filter(pc.is_valid(of_texts["item_id"]))])
    place = impressions.schema.get_field_index
    impressions = impressions.set_column(place("query_id"), "query_id", query_ids)
    nothing = pa.nulls(len(impressions), pa.binary())
    return impressions.set_column(place("query_image"), "query_image", nothing), queries


def write_queries(queries: pa.Table, output: str, name: str) -> None:
    """Write a part of them; parts may have queries in common until `drop_repeated`."""
    if queries.num_rows:
        _write(f"{output}/queries/part-{name}.parquet", queries)


def drop_repeated(output: str) -> int:
    """Leave each query in the first part that has it; returns how many there are."""
    files = artifacts.list_files(f"{output}/queries", ".parquet") if artifacts.exists(f"{output}/queries") else []
    ids = [_read(file, ["item_id"])["item_id"].combine_chunks() for file in files]
    if not files:
        return 0
    first = IdIndex(pa.concat_arrays(ids)).first_rows()
    start = 0
    for file, of_file in zip(files, ids, strict=True):
        kept = first[start : start + len(of_file)]
        start += len(of_file)
        if not kept.any():
            artifacts.remove(file)
        elif not kept.all():
            _write(file, _read(file, QUERIES.names).filter(pa.array(kept)))
    return int(first.sum())


def _distinct(column: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """The distinct values, and of each row its place among them, null without one."""
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.dictionary, encoded.indices


def _read(uri: str, columns: list[str]) -> pa.Table:
    filesystem, path = artifacts.filesystem(uri)
    return pq.ParquetFile(path, filesystem=filesystem).read(columns)


def _write(uri: str, queries: pa.Table) -> None:
    sink = io.BytesIO()
    pq.write_table(queries, sink, row_group_size=_GROUP, compression="zstd")
    artifacts.write_bytes(uri, sink.getvalue())
