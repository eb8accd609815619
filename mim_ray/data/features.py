"""Columns of the user's own that the scenario declares as features (data.features), from the tables to the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from mim_ray.config.scenario import Feature, Scenario
from mim_ray.data.schema import IMPRESSIONS, INTERACTIONS, TABLES, TableSchema
from mim_ray.errors import ConfigError

_TYPES = {"categorical": pa.string(), "dense": pa.float64(), "multi": pa.list_(pa.string())}
_TAKEN = frozenset(IMPRESSIONS.schema.names) | frozenset(INTERACTIONS.schema.names)


def feature_fields(features: Sequence[Feature]) -> list[pa.Field]:
    """The columns of declared features."""
    return [pa.field(feature.name, _TYPES[feature.kind]) for feature in features]


def with_features(table: TableSchema, fields: Sequence[pa.Field]) -> TableSchema:
    """`table` with more columns, none of which may be missing."""
    return replace(table, schema=pa.schema([*table.schema, *fields]))


def features_in(schema: pa.Schema, table: str) -> list[pa.Field]:
    """The columns of `schema` that `with_features` added to the table called `table`."""
    return [field for field in schema if field.name not in TABLES[table].schema.names]


def num_missing(rows: pa.Table) -> dict[str, int]:
    """How many of some impressions lack a feature: null, or no finite number. Features that none lacks are left out."""
    counts = {}
    for field in features_in(rows.schema, "impressions"):
        column = rows[field.name]
        usable = pc.is_finite(column) if pa.types.is_floating(field.type) else column.is_valid()
        num = len(rows) - (pc.sum(pc.fill_null(usable, False)).as_py() or 0)
        if num:
            counts[f"impressions without {field.name}"] = num
    return counts


def check_features(scenario: Scenario) -> None:
    """
    Raises:
        ConfigError: a name is declared twice, is that of a column with a meaning, or ciubm.features names none of them.
    """
    names = [feature.name for feature in scenario.data.features]
    problems = [
        f"data.features declares {name!r} more than once. Give every feature one entry."
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    problems += [
        f"data.features declares {name!r}, a column that has a meaning of its own. Call the feature's column otherwise."
        for name in names
        if name in _TAKEN
    ]
    problems += [
        f"ciubm.features sets {name!r}, which data.features does not declare (it declares "
        f"{', '.join(names) or 'none'}). Add it there, or take it out here."
        for name in scenario.ciubm.features
        if name not in names
    ]
    if problems:
        raise ConfigError("\n".join(problems))
