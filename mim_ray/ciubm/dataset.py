"""Impressions -> batches of indices with their content joined late (paper Section 3.4; SPEC: content is joined late).

An impression carries item ids. They become numbers, a window of rows at a time. For each batch table row, category and MM
embedding of its distinct items are looked up once, the last from a mapped snapshot. Targets and behaviors then point into
the batch's items.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import embedding

from mim_ray.ciubm.features import FeatureBatch, Features, table_name
from mim_ray.ciubm.model import EmbeddedBatch
from mim_ray.ciubm.tables import Lookup
from mim_ray.ciubm.tables.hand_out import hand_out
from mim_ray.ciubm.vocabulary import ItemIndex, Vocabulary
from mim_ray.data.event_log import UNKNOWN_TIME, times_us
from mim_ray.representation_center.snapshot import Snapshot

COLUMNS = ("user_id", "item_id", "behaviors", "timestamp", "behavior_times")
"""Columns of impressions that a prediction reads, the last two where they are there; training needs `label` too."""
CODES = ("user_row", "item_code", "behavior_codes")
"""What `coded` puts in the place of ids. An item's code: its row of the item table, times 2^32, plus its position in the
ItemIndex; 0 for null."""
_ROW_SHIFT = 32


@dataclass(frozen=True)
class IndexedBatch:
    """B impressions over U distinct items.

    Attributes:
        user: (B,) row of the user table, 0 unknown.
        item_row, category: (U,) rows of the item and category tables, 0 unknown; the encoder's item_row ascends.
        mm: (U, D) MM embeddings, zero without content; None for the base model.
        target: (B,) place among the U items. behaviors: (B, L) places, pads are 0. behavior_mask: (B, L).
        label: (B,) float32, None when there is none.
        behavior_age_s: (B, L) float32 seconds from the behavior to the impression, 0 or more, pads are 0; None when
            train has no times.
        features: the declared ones; None when there are none.
        query_mm: (Q, D) vectors of the batch's distinct queries; the last is zero. query: (B,) places among them. None
            where queries are not used.
        known: (U,) bool, False for ids that are not in the catalogue; None where nobody counts them.
    """

    user: Tensor
    item_row: Tensor
    category: Tensor
    mm: Tensor | None
    target: Tensor
    behaviors: Tensor
    behavior_mask: Tensor
    label: Tensor | None
    behavior_age_s: Tensor | None = None
    features: FeatureBatch | None = None
    query_mm: Tensor | None = None
    query: Tensor | None = None
    known: Tensor | None = None

    def __len__(self) -> int:
        return len(self.target)

    def to(self, device: torch.device | str) -> IndexedBatch:
        """The same on another device."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moved[field.name] = None if value is None else value.to(device)
        return replace(self, **moved)


class Content:
    """MM embeddings by position in the ItemIndex: the snapshot's row of every item, found once."""

    def __init__(self, snapshot: Snapshot, items: ItemIndex) -> None:
        self.snapshot = snapshot
        self.rows = np.concatenate([[-1], snapshot.lookup(items.vocabulary.ids)])

    @property
    def width(self) -> int:
        return self.snapshot.width

    def gather(self, positions: np.ndarray) -> np.ndarray:
        """(n, D) float32, zero where there is no embedding."""
        return self.snapshot.gather(self.rows[positions])


