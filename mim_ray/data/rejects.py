"""Rows that cannot be used, kept with reason and source: the Delta table `rejects`, partitioned by stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import deltalake
import pyarrow as pa

from mim_ray import artifacts
from mim_ray.data.schema import REJECTS
from mim_ray.object_store import delta_options, storage_errors


def reject_rows(stage: str, source: str, rows: Iterable[tuple[str, str, str]]) -> pa.Table:
    """A table of rejects from (key, reason, detail) rows of one source."""
    rows = list(rows)
    columns = [[stage] * len(rows), [source] * len(rows), *([row[i] for row in rows] for i in range(3))]
    return pa.table([pa.array(c, pa.string()) for c in columns], schema=REJECTS.schema)


def write_rejects(uri: str, stage: str, rows: pa.Table) -> dict[str, int]:
    """Replace what `stage` had rejected before by `rows`, in one commit; returns the number of rows by reason."""
    rows = rows.select(REJECTS.schema.names).cast(REJECTS.schema)
    options, quoted = delta_options(uri), stage.replace("'", "''")
    with storage_errors(uri):
        if not deltalake.DeltaTable.is_deltatable(uri, options):
            deltalake.DeltaTable.create(
                uri, REJECTS.schema, partition_by=["stage"], mode="ignore", storage_options=options
            )
        table = deltalake.DeltaTable(uri, storage_options=options)
        if rows.num_rows:
            deltalake.write_deltalake(table, rows, mode="overwrite", predicate=f"stage = '{quoted}'")
        else:
            table.delete(f"stage = '{quoted}'")
    return dict(Counter(rows.column("reason").to_pylist()))


def read_rejects(uri: str, stage: str | None = None) -> pa.Table:
    """The rejects of one stage, or of all; empty where nothing was ever rejected."""
    options = delta_options(uri)
    with storage_errors(uri):
        if not deltalake.DeltaTable.is_deltatable(uri, options):
            return REJECTS.schema.empty_table()
        table = deltalake.DeltaTable(uri, storage_options=options)
        filters = [("stage", "=", stage)] if stage is not None else None
        rows = table.to_pyarrow_table(filters=filters, filesystem=artifacts.folder_filesystem(uri))
    return rows.select(REJECTS.schema.names).cast(REJECTS.schema)
