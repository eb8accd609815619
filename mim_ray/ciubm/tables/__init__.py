"""ID embedding tables: one face (face.py), two engines.

`torch` (replicated.py): every worker holds the whole tables; a step touches only the rows that were met.
`torchrec` (sharded.py, optional extra): the rows lie shared out among the workers, for tables that outgrow one.

    tables = create_tables(scenario.ciubm, {"item": 1_001, "category": 31}, seed=0)
    rows = tables.embed({"item": item_rows, "category": category_rows}, train=True)   # leaves
    loss_of(rows).backward()
    tables.step(learning_rate)
"""

from __future__ import annotations

from mim_ray.ciubm.tables.create import create_tables
from mim_ray.ciubm.tables.face import Lookup, Tables
from mim_ray.ciubm.tables.replicated import EmbeddingTable, IdTables
from mim_ray.ciubm.tables.sharded import ShardedTables

__all__ = ["EmbeddingTable", "IdTables", "Lookup", "ShardedTables", "Tables", "create_tables"]
