"""What the CTR network is told beside ids and content: declared features of an impression, and the ages of its behaviors.

The same code turns a table of impressions and a request into numbers: a request becomes a table first. What that takes is
learnt on train rows alone and saved beside the model.

Absent values have a meaning, never NaN: a categorical feature that is null, or whose value train did not meet often enough,
has the embedding of row 0; so has a multi-valued one without any known value; a dense one that is null or not finite counts
as train's mean (or median); a behavior without a time is as old as train's behaviors typically are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import embedding

from mim_ray import artifacts
from mim_ray.ciubm.vocabulary import Vocabulary
from mim_ray.data.event_log import UNKNOWN_TIME
from mim_ray.data.ids import hash_ids
from mim_ray.errors import ArtifactError

_LARGEST = 10.0  # standard deviations


@dataclass(frozen=True)
class FeatureValues:
    """A categorical or multi-valued feature of B impressions.

    Attributes:
        rows: (U,) rows of the feature's table. place: (n,) into `rows`, one for each value.
        impression: (n,) to which impression each value belongs, at least one each; None: one each, in order.
    """

    rows: Tensor
    place: Tensor
    impression: Tensor | None

    def to(self, device: torch.device | str) -> FeatureValues:
        """The same on another device."""
        impression = None if self.impression is None else self.impression.to(device)
        return FeatureValues(self.rows.to(device), self.place.to(device), impression)


@dataclass(frozen=True)
class FeatureBatch:
    """The declared features of B impressions: those with embeddings by name, and the dense ones (B, number), normalised."""

    values: Mapping[str, FeatureValues]
    dense: Tensor

    def to(self, device: torch.device | str) -> FeatureBatch:
        """The same on another device."""
        return FeatureBatch({name: values.to(device) for name, values in self.values.items()}, self.dense.to(device))

    def context(self, embedded: Mapping[str, Tensor]) -> Tensor:
        """(B, c): the embedding of each feature (the mean of its values'), in order, then the dense ones.

        Args:
            embedded: (U, width) by table name, of the rows in `values`.
        """
        parts = []
        for name, values in self.values.items():
            each = embedding(values.place, embedded[table_name(name)])
            if values.impression is not None:
                size = len(self.dense)
                total = each.new_zeros(size, each.shape[1]).index_add(0, values.impression, each)
                count = torch.bincount(values.impression, minlength=size).unsqueeze(1)
                each = total / count
            parts.append(each)
        return torch.cat([*parts, self.dense], dim=-1)


@dataclass(frozen=True)
class Categories:
    """A feature whose values have embeddings, by a vocabulary or by `num_buckets` hash buckets. Row 0 is unknown.

    Attributes:
        max_values: of a row that are looked at, from the first on; None for a categorical feature, which has one.
    """

    name: str
    vocabulary: Vocabulary | None
    num_buckets: int | None = None
    max_values: int | None = None

    @property
    def num_rows(self) -> int:
        """Of the feature's table."""
        if self.vocabulary is not None:
            return len(self.vocabulary) + 1
        assert self.num_buckets is not None
        return self.num_buckets + 1

    def encode(self, column: pa.Array, dropped: np.ndarray) -> FeatureValues:
        """
        Args:
            column: B strings, or lists of strings. dropped: (B,) bool, impressions whose values count as unknown.
        """
        impression: np.ndarray | None = None
        values, known = column, ~dropped
        if self.max_values is not None:
            place, impression = _first_places(column, self.max_values)
            values, known = column.values.take(pa.array(place)), known[impression]
        met = values.dictionary_encode()
        rows = np.append(self._rows(met.dictionary), 0)  # the last is of unknown values
        last = len(rows) - 1
        place = np.where(known, np.asarray(met.indices.fill_null(last)).astype(np.int64), last)
        if impression is not None:
            kept = rows[place] != 0
            without = np.flatnonzero(np.bincount(impression[kept], minlength=len(column)) == 0)
            place = np.concatenate([place[kept], np.full(len(without), last)])
            impression = np.concatenate([impression[kept], without])
        of = None if impression is None else torch.from_numpy(impression)
        return FeatureValues(torch.from_numpy(rows), torch.from_numpy(place), of)

    def grow(self, later: Categories) -> Categories:
        """With the values that only `later` has behind its own, whose rows stay."""
        if self.vocabulary is None or later.vocabulary is None:
            return self
        return replace(self, vocabulary=self.vocabulary.grow(later.vocabulary.ids))

    def _rows(self, values: pa.Array) -> np.ndarray:
        if self.vocabulary is not None:
            return self.vocabulary.encode(values)
        return (hash_ids(values) % np.uint64(self.num_rows - 1)).astype(np.int64) + 1


@dataclass(frozen=True)
class Number:
    """A dense feature: (x - mean) / std within ±10, or its place among train's quantiles from -1 to 1.

    Attributes:
        quantiles: in rising order, at even ranks; None for mean and std. A value that is several of them has their mean place.
    """

    name: str
    mean: float = 0.0
    std: float = 1.0
    quantiles: tuple[float, ...] | None = None

    def encode(self, column: pa.Array) -> np.ndarray:
        """(B,) float32 of B float64; 0 where there is none."""
        values = np.asarray(column.cast(pa.float64()).fill_null(np.nan))
        finite = np.isfinite(values)
        if self.quantiles is None:
            with np.errstate(over="ignore"):
                scaled = np.clip((np.where(finite, values, self.mean) - self.mean) / self.std, -_LARGEST, _LARGEST)
        else:
            knots, group = np.unique(self.quantiles, return_inverse=True)
            places = np.linspace(-1.0, 1.0, len(group))
            scaled = np.interp(values, knots, np.bincount(group, places) / np.bincount(group))
        return np.where(finite, scaled, 0.0).astype(np.float32)


@dataclass(frozen=True)
class Features:
    """What was learnt of train rows, and the numbers of other rows by it.

    Attributes:
        categories, numbers: the declared features, in the order of the context.
        typical_age_s: geometric mean of the behaviors' ages in train, the age of a behavior whose time is not known. None
            where train has no times: no ages are used then.
    """

    categories: tuple[Categories, ...] = ()
    numbers: tuple[Number, ...] = ()
    typical_age_s: float | None = None

    @property
    def kinds(self) -> dict[str, str]:
        """categorical, multi or dense by name."""
        kinds = {one.name: "categorical" if one.max_values is None else "multi" for one in self.categories}
        return kinds | {one.name: "dense" for one in self.numbers}

    @property
    def max_values(self) -> dict[str, int]:
        """Of the multi-valued features, by name: how many values of a row are looked at."""
        return {one.name: one.max_values for one in self.categories if one.max_values is not None}

    @property
    def num_table_rows(self) -> dict[str, int]:
        """Rows by table name."""
        return {table_name(one.name): one.num_rows for one in self.categories}

    def grow(self, later: Features) -> Features:
        """With the values that only `later`, of the same declared features, has met. Normalisation and ages stay: the network
        was trained on them."""
        new = {one.name: one for one in later.categories}
        return replace(self, categories=tuple(one.grow(new[one.name]) for one in self.categories))

    def describe(self) -> str:
        """For summaries."""
        parts = [f"{one.name} ({one.num_rows - 1:,} values)" for one in self.categories]
        return ", ".join([*parts, *(one.name for one in self.numbers)])

    def context_width(self, id_dim: int) -> int:
        """c, for embeddings of width `id_dim`."""
        return id_dim * len(self.categories) + len(self.numbers)

    def encode(self, table: pa.Table, dropped: np.ndarray | None = None) -> FeatureBatch | None:
        """The declared features of a table's rows; None where none is declared. A column that is not there is all null.

        Args:
            dropped: (B,) bool, rows whose values count as unknown.
        """
        if not self.kinds:
            return None
        size = len(table)
        dropped = np.zeros(size, bool) if dropped is None else dropped
        values = {one.name: one.encode(_column(table, one.name, one.max_values), dropped) for one in self.categories}
        dense = np.zeros((size, len(self.numbers)), np.float32)
        for place, one in enumerate(self.numbers):
            if one.name in table.column_names:
                dense[:, place] = one.encode(_one_chunk(table[one.name]))
        return FeatureBatch(values, torch.from_numpy(dense))

    def ages(self, at: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Seconds from behaviors to their impressions, float32, never negative.

        Args:
            at, times: (n,) microseconds of the impression and the behavior, UNKNOWN_TIME where there is none.
        """
        assert self.typical_age_s is not None
        known = (at != UNKNOWN_TIME) & (times != UNKNOWN_TIME)
        return np.where(known, np.maximum(at - times, 0) / 1e6, self.typical_age_s).astype(np.float32)

    def save(self, uri: str) -> None:
        """Write feature.<name>.arrow for each vocabulary and features.json below `uri`."""
        for one in self.categories:
            if one.vocabulary is not None:
                one.vocabulary.save(f"{uri}/{table_name(one.name)}.arrow")
        described = {
            "categories": [
                {"name": one.name, "num_buckets": one.num_buckets, "max_values": one.max_values}
                for one in self.categories
            ],
            "numbers": [vars(one) for one in self.numbers],
            "typical_age_s": self.typical_age_s,
        }
        artifacts.write_json(f"{uri}/features.json", described)

    @classmethod
    def load(cls, uri: str) -> Features:
        """
        Raises:
            ArtifactError: missing or damaged.
        """
        described = artifacts.read_json(f"{uri}/features.json")
        try:
            categories, numbers = described["categories"], described["numbers"]
            return cls(
                tuple(Categories(vocabulary=_vocabulary(uri, one), **one) for one in categories),
                tuple(Number(**{**one, "quantiles": one["quantiles"] and tuple(one["quantiles"])}) for one in numbers),
                described["typical_age_s"],
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{uri}/features.json describes no features ({error}). Train it again.") from None


def table_name(feature: str) -> str:
    """Of the table of a feature's embeddings."""
    return f"feature.{feature}"


def _vocabulary(uri: str, described: Mapping[str, object]) -> Vocabulary | None:
    if described["num_buckets"] is not None:
        return None
    return Vocabulary.load(f"{uri}/{table_name(str(described['name']))}.arrow")


def _column(table: pa.Table, name: str, max_values: int | None) -> pa.Array:
    kind = pa.string() if max_values is None else pa.list_(pa.string())
    if name not in table.column_names:
        return pa.nulls(len(table), kind)
    column = _one_chunk(table[name])
    return column if column.type == kind else column.cast(kind)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays([pa.array([], column.type), *column.chunks])


def _first_places(lists: pa.Array, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Places in `lists.values` of each list's first values, and the list of each."""
    offsets = lists.offsets.to_numpy().astype(np.int64)
    length = np.where(np.asarray(lists.is_valid()), np.minimum(np.diff(offsets), longest), 0)
    of = np.repeat(np.arange(len(lists)), length)
    return np.arange(len(of)) + np.repeat(offsets[:-1] - (np.cumsum(length) - length), length), of
