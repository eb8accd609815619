"""The cleaned catalogue on disk: memory-mapped Arrow files, and an index from item id to row.

    part-00000.arrow …   the columns of CATALOGUE, in record batches of at most 4,096 rows
    hashes.npy, order.npy    sorted 64-bit hashes of the ids and their rows, mapped too

A row number is an item's address everywhere else: behaviors, training batches and embeddings use rows, not ids. Opening
costs a few file handles; a process keeps the ids (their bytes) and 12 bytes an item, never the pictures.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray import artifacts
from mim_ray.data.ids import IdIndex, Ids
from mim_ray.data.schema import TIME
from mim_ray.data.transforms import content_hash
from mim_ray.errors import ArtifactError

CATALOGUE = pa.schema(
    [
        ("item_id", pa.string()),
        ("title", pa.string()),  # null where missing or blank
        ("category", pa.string()),  # the first of the given values
        ("categories", pa.string()),  # as given, joined by "|"
        ("image", pa.large_binary()),  # encoded; null where missing or unusable
        ("created_at", TIME),  # as given, else the first event; null where there is neither
        ("first_seen_at", TIME),  # the first event; null without events
        ("content_hash", pa.string()),
    ]
)
_BATCH_ROWS = 4_096
_BATCH_BYTES = 64 * 2**20
_NO_TIME = np.iinfo(np.int64).max


class Catalogue:
    """Random access to the cleaned items. Open with `Catalogue.open(uri)`; pickles as its path."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._batches: list[pa.RecordBatch] = []
        for part in sorted(folder.glob("part-*.arrow")):
            reader = pa.ipc.open_file(pa.memory_map(str(part)))
            self._batches += [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = np.concatenate([[0], np.cumsum([batch.num_rows for batch in self._batches])]).astype(np.int64)

    @classmethod
    def open(cls, uri: str) -> Catalogue:
        """
        Raises:
            ArtifactError: there is no catalogue, or it is damaged.
        """
        folder = artifacts.local_copy(uri) if artifacts.exists(uri) else Path(uri)
        if not (folder / "hashes.npy").exists():
            raise ArtifactError(f"{uri} holds no catalogue. Run jobs/build_samples.py first.")
        try:
            catalogue = cls(folder)
            catalogue._index  # noqa: B018  (checked while opening, not at the first use)
        except (pa.ArrowInvalid, ValueError, OSError) as error:
            raise ArtifactError(
                f"The catalogue {uri} is damaged ({error}). Delete it and run jobs/build_samples.py again."
            ) from None
        return catalogue

    def __reduce__(self) -> tuple[type[Catalogue], tuple[Path]]:
        return Catalogue, (self._folder,)

    @property
    def num_items(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def ids(self) -> pa.Array:
        """Item ids by row; one contiguous string array (large_string from 2 GB on)."""
        return self._column("item_id")

    def rows(self, ids: Ids) -> np.ndarray:
        """(n,) int64 row of each id, -1 where it is unknown or null."""
        return self._index.rows(ids)

    def take(self, rows: np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
        """The items at `rows` (any order, repeats allowed), as a table of `columns` (all by default), one chunk each.

        Only the asked rows and columns are read from the disk.
        """
        rows = np.asarray(rows, np.int64)
        names = list(columns) if columns is not None else CATALOGUE.names
        schema = pa.schema([CATALOGUE.field(name) for name in names])
        if not len(rows):
            return schema.empty_table()
        if rows.min() < 0 or rows.max() >= self.num_items:
            raise IndexError(f"rows must be in 0..{self.num_items - 1}, not {rows.min()}..{rows.max()}")
        batch_of = np.searchsorted(self._starts, rows, "right") - 1
        order = np.argsort(batch_of, kind="stable")
        cuts = np.flatnonzero(np.diff(batch_of[order])) + 1
        pieces = []
        for group in np.split(order, cuts):
            number = int(batch_of[group[0]])
            batch = self._batches[number].select(names)
            pieces.append(batch.take(pa.array(rows[group] - self._starts[number])))
        table = pa.Table.from_batches(pieces, schema).combine_chunks()
        if len(pieces) == 1:  # then `order` is 0, 1, 2, …
            return table
        back = np.empty(len(rows), np.int64)
        back[order] = np.arange(len(rows))
        return table.take(pa.array(back))

    @cached_property
    def category_codes(self) -> tuple[np.ndarray, list[str]]:
        """(num_items,) int32 code of each item's category, -1 without one, and the names by code."""
        encoded = self._column("category").dictionary_encode()
        return np.asarray(encoded.indices.fill_null(-1)).astype(np.int32), encoded.dictionary.to_pylist()

    @cached_property
    def created_at(self) -> np.ndarray:
        """(num_items,) int64 microseconds UTC since when an item is known to exist; the largest int64 if that is unknown."""
        return np.asarray(self._column("created_at").cast(pa.int64()).fill_null(_NO_TIME))

    @cached_property
    def has_image(self) -> np.ndarray:
        return np.asarray(self._column("image", valid=True))

    @cached_property
    def has_title(self) -> np.ndarray:
        return np.asarray(self._column("title", valid=True))

    @cached_property
    def _index(self) -> IdIndex:
        hashes = np.load(self._folder / "hashes.npy", mmap_mode="r")
        order = np.load(self._folder / "order.npy", mmap_mode="r")
        if len(hashes) != self.num_items or len(order) != self.num_items:
            raise ValueError(f"{len(hashes)} hashes for {self.num_items} items")
        return IdIndex(self.ids, hashes, order)

    def _column(self, name: str, valid: bool = False) -> pa.Array:
        chunks = [batch.column(name) for batch in self._batches]
        if valid:
            return pa.concat_arrays([chunk.is_valid() for chunk in chunks] or [pa.array([], pa.bool_())])
        if name == "item_id" and sum(chunk.nbytes for chunk in chunks) >= 2**31:
            chunks = [chunk.cast(pa.large_string()) for chunk in chunks]
        return pa.concat_arrays(chunks or [pa.array([], CATALOGUE.field(name).type)])


def write_catalogue(uri: str, tables: Iterable[pa.Table]) -> int:
    """Write clean items (missing CATALOGUE columns are filled) as a whole catalogue; returns the number of items."""
    num_items = 0
    for number, table in enumerate(tables):
        write_part(uri, number, table)
        num_items += table.num_rows
    write_index(uri)
    return num_items


def write_part(uri: str, number: int, table: pa.Table) -> None:
    """One part of a catalogue; parts may be written by different processes, then `write_index` is called once."""
    table = _complete(table)
    widest = max(1, table.nbytes // max(1, table.num_rows))
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, CATALOGUE) as writer:
        for batch in table.combine_chunks().to_batches(max_chunksize=max(1, min(_BATCH_ROWS, _BATCH_BYTES // widest))):
            writer.write_batch(batch)
    artifacts.write_bytes(f"{uri}/part-{number:05d}.arrow", sink.getvalue())


def write_index(uri: str) -> None:
    """Index the parts by item id; makes the catalogue complete."""
    ids = Catalogue(artifacts.local_copy(uri)).ids
    index = IdIndex(ids)
    for name, array in (("order", index.order), ("hashes", index.hashes)):
        sink = io.BytesIO()
        np.save(sink, array, allow_pickle=False)
        artifacts.write_bytes(f"{uri}/{name}.npy", sink.getvalue())


def _complete(table: pa.Table) -> pa.Table:
    columns = {name: table.column(name) for name in table.column_names}
    for name in ("title", "categories", "image", "created_at", "first_seen_at"):
        columns.setdefault(name, pa.nulls(table.num_rows, CATALOGUE.field(name).type))
    if "category" not in columns:
        columns["category"] = pc.list_element(pc.split_pattern(columns["categories"].cast(pa.string()), "|"), 0)
    if "content_hash" not in columns:
        pairs = zip(columns["title"].to_pylist(), columns["image"].to_pylist(), strict=True)
        columns["content_hash"] = pa.array([content_hash(title, image) for title, image in pairs], pa.string())
    return pa.table([columns[name].cast(CATALOGUE.field(name).type) for name in CATALOGUE.names], schema=CATALOGUE)
