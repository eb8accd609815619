"""Vocabularies of a CTR model: ids -> rows of its tables, and their files. Row 0 is the unknown id.

Explicit ones list their ids; one that train did not meet is unknown. Hashed ones list none: every id has a row, which it may
share with others, and only a null is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mim_ray import artifacts
from mim_ray.data.ids import IdIndex, Ids, as_strings, hash_ids
from mim_ray.errors import ArtifactError

_HASH_ROWS = b"hash_rows"  # key of a file's metadata


class Vocabulary:
    """Distinct ids in a fixed order; the first has index 1. The length is the largest index."""

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

    def grow(self, ids: pa.Array) -> Vocabulary:
        """With the ids that are not in it yet behind its own, whose indices stay."""
        new = ids.filter(pa.array(self.encode(ids) == 0)).unique().drop_null()
        return Vocabulary(pa.concat_arrays([self.ids, new.cast(self.ids.type)]))

    @staticmethod
    def load(uri: str) -> Vocabulary:
        """What `save` wrote, hashed or not.

        Raises:
            ArtifactError: missing or damaged.
        """
        table = _read_arrow(uri)
        hash_rows = int((table.schema.metadata or {}).get(_HASH_ROWS, 0))
        return HashedVocabulary(hash_rows) if hash_rows else Vocabulary(_column(table, "id"))


class HashedVocabulary(Vocabulary):
    """Every id has the index 1 + hash(id) mod `num_rows`; no list of ids is kept."""

    def __init__(self, num_rows: int) -> None:
        super().__init__(pa.array([], pa.string()))
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def encode(self, ids: Ids) -> np.ndarray:
        """(n,) int64 index of each id, 0 for null."""
        array = as_strings(ids)
        rows = (hash_ids(array) % np.uint64(self._num_rows)).astype(np.int64) + 1
        return np.where(np.asarray(array.is_valid()), rows, 0)

    def save(self, uri: str) -> None:
        """Write a file without ids."""
        _write_arrow(uri, pa.table({"id": self.ids}), hash_rows=self._num_rows)

    def grow(self, ids: pa.Array) -> Vocabulary:
        """It has room for all ids."""
        return self


@dataclass(frozen=True)
class ItemIndex:
    """What the CTR model knows of each catalogue item; position 0 is an item that is not in the catalogue.

    Attributes:
        vocabulary: all items of the catalogue; position = its index.
        table_row: (1 + items,) int64, row of the item's ID embedding; 0 where train has not met it often enough.
        category: (1 + items,) int64, row of its category's embedding; 0 without one.
        categories: names, the first has row 1.
        hashed: gives the rows of all ids, those outside the catalogue too; None when `table_row` does.
    """

    vocabulary: Vocabulary
    table_row: np.ndarray
    category: np.ndarray
    categories: Sequence[str]
    hashed: HashedVocabulary | None = None

    @classmethod
    def build(
        cls,
        ids: pa.Array,
        category_codes: np.ndarray,
        categories: Sequence[str],
        counts: np.ndarray,
        min_count: int,
        *,
        hash_rows: int | None = None,
    ) -> ItemIndex:
        """From the catalogue (ids, category code or -1 by row) and how often train met each row as a target.

        Args:
            hash_rows: rows that all ids share; `counts` do not matter then. None: a row for each item that train has met.
        """
        zero = np.zeros(1, np.int64)
        nothing = cls(Vocabulary(ids.slice(0, 0)), zero, zero, [], HashedVocabulary(hash_rows) if hash_rows else None)
        return nothing.grow(ids, category_codes, categories, counts, min_count)

    def grow(
        self, ids: pa.Array, category_codes: np.ndarray, categories: Sequence[str], counts: np.ndarray, min_count: int
    ) -> ItemIndex:
        """With the items of a later catalogue (arguments as of `build`).

        Items, rows and categories of before stay where they are; new ones follow. An item's category is the later one.
        """
        vocabulary = self.vocabulary.grow(ids)
        place = vocabulary.encode(ids)  # (later items,), 1 or more
        known = {name: row for row, name in enumerate(self.categories, start=1)}
        for name in categories:
            known.setdefault(name, len(known) + 1)
        category_rows = np.array([known[name] for name in categories] + [0], np.int64)  # the last is for code -1
        category, table_row = (_padded(values, len(vocabulary) + 1) for values in (self.category, self.table_row))
        category[place] = category_rows[category_codes]
        if self.hashed is not None:
            table_row[1:] = self.hashed.encode(vocabulary.ids)
        else:
            met = place[counts >= min_count]
            new = np.sort(met[table_row[met] == 0])
            table_row[new] = table_row.max() + 1 + np.arange(len(new))
        return ItemIndex(vocabulary, table_row, category, list(known), self.hashed)

    @property
    def num_table_rows(self) -> int:
        """Rows of the item table, the unknown item's included."""
        return int(self.table_row.max(initial=0)) + 1 if self.hashed is None else len(self.hashed) + 1

    @property
    def num_category_rows(self) -> int:
        """Rows of the category table, the unknown category's included."""
        return len(self.categories) + 1

    def rows(self, ids: Ids, position: np.ndarray) -> np.ndarray:
        """(n,) int64 rows of the ID embeddings of ids, whose positions `vocabulary.encode` gave."""
        return self.table_row[position] if self.hashed is None else self.hashed.encode(ids)

    def save(self, uri: str) -> None:
        """Write items.arrow and categories.json below `uri`."""
        columns = {"id": self.vocabulary.ids, "table_row": self.table_row[1:], "category": self.category[1:]}
        _write_arrow(f"{uri}/items.arrow", pa.table(columns), hash_rows=0 if self.hashed is None else len(self.hashed))
        artifacts.write_json(f"{uri}/categories.json", list(self.categories))

    @classmethod
    def load(cls, uri: str) -> ItemIndex:
        """
        Raises:
            ArtifactError: missing or damaged.
        """
        table = _read_arrow(f"{uri}/items.arrow")
        hash_rows = int((table.schema.metadata or {}).get(_HASH_ROWS, 0))
        zero = np.zeros(1, np.int64)
        return cls(
            vocabulary=Vocabulary(_column(table, "id")),
            table_row=np.concatenate([zero, table["table_row"].to_numpy()]),
            category=np.concatenate([zero, table["category"].to_numpy()]),
            categories=artifacts.read_json(f"{uri}/categories.json"),
            hashed=HashedVocabulary(hash_rows) if hash_rows else None,
        )


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([values, np.zeros(length - len(values), values.dtype)])


def _column(table: pa.Table, name: str) -> pa.Array:
    chunks = table[name].chunks
    return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks) if chunks else pa.array([], table[name].type)


def _write_arrow(uri: str, table: pa.Table, hash_rows: int = 0) -> None:
    table = table.replace_schema_metadata({_HASH_ROWS: str(hash_rows)} if hash_rows else None)
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
