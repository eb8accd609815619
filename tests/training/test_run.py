"""Ray Train as a thin shell: results, ranks, errors. A restart after a kill: tests/csft/test_train.py."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from mim_ray.config.scenario import Workers
from mim_ray.errors import NonFiniteLossError, TrainingError
from mim_ray.training.run import run_workers

pytestmark = pytest.mark.ray
TWO = Workers(num_workers=2, max_failures=1)


def test_workers_form_one_process_group_and_rank_0_reports(ray_cluster: None, tmp_path: Path) -> None:
    def loop(config: dict[str, Any]) -> None:
        import torch

        from mim_ray.training.run import rank, report, world_size

        total = torch.tensor(float(rank() + 1))
        torch.distributed.all_reduce(total)
        for step in range(2):
            report({"step": step})
        report({"rank": rank(), "world": world_size(), "sum": total.item() * config["factor"], "curve": [1, 2]})

    start = time.perf_counter()
    metrics = run_workers(loop, {"factor": 2.0}, workers=TWO, name="sum", storage=str(tmp_path))
    print(f"two workers took {time.perf_counter() - start:.1f} s")
    assert metrics == {"rank": 0, "world": 2, "sum": 6.0, "curve": [1, 2]}


@pytest.mark.chaos  # half a minute; actors that ask for one are tested in tests/extraction
def test_workers_that_ask_for_a_gpu_get_it_and_train_on_the_cpu_where_it_is_a_pretended_one(
    ray_cluster: None, tmp_path: Path
) -> None:
    def loop(config: dict[str, Any]) -> None:
        import ray

        from mim_ray.training.run import report, worker_device

        report(
            {"gpus": len(ray.get_runtime_context().get_accelerator_ids()["GPU"]), "device": worker_device(True).type}
        )

    workers = Workers(num_workers=1, use_gpu=True, in_driver=True)
    metrics = run_workers(loop, {}, workers=workers, name="gpu", storage=str(tmp_path))
    import torch

    assert metrics == {"gpus": 1, "device": "cuda" if torch.cuda.is_available() else "cpu"}


def test_an_error_raised_on_purpose_ends_the_run_at_once_and_keeps_its_type(ray_cluster: None, tmp_path: Path) -> None:
    def loop(config: dict[str, Any]) -> None:
        from mim_ray.errors import NonFiniteLossError

        with open(config["attempts"], "a") as file:
            file.write("x")
        raise NonFiniteLossError("the loss at step 3 is nan")

    attempts = tmp_path / "attempts"
    with pytest.raises(NonFiniteLossError, match="step 3"):
        run_workers(
            loop,
            {"attempts": str(attempts)},
            workers=Workers(num_workers=1, max_failures=3),
            name="nan",
            storage=str(tmp_path),
        )
    assert attempts.read_text() == "x"


def test_a_crash_that_comes_again_ends_in_one_sentence(ray_cluster: None, tmp_path: Path) -> None:
    def loop(config: dict[str, Any]) -> None:
        raise KeyError("broken")

    with pytest.raises(TrainingError, match="failed more than 0 times"):
        run_workers(loop, {}, workers=Workers(max_failures=0), name="crash", storage=str(tmp_path))


def test_one_worker_can_run_inside_the_driver(ray_cluster: None, tmp_path: Path) -> None:
    pids = []

    def loop(config: dict[str, Any]) -> None:
        from mim_ray.training.run import rank, report, world_size

        pids.append(os.getpid())
        report({"rank": rank(), "world": world_size()})

    metrics = run_workers(loop, {}, workers=Workers(in_driver=True), name="inside", storage=str(tmp_path))
    assert metrics == {"rank": 0, "world": 1}
    assert pids == [os.getpid()]

    def failing(config: dict[str, Any]) -> None:
        raise NonFiniteLossError("nan")

    with pytest.raises(NonFiniteLossError):
        run_workers(failing, {}, workers=Workers(in_driver=True), name="inside", storage=str(tmp_path))
