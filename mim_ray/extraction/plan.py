"""Deterministic shards: the items table cut into fixed slices, the same ones after every restart.

A unit is what one task reads (some row groups of one file); its slices of `shard_rows` rows are the shards. A shard's id is a
hash of the file's place and content (the footer's sizes, offsets and statistics), the rows, and all that decides what an
embedding is. A changed file or another encoder therefore gives other shards.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray import artifacts
from mim_ray.data import sources
from mim_ray.data.event_log import is_blank
from mim_ray.data.ids import hash_ids
from mim_ray.representation_center.key_index import string_array

HASHES_AT_ONCE = 16_000_000  # 128 MB: bounds the memory of the search for duplicates, whatever the table's size


@dataclass(frozen=True)
class Slice:
    """A shard: rows start … stop of its unit."""

    shard_id: str
    start: int
    stop: int


@dataclass(frozen=True)
class Unit:
    """What one task reads.

    Attributes:
        duplicates: rows of the unit whose item id an earlier row of the table has.
    """

    shard: sources.Shard
    slices: tuple[Slice, ...]
    duplicates: np.ndarray

    @property
    def num_rows(self) -> int:
        return sum(piece.stop - piece.start for piece in self.slices)


def plan(items_uri: str, shard_rows: int, identity: Any) -> list[Unit]:
    """All shards of the items table.

    Args:
        identity: JSON-able; whatever makes embeddings differ (encoder version, how pictures are decoded).

    Raises:
        DataError: as sources.open_dataset.
    """
    shards = sources.shards(items_uri, "items", rows=shard_rows)
    again = _duplicate_rows(shards)
    units = []
    for shard in shards:
        described = artifacts.fingerprint(
            shard.fragment.path.removeprefix(artifacts.filesystem(items_uri)[1]),
            _row_groups(shard),
            shard_rows,
            identity,
        )
        slices = tuple(
            Slice(artifacts.fingerprint(described, start), start, min(start + shard_rows, shard.num_rows))
            for start in range(0, shard.num_rows, shard_rows)
        )
        first, end = np.searchsorted(again, [shard.first_row, shard.first_row + shard.num_rows])
        units.append(Unit(shard, slices, again[first:end] - shard.first_row))
    return units


def without(units: list[Unit], done: Set[str]) -> list[Unit]:
    """What is left to do when the shards `done` are in the table."""
    left = [replace(unit, slices=tuple(piece for piece in unit.slices if piece.shard_id not in done)) for unit in units]
    return [unit for unit in left if unit.slices]


def _row_groups(shard: sources.Shard) -> list[Any]:
    metadata = shard.fragment.metadata
    return [metadata.row_group(group.id).to_dict() for group in shard.fragment.row_groups]


def _duplicate_rows(shards: list[sources.Shard]) -> np.ndarray:
    """Ascending numbers of the table's rows whose item id an earlier row has. The first row with an id counts."""
    total = sum(shard.num_rows for shard in shards)
    passes = 1 + total // HASHES_AT_ONCE
    suspects = []
    for number in range(passes):
        found = [hashes[hashes % np.uint64(passes) == number] for hashes in map(_hashes, shards)]
        hashes = np.sort(np.concatenate(found))
        suspects.append(np.unique(hashes[1:][hashes[1:] == hashes[:-1]]))
    suspicious = np.concatenate(suspects)
    if not len(suspicious):
        return np.empty(0, np.int64)
    rows, ids = [], []
    for shard in shards:
        column = shard.read(["item_id"])["item_id"]
        here = np.flatnonzero(np.isin(hash_ids(column), suspicious) & ~is_blank(column))
        rows.append(here + shard.first_row)
        ids.append(string_array(column.take(pa.array(here))))
    codes = pc.dictionary_encode(pa.concat_arrays(ids)).indices.to_numpy()
    _, first = np.unique(codes, return_index=True)
    return np.delete(np.concatenate(rows), first).astype(np.int64)


def _hashes(shard: sources.Shard) -> np.ndarray:
    return hash_ids(shard.read(["item_id"])["item_id"])
