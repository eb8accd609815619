"""Columns of a user's file as the types of a table: what is harmless is cast, the rest is a sentence."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray.data.schema import TIME, TableSchema
from mim_ray.errors import DataError


def validate_schema(schema: pa.Schema, table: TableSchema, source: str) -> None:
    """Check that every required column is there and every known column can be cast; all problems in one message.

    Raises:
        DataError: names the file, the columns, the types met and wanted, and what to do.
    """
    problems = []
    for name in table.required:
        if name not in schema.names:
            problems.append(
                f"{source} has no column {name!r} (it has {', '.join(schema.names) or 'none'}). "
                f"Add it as {table.schema.field(name).type}, or rename the column that holds it."
            )
    for name in set(table.schema.names) & set(schema.names):
        wanted, met = table.schema.field(name).type, schema.field(name).type
        if not _castable(met, wanted):
            problems.append(f"{source}: column {name!r} is {met}, but must be {wanted}. Convert it and write it again.")
    if problems:
        raise DataError("\n".join(sorted(problems)))


def _castable(met: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_dictionary(met):
        met = met.value_type
    if met == wanted or pa.types.is_null(met):
        return True
    text = pa.types.is_string(met) or pa.types.is_large_string(met) or pa.types.is_string_view(met)
    binary = pa.types.is_binary(met) or pa.types.is_large_binary(met) or pa.types.is_binary_view(met)
    number = pa.types.is_integer(met) or pa.types.is_floating(met)
    if pa.types.is_string(wanted):
        return text or pa.types.is_integer(met)
    if pa.types.is_binary(wanted):
        return binary
    if pa.types.is_timestamp(wanted):
        return pa.types.is_timestamp(met) or pa.types.is_date(met)
    if pa.types.is_list(wanted):
        is_list = pa.types.is_list(met) or pa.types.is_large_list(met) or pa.types.is_fixed_size_list(met)
        return is_list and _castable(met.value_type, wanted.value_type)
    if pa.types.is_boolean(wanted):
        return pa.types.is_integer(met)
    return number or pa.types.is_boolean(met) or pa.types.is_decimal(met)


def cast_columns(rows: pa.Table, names: list[str], table: TableSchema, source: str) -> pa.Table:
    """The columns `names` with the table's types; those that are not there are null.

    Raises:
        DataError: values that do not fit; names `source` and the column.
    """
    columns = []
    for name in names:
        wanted = table.schema.field(name).type
        if name not in rows.column_names:
            columns.append(pa.chunked_array([pa.nulls(rows.num_rows, wanted)]))
            continue
        column = rows.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        try:
            if pa.types.is_timestamp(wanted) and column.type != wanted:
                column = column.cast(pa.timestamp("us", getattr(column.type, "tz", None)), safe=False)
                column = column.cast(TIME) if column.type.tz else pc.assume_timezone(column, "UTC")
            elif pa.types.is_list(wanted) and pa.types.is_timestamp(wanted.value_type) and column.type != wanted:
                column = _time_lists(column)
            elif pa.types.is_integer(wanted) and not pa.types.is_integer(column.type):
                column = column.cast(wanted, safe=False) if pa.types.is_boolean(column.type) else _whole(column, wanted)
            columns.append(column.cast(wanted))
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{source}: column {name!r} ({column.type}) has values that do not fit {wanted} ({error}). "
                "Correct them and write the file again."
            ) from None
    return pa.table(columns, schema=pa.schema([table.schema.field(name) for name in names]))


def _time_lists(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lists of times in any unit, dates too, as lists of TIME; times without zone are UTC, as in plain columns."""
    if pa.types.is_null(column.type):
        return column
    zone = getattr(column.type.value_type, "tz", None)
    return column.cast(pa.list_(pa.timestamp("us", zone)), safe=False)


def _whole(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.ChunkedArray:
    """Numbers as integers; what is no whole number becomes null, for the caller to reject."""
    values = column.cast(pa.float64())
    whole = pc.and_(pc.equal(values, pc.round(values)), pc.less_equal(pc.abs(values), float(np.iinfo(np.int8).max)))
    return pc.if_else(whole, values, pa.scalar(None, pa.float64())).cast(wanted)
