"""Rows that cannot be used, kept with reason and source: the Delta table `rejects`, partitioned by stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import deltalake
import pyarrow as pa

from mim_ray import artifacts
from mim_ray.data.schema import REJECTS


def reject_rows(stage: str, source: str, rows: Iterable[tuple[str, str, str]]) -> pa.Table:
    """A table of rejects from (key, reason, detail) rows of one source."""
    rows = list(rows)
    columns = [[stage] * len(rows), [source] * len(rows), *([row[i] for row in rows] for i in range(3))]
    return pa.table([pa.array(c, pa.string()) for c in columns], schema=REJECTS.schema)


def write_rejects(uri: str, stage: str, rows: pa.Table) -> dict[str, int]:
    """Replace what `stage` had rejected before by `rows`, in one commit; returns the number of rows by reason."""
    rows = rows.select(REJECTS.schema.names).cast(REJECTS.schema)
    if not deltalake.DeltaTable.is_deltatable(uri):
        deltalake.DeltaTable.create(uri, REJECTS.schema, partition_by=["stage"], mode="ignore")
    quoted = stage.replace("'", "''")
    if rows.num_rows:
        deltalake.write_deltalake(uri, rows, mode="overwrite", predicate=f"stage = '{quoted}'")
    else:
        deltalake.DeltaTable(uri).delete(f"stage = '{quoted}'")
    return dict(Counter(rows.column("reason").to_pylist()))


def read_rejects(uri: str, stage: str | None = None) -> pa.Table:
    """The rejects of one stage, or of all; empty where nothing was ever rejected."""
    if not deltalake.DeltaTable.is_deltatable(uri):
        return REJECTS.schema.empty_table()
    filters = [("stage", "=", stage)] if stage is not None else None
    table = deltalake.DeltaTable(uri).to_pyarrow_table(filters=filters, filesystem=artifacts.folder_filesystem(uri))
    return table.select(REJECTS.schema.names).cast(REJECTS.schema)
