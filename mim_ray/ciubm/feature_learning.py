"""Vocabularies and normalisation of the declared features, from train rows only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray.ciubm.features import Categories, Features, Number
from mim_ray.ciubm.vocabulary import Vocabulary
from mim_ray.config.scenario import Feature, FeatureTransform
from mim_ray.data.batches import num_rows, ordered_batches
from mim_ray.data.event_log import UNKNOWN_TIME, times_us

_BATCH_ROWS = 16_384
_SAMPLED_ROWS = 1_000_000  # for mean, deviation, quantiles and ages; an even sample of more
_NUM_QUANTILES = 101
_MERGED = 64  # batches
_FAR = 1e100  # values beyond it count as it, so that sums of squares stay finite


def learn_features(train: str, declared: Sequence[Feature], settings: Mapping[str, FeatureTransform]) -> Features:
    """Features of the impressions at the URI `train`, by one pass over their columns.

    Args:
        settings: by name, where they differ from the defaults.
    """
    names = [feature.name for feature in declared]
    chosen = {name: settings.get(name, FeatureTransform()) for name in names}
    counts = {f.name: _Counts() for f in declared if f.kind != "dense" and chosen[f.name].num_buckets is None}
    sampled: dict[str, list[np.ndarray]] = {feature.name: [] for feature in declared if feature.kind == "dense"}
    num_ages, log_ages = 0, 0.0
    stride = max(1, num_rows(train) // _SAMPLED_ROWS)
    first = 0  # row of train, modulo the stride
    for table in ordered_batches(train, ["timestamp", "behavior_times", *names], _BATCH_ROWS):
        for name, count in counts.items():
            count.add(table[name])
        rows = table.take(pa.array(np.arange((-first) % stride, len(table), stride)))
        first = (first + len(table)) % stride
        for name, values in sampled.items():
            values.append(_finite(rows[name]))
        if "behavior_times" in table.column_names:
            ages = _known_ages(rows)
            num_ages, log_ages = num_ages + len(ages), log_ages + float(np.log1p(ages).sum())
    categories = [
        Categories(
            feature.name,
            counts[feature.name].vocabulary(chosen[feature.name].min_count) if feature.name in counts else None,
            chosen[feature.name].num_buckets,
            chosen[feature.name].max_values if feature.kind == "multi" else None,
        )
        for feature in declared
        if feature.kind != "dense"
    ]
    numbers = [_number(name, np.concatenate(values), chosen[name]) for name, values in sampled.items()]
    return Features(tuple(categories), tuple(numbers), float(np.expm1(log_ages / num_ages)) if num_ages else None)


class _Counts:
    """How often each value was met."""

    def __init__(self) -> None:
        self._parts: list[pa.Table] = []

    def add(self, column: pa.ChunkedArray) -> None:
        values = pc.list_flatten(column) if pa.types.is_list(column.type) else column
        met = values.drop_null().value_counts()
        self._parts.append(pa.table([met.field("values"), met.field("counts")], ["value", "count"]))
        if len(self._parts) == _MERGED:
            self._parts = [self._merged()]

    def vocabulary(self, min_count: int) -> Vocabulary:
        """The values met at least so often, in the order of their bytes."""
        merged = self._merged()
        values = merged.filter(pc.greater_equal(merged["count"], min_count))["value"].combine_chunks()
        return Vocabulary(values.take(pc.sort_indices(values)))

    def _merged(self) -> pa.Table:
        if not self._parts:
            return pa.table({"value": pa.array([], pa.string()), "count": pa.array([], pa.int64())})
        summed = pa.concat_tables(self._parts).group_by("value").aggregate([("count", "sum")])
        return pa.table([summed["value"], summed["count_sum"]], ["value", "count"])


def _number(name: str, values: np.ndarray, settings: FeatureTransform) -> Number:
    """A feature without any value, or with one only, becomes 0."""
    if settings.normalise == "quantile" and len(values):
        knots = np.quantile(values, np.linspace(0.0, 1.0, _NUM_QUANTILES))
        return Number(name, quantiles=tuple(knots.tolist()))
    mean, std = (float(values.mean()), float(values.std())) if len(values) else (0.0, 1.0)
    return Number(name, mean=mean, std=std if std > 0 and np.isfinite(std) else 1.0)


def _finite(column: pa.ChunkedArray) -> np.ndarray:
    values = np.asarray(column.cast(pa.float64()).fill_null(np.nan))
    return np.clip(values[np.isfinite(values)], -_FAR, _FAR)


def _known_ages(table: pa.Table) -> np.ndarray:
    """Seconds from every behavior with a time to its impression."""
    lists = table["behavior_times"].combine_chunks()
    sizes = np.asarray(lists.value_lengths().fill_null(0))
    at, times = np.repeat(times_us(table["timestamp"]), sizes), times_us(lists.flatten())
    known = (at != UNKNOWN_TIME) & (times != UNKNOWN_TIME)
    return np.maximum(at - times, 0)[known] / 1e6
