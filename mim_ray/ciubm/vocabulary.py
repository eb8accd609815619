"""Explicit vocabularies of a CTR model: ids -> rows of its tables, and their files. Row 0 is the unknown id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mim_ray import artifacts
from mim_ray.data.ids import IdIndex, Ids
from mim_ray.errors import ArtifactError


class Vocabulary:
    """Distinct ids in a fixed order; the first has index 1."""

    def __init__(self, ids: pa.Array) -> None:
        self.ids = ids
        self._index = IdIndex(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def encode(self, ids: Ids) -> np.ndarray:
        """(n,) int64 index of each id, 0 for an unknown one or null."""
        return self._index.rows(ids) + 1

    def save(self, uri: str) -> None:
        """Write a file of one column."""
        _write_arrow(uri, pa.table({"id": self.ids}))

    @classmethod
    def load(cls, uri: str) -> Vocabulary:
        """
        Raises:
            ArtifactError: missing or damaged.
        """
        return cls(_column(_read_arrow(uri), "id"))


@dataclass(frozen=True)
class ItemIndex:
    """What the CTR model knows of each catalogue item; position 0 is an item that is not in the catalogue.

    Attributes:
        vocabulary: all items of the catalogue; position = its index.
        table_row: (1 + items,) int64, row of the item's ID embedding; 0 where train has not met it often enough.
        category: (1 + items,) int64, row of its category's embedding; 0 without one.
        categories: names, the first has row 1.
    """

    vocabulary: Vocabulary
    table_row: np.ndarray
    category: np.ndarray
    categories: Sequence[str]

    @classmethod
    def build(
        cls, ids: pa.Array, category_codes: np.ndarray, categories: Sequence[str], counts: np.ndarray, min_count: int
    ) -> ItemIndex:
        """From the catalogue (ids, category code or -1 by row) and how often train met each row as a target."""
        known = counts >= min_count
        rows = np.where(known, np.cumsum(known), 0)
        zero = np.zeros(1, np.int64)
        return cls(
            vocabulary=Vocabulary(ids),
            table_row=np.concatenate([zero, rows]),
            category=np.concatenate([zero, category_codes.astype(np.int64) + 1]),
            categories=list(categories),
        )

    @property
    def num_table_rows(self) -> int:
        """Rows of the item table, the unknown item's included."""
        return int(self.table_row.max(initial=0)) + 1

    @property
    def num_category_rows(self) -> int:
        """Rows of the category table, the unknown category's included."""
        return len(self.categories) + 1

    def save(self, uri: str) -> None:
        """Write items.arrow and categories.json below `uri`."""
        columns = {"id": self.vocabulary.ids, "table_row": self.table_row[1:], "category": self.category[1:]}
        _write_arrow(f"{uri}/items.arrow", pa.table(columns))
        artifacts.write_json(f"{uri}/categories.json", list(self.categories))

    @classmethod
    def load(cls, uri: str) -> ItemIndex:
        """
        Raises:
            ArtifactError: missing or damaged.
        """
        table = _read_arrow(f"{uri}/items.arrow")
        zero = np.zeros(1, np.int64)
        return cls(
            vocabulary=Vocabulary(_column(table, "id")),
            table_row=np.concatenate([zero, table["table_row"].to_numpy()]),
            category=np.concatenate([zero, table["category"].to_numpy()]),
            categories=artifacts.read_json(f"{uri}/categories.json"),
        )


def _column(table: pa.Table, name: str) -> pa.Array:
    chunks = table[name].chunks
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks) if chunks else pa.array([], table[name].type)


def _write_arrow(uri: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    artifacts.write_bytes(uri, sink.getvalue().to_pybytes())


def _read_arrow(uri: str) -> pa.Table:
    if not artifacts.exists(uri):
        raise ArtifactError(f"{uri} is not there. Train the CTR model again.")
    try:
        with pa.memory_map(str(artifacts.local_copy(uri))) as source:
            return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid as error:
        raise ArtifactError(f"{uri} is damaged ({error}). Train the CTR model again.") from None