class ImpressionEncoder:
    """Turns rows of the impressions table into an IndexedBatch.

    Args:
        content: None: no MM embeddings are joined. queries: vectors by query id; None: queries are not used.
    """

    def __init__(
        self,
        items: ItemIndex,
        users: Vocabulary,
        content: Content | None,
        max_behaviors: int,
        features: Features = Features(),  # noqa: B008  (frozen)
        queries: Snapshot | None = None,
    ) -> None:
        self.items, self.users, self.content, self.max_behaviors = items, users, content, max_behaviors
        self.features, self.queries = features, queries

    @property
    def columns(self) -> list[str]:
        """What `encode` reads of impressions, the label apart."""
        return [*COLUMNS, *self.features.kinds, *(() if self.queries is None else ("query_id",))]

    def num_table_rows(self, *, with_user: bool) -> dict[str, int]:
        """Rows by table name, the unknown row 0 of each included."""
        rows = {"item": self.items.num_table_rows, "category": self.items.num_category_rows}
        if with_user:
            rows["user"] = len(self.users) + 1
        return rows | self.features.num_table_rows

    def coded(self, table: pa.Table) -> pa.Table:
        """Rows of the impressions table, row by row, with numbers for their ids: what takes most of `encode`'s time.

        Each distinct id is looked up once, so it is cheaper for many batches at once (RowBatches' `prepare`) than for each.

        Returns:
            The same rows with CODES in the place of the columns of ids; of behaviors the newest `max_behaviors` alone.
        """
        start, length, values = _lists(table["behaviors"], self.max_behaviors)
        if int(length.sum()) < len(values):
            values = values.take(pa.array(_places(start, length)))
        targets = _array(table["item_id"])
        met = pa.concat_arrays([targets.cast(pa.large_string()), values.cast(pa.large_string())]).dictionary_encode()
        position = self.items.vocabulary.encode(met.dictionary)  # (U,)
        code = np.append(self.items.rows(met.dictionary, position) << _ROW_SHIFT | position, 0)  # the last is for null
        codes = code[np.asarray(met.indices.fill_null(len(code) - 1))]
        offsets = np.zeros(len(length) + 1, np.int32)
        np.cumsum(length, out=offsets[1:])
        columns: dict[str, pa.Array | pa.ChunkedArray] = {
            "user_row": pa.array(self._users(table)),
            "item_code": pa.array(codes[: len(table)]),
            "behavior_codes": pa.ListArray.from_arrays(pa.array(offsets), pa.array(codes[len(table) :])),
        }
        others = [name for name in table.column_names if name not in ("user_id", "item_id", "behaviors")]
        return pa.table(columns | {name: table[name] for name in others})

    def encode(
        self, table: pa.Table, *, id_dropout: float = 0.0, generator: np.random.Generator | None = None
    ) -> IndexedBatch:
        """
        Args:
            table: with COLUMNS and the declared features, the optional ones by choice, and `label` for training; or what
                `coded` gave of it.
            id_dropout: chance that a target, and likewise a user and an impression's features, count as unknown, so that
                the unknown rows are trained; category and content stay.
        """
        if "item_code" not in table.column_names:
            table = self.coded(table)
        size = len(table)
        _, length, behavior_codes = _lists(table["behavior_codes"], self.max_behaviors)
        met = np.concatenate([table["item_code"].to_numpy(), behavior_codes.to_numpy()])
        codes, place = np.unique(met, return_inverse=True)  # by row of the item table: read and written in order
        position, item_row = codes & (2**_ROW_SHIFT - 1), codes >> _ROW_SHIFT
        longest = max(int(length.max(initial=0)), 1)
        mask = np.arange(longest) < length[:, None]  # (B, L)
        behaviors = np.zeros((size, longest), np.int64)
        behaviors[mask] = place[size:]
        target, user = place[:size], table["user_row"].to_numpy().copy()
        without_features = None
        if id_dropout > 0 and generator is not None:
            dropped = np.flatnonzero(generator.random(size) < id_dropout)
            position = np.concatenate([position[target[dropped]], position])
            item_row = np.concatenate([np.zeros(len(dropped), np.int64), item_row])
            target = target + len(dropped)
            target[dropped] = np.arange(len(dropped))
            behaviors[mask] += len(dropped)
            user = np.where(generator.random(size) < id_dropout, 0, user)
            without_features = generator.random(size) < id_dropout
        query_mm, query = self._queries(table)
        label = table["label"].to_numpy().astype(np.float32) if "label" in table.column_names else None
        return IndexedBatch(
            user=torch.from_numpy(user),
            item_row=torch.from_numpy(item_row),
            category=torch.from_numpy(self.items.category[position]),
            mm=None if self.content is None else torch.from_numpy(self.content.gather(position)),
            target=torch.from_numpy(target),
            behaviors=torch.from_numpy(behaviors),
            behavior_mask=torch.from_numpy(mask),
            label=None if label is None else torch.from_numpy(label),
            behavior_age_s=self._ages(table, length, mask),
            features=self.features.encode(table, without_features),
            query_mm=query_mm,
            query=query,
            known=torch.from_numpy(position > 0),
        )

    def _ages(self, table: pa.Table, length: np.ndarray, mask: np.ndarray) -> Tensor | None:
        """(B, L) as in IndexedBatch; `length` (B,) and `mask` (B, L) are those of the behaviors."""
        if self.features.typical_age_s is None:
            return None
        at = times = np.full(int(length.sum()), UNKNOWN_TIME)  # of all behaviors, row after row
        if {"timestamp", "behavior_times"} <= set(table.column_names):
            at = np.repeat(times_us(table["timestamp"]), length)
            start, num_times, values = _lists(table["behavior_times"], self.max_behaviors)
            timed = num_times == length
            times[np.repeat(timed, length)] = times_us(values)[_places(start[timed], length[timed])]
        ages = np.zeros(mask.shape, np.float32)
        ages[mask] = self.features.ages(at, times)
        return torch.from_numpy(ages)

    def _queries(self, table: pa.Table) -> tuple[Tensor | None, Tensor | None]:
        """`query_mm` and `query` of IndexedBatch. Rows without a query, or with one that has no vector, get zeros."""
        if self.queries is None:
            return None, None
        if "query_id" not in table.column_names:
            return torch.zeros(1, self.queries.width), torch.zeros(len(table), dtype=torch.int64)
        met = _array(table["query_id"]).dictionary_encode()
        rows = np.append(self.queries.lookup(met.dictionary), -1)
        place = np.asarray(met.indices.fill_null(len(rows) - 1)).astype(np.int64)
        return torch.from_numpy(self.queries.gather(rows)), torch.from_numpy(place)

    def _users(self, table: pa.Table) -> np.ndarray:
        met = _array(table["user_id"]).dictionary_encode()
        rows = np.append(self.users.encode(met.dictionary), 0)  # the last is for null ids
        return rows[np.asarray(met.indices.fill_null(len(rows) - 1))]


