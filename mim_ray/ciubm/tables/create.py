"""The tables that a scenario asks for."""

from __future__ import annotations

from collections.abc import Mapping

from mim_ray.ciubm.tables.face import Tables
from mim_ray.ciubm.tables.replicated import IdTables
from mim_ray.config.scenario import Ciubm


def create_tables(settings: Ciubm, num_rows: Mapping[str, int], seed: int) -> Tables:
    """Seeded tables of `num_rows[name]` rows each (the unknown row 0 included), `settings.id_dim` wide."""
    return IdTables.create(num_rows, settings.id_dim, seed=seed, optimizer=settings.table_optimizer)
