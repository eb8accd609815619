"""Column names and Arrow types of every table (SPEC section 2). Ids are strings, times are UTC microseconds."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class TableSchema:
    """A table's columns; `optional` ones may be missing and are then null."""

    name: str
    schema: pa.Schema
    optional: frozenset[str]

    @property
    def required(self) -> list[str]:
        return [name for name in self.schema.names if name not in self.optional]


def _table(name: str, *columns: tuple[str, pa.DataType]) -> TableSchema:
    fields = [pa.field(column.rstrip("?"), kind) for column, kind in columns]
    return TableSchema(name, pa.schema(fields), frozenset(c.rstrip("?") for c, _ in columns if c.endswith("?")))


ITEMS = _table(
    "items",
    ("item_id", pa.string()),
    ("title?", pa.string()),
    ("category?", pa.string()),  # several values joined by "|"; the first is the category
    ("image?", pa.binary()),
    ("image_uri?", pa.string()),
    ("created_at?", TIME),
    ("attributes?", pa.string()),
)

INTERACTIONS = _table(
    "interactions",
    ("user_id", pa.string()),
    ("item_id", pa.string()),
    ("event", pa.string()),
    ("rating?", pa.float64()),
    ("timestamp", TIME),
    ("impression_id?", pa.string()),
    ("query_image?", pa.binary()),
    ("query_text?", pa.string()),
    ("revenue?", pa.float64()),
)

INTEREST_PAIRS = _table(
    "interest_pairs",
    ("query_image?", pa.binary()),
    ("query_item_id?", pa.string()),  # of a built pair: the item whose image is the query, instead of the bytes
    ("item_id", pa.string()),
    ("category?", pa.string()),
    ("signal", pa.string()),  # purchase | click
    ("timestamp", TIME),
    ("user_id", pa.string()),
    ("built?", pa.bool_()),  # made from consecutive positives, not from an image search
)

IMPRESSIONS = _table(
    "impressions",
    ("impression_id", pa.string()),
    ("request_id?", pa.string()),
    ("user_id", pa.string()),
    ("timestamp", TIME),
    ("item_id", pa.string()),
    ("label", pa.int8()),
    ("behaviors", pa.list_(pa.string())),  # oldest first, strictly before the impression
    ("behavior_times?", pa.list_(TIME)),  # beside behaviors, of the same length
    ("query_text?", pa.string()),
    ("query_image?", pa.binary()),
    ("query_id?", pa.string()),  # made by the samples stage, which keeps the picture once in samples/queries
    ("revenue?", pa.float64()),
    ("split?", pa.string()),
    ("drawn?", pa.bool_()),  # a negative that was drawn, not logged
)

PREDICTIONS = _table("predictions", ("impression_id", pa.string()), ("prob", pa.float64()))

ITEM_EMBEDDINGS = _table(
    "item_embeddings",
    ("item_id", pa.string()),
    ("embedding", pa.list_(pa.float32())),
    ("content_hash", pa.string()),
    ("encoder_version", pa.string()),
    ("content_at", TIME),
    ("origin", pa.string()),  # batch | realtime
    ("shard_id", pa.string()),
    ("deleted", pa.bool_()),
)

REJECTS = _table(
    "rejects",
    ("stage", pa.string()),
    ("source", pa.string()),  # table or file
    ("key", pa.string()),  # id of the row, or its number
    ("reason", pa.string()),  # short, countable
    ("detail", pa.string()),
)

TABLES = {t.name: t for t in (ITEMS, INTERACTIONS, INTEREST_PAIRS, IMPRESSIONS, PREDICTIONS, ITEM_EMBEDDINGS, REJECTS)}
SPLITS = ("train", "validation", "test")