def count_input(batch: IndexedBatch) -> dict[str, int]:
    """How many targets and behaviors a batch has, of them unknown to the catalogue, and known but without content.

    They train all the same: by the unknown item's embedding, and by the zero vector as content.
    """
    assert batch.known is not None
    missing = ~batch.known
    bare = torch.zeros_like(missing) if batch.mm is None else batch.known & (batch.mm == 0).all(dim=1)
    counts = {}
    for name, places in (("targets", batch.target), ("behaviors", batch.behaviors[batch.behavior_mask])):
        counts[name] = len(places)
        counts[f"unknown_{name}"] = int(missing[places].sum())
        counts[f"{name}_without_content"] = int(bare[places].sum())
    return counts


def gather_batch(batch: IndexedBatch, tables: Lookup, *, train: bool = False) -> EmbeddedBatch:
    """Look the batch's ID embeddings up and hand them out to targets and behaviors."""
    rows = {"item": batch.item_row, "category": batch.category}
    if "user" in tables:
        rows["user"] = batch.user
    if batch.features is not None:
        rows |= {table_name(name): values.rows for name, values in batch.features.values.items()}
    embedded = tables.embed(rows, train=train)
    items = torch.cat([embedded["item"], embedded["category"]], dim=-1)  # (U, d)
    target, behaviors = hand_out(items, batch.target, batch.behaviors)
    of_target = batch.category.index_select(0, batch.target)
    of_behaviors = batch.category.index_select(0, batch.behaviors.flatten()).view(batch.behaviors.shape)
    return EmbeddedBatch(
        target=target,
        behaviors=behaviors,
        behavior_mask=batch.behavior_mask,
        same_category=(of_behaviors == of_target.unsqueeze(1)) & (of_target != 0).unsqueeze(1),
        user=embedded.get("user"),
        target_mm=None if batch.mm is None else embedding(batch.target, batch.mm),
        behavior_mm=None if batch.mm is None else embedding(batch.behaviors, batch.mm),
        behavior_age_s=batch.behavior_age_s,
        context=None if batch.features is None else batch.features.context(embedded),
        query_mm=None if batch.query is None or batch.query_mm is None else embedding(batch.query, batch.query_mm),
    )


def _lists(column: pa.ChunkedArray, newest: int) -> tuple[np.ndarray, np.ndarray, pa.Array]:
    """Start and length of each row's newest elements in the flat values, and those values."""
    lists = _array(column)
    offsets = lists.offsets.to_numpy().astype(np.int64)
    length = np.diff(offsets)
    if lists.null_count:
        length = np.where(lists.is_valid().to_numpy(zero_copy_only=False), length, 0)
    kept = np.minimum(length, newest)
    first, last = int(offsets[0]), int(offsets[-1])
    return offsets[:-1] + length - kept - first, kept, lists.values.slice(first, last - first)


def _places(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """start[i], start[i] + 1, … start[i] + length[i] - 1 of every row, one after the other."""
    return np.arange(int(length.sum())) + np.repeat(start - (np.cumsum(length) - length), length)


def _array(column: pa.ChunkedArray) -> pa.Array:
    return (
        column.chunk(0)
        if column.num_chunks == 1
        else pa.concat_arrays(column.chunks)
        if column.num_chunks
        else pa.array([], column.type)
    )
