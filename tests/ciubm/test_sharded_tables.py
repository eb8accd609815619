"""Engine torchrec: the same as the torch engine's row-wise Adagrad, for any number of workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mim_ray.ciubm.tables import IdTables, ShardedTables, create_tables
from mim_ray.config.scenario import Ciubm
from mim_ray.errors import ConfigError

try:
    import torchrec  # noqa: F401

    missing = ""
except (ImportError, OSError) as error:
    missing = f"{error}"
needs_torchrec = pytest.mark.skipif(
    bool(missing),
    reason=f"TorchRec cannot be loaded ({missing}). In an environment of its own: pip install -e '.[torchrec,dev]' && "
    "pip install --no-deps torchrec==1.9.2",
)
ROWS = {"item": 11, "category": 3, "feature.os": 1}
"""Blocks of 6 and 5, of 2 and 1, and of 1 and none with two workers."""
BATCHES = [
    ([3, 1, 4, 1], [2, 2, 0, 1], [0, 0, 0, 0]),
    ([5, 9, 2, 6], [1, 1, 1, 1], [0, 0, 0, 0]),
    ([10, 10, 5, 8], [0, 1, 2, 0], [0, 0, 0, 0]),
    ([7, 7], [2, 0], [0, 0]),  # the second worker has no rows
]


@needs_torchrec
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_any_number_of_workers_matches_the_torch_engine_on_joined_batches(
    gloo_workers: Callable[..., list[dict[str, Any]]], num_workers: int
) -> None:
    """Within 1e-6 after four steps with a falling rate; killed and resumed after the second."""
    sizes, all_batches = ROWS, BATCHES

    def train(tables: Any, rank: int, world: int, steps: range) -> None:
        for number in steps:
            part = slice(rank * 4 // world, (rank + 1) * 4 // world)
            mine = [torch.tensor(rows[part], dtype=torch.int64) for rows in all_batches[number]]
            embedded = tables.embed(dict(zip(sizes, mine, strict=True)), train=True)
            loss = sum(value.sin().sum() for value in embedded.values()) * (number + 1)
            (loss * world).backward()  # the mean over workers is the joined batch's sum
            tables.step(0.05 / (number + 1))

    def on_worker(rank: int) -> dict[str, Any]:
        tables = ShardedTables(sizes, 4, seed=5)
        tables.load_state(IdTables.create(sizes, 4, seed=0).state())
        train(tables, rank, num_workers, range(2))
        saved = [tables.state(), tables.optimizer_state()]
        torch.distributed.broadcast_object_list(saved)
        resumed = ShardedTables(dict.fromkeys(sizes, 1), 4, seed=9)
        resumed.load_state(saved[0])
        resumed.load_optimizer_state(saved[1])
        train(resumed, rank, num_workers, range(2, 4))
        asked = torch.tensor([10, 0, 10] if rank == 0 else [], dtype=torch.int64)
        return {**resumed.state(), **resumed.optimizer_state(), "asked": resumed.embed({"item": asked})["item"]}

    expected = IdTables.create(sizes, 4, seed=0, optimizer="rowwise_adagrad")
    train(expected, 0, 1, range(4))
    first, *others = gloo_workers(on_worker, num_workers)
    for name, value in {**expected.state(), **expected.optimizer_state()}.items():
        if not name.endswith("num_steps"):
            assert torch.allclose(first[name], value, atol=1e-6), name
    assert torch.allclose(first["asked"], expected["item"].weight[[10, 0, 10]], atol=1e-6)
    assert all(set(other) == {"asked"} for other in others)


@needs_torchrec
@pytest.mark.distributed
def test_first_rows_are_the_same_for_any_number_of_workers(gloo_workers: Callable[..., list[dict[str, Any]]]) -> None:
    def on_worker(rank: int) -> dict[str, Any]:
        return dict(ShardedTables(ROWS, 4, seed=3).state())

    (alone,) = gloo_workers(on_worker, 1)
    first, _ = gloo_workers(on_worker, 2)
    assert all(torch.equal(first[name], weight) for name, weight in alone.items())


@needs_torchrec
def test_what_fbgemm_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiples of 4"):
        ShardedTables(ROWS, 6, seed=0)


@pytest.mark.skipif(not missing, reason="TorchRec is there")
def test_without_torchrec_the_engine_says_what_to_install() -> None:
    settings = Ciubm(table_engine="torchrec", table_optimizer="rowwise_adagrad")
    with pytest.raises(ConfigError, match="id_tables"):
        create_tables(settings, ROWS, seed=0)


def test_sharded_adam_is_refused() -> None:
    with pytest.raises(ConfigError, match="rowwise_adagrad"):
        create_tables(Ciubm(table_engine="torchrec"), ROWS, seed=0)


def test_the_scenario_chooses_the_optimizer() -> None:
    tables = create_tables(Ciubm(table_optimizer="rowwise_adagrad", id_dim=5), ROWS, seed=0)
    assert isinstance(tables, IdTables)
    tables.embed({"item": torch.tensor([1])}, train=True)["item"].sum().backward()
    tables.step(0.1)
    assert tables["item"].optimizer.slots["square"].shape == (11,)
    assert tables.state()["feature.os"].shape == (1, 5)
