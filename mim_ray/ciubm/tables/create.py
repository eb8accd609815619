"""The tables that a scenario asks for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mim_ray.ciubm.tables.face import Tables
from mim_ray.ciubm.tables.replicated import IdTables
from mim_ray.ciubm.tables.sharded import ShardedTables
from mim_ray.config.scenario import Ciubm
from mim_ray.errors import ConfigError


def create_tables(
    settings: Ciubm, num_rows: Mapping[str, int], seed: int, device: torch.device | str = "cpu"
) -> Tables:
    """Seeded tables of `num_rows[name]` rows each (the unknown row 0 included), `settings.id_dim` wide.

    Collective with the torchrec engine.

    Args:
        device: of the torch engine's tables.

    Raises:
        ConfigError: the engine cannot be loaded, does not have the optimizer, or is not for this device.
    """
    if settings.table_engine == "torchrec":
        if settings.table_optimizer != "rowwise_adagrad":
            raise ConfigError(
                f"ciubm.table_optimizer = {settings.table_optimizer}: FBGEMM has no Adam on CPUs. Set it to "
                "rowwise_adagrad, or use ciubm.table_engine=torch."
            )
        if torch.device(device).type != "cpu":
            raise ConfigError(
                "ciubm.table_engine = torchrec shards tables over CPU workers here. Set ciubm.use_gpu=false, or use "
                "ciubm.table_engine=torch."
            )
        return ShardedTables(num_rows, settings.id_dim, seed=seed)
    return IdTables.create(num_rows, settings.id_dim, seed=seed, optimizer=settings.table_optimizer, device=device)
