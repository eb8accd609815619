"""Fixtures: one small shared Ray for the session, and the real data where there is any."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not spin: tests share the cores

import pytest


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two lanes (`-n 2 --dist loadgroup`): what needs the head node, then all that shares the session's Ray, run one after
    another in one process each, so that there is one of both; every other file goes where there is room. Longest first."""

    def lane(item: pytest.Item) -> str:
        names = getattr(item, "fixturenames", ())
        return "head" if "head" in names else "ray" if "ray_cluster" in names else "file"

    for item in items:
        group = lane(item)
        item.add_marker(pytest.mark.xdist_group(str(item.path) if group == "file" else group))
    items.sort(key=lambda item: ("head", "ray", "file").index(lane(item)))  # stable


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """An embedded Ray with two CPUs and one pretended GPU, for all tests of the session."""
    from mim_ray.config.scenario import Run
    from mim_ray.runtime.cluster import cluster

    with cluster(Run(num_cpus=2, num_gpus=1, object_store_mb=200)):
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; tests that need it are skipped without it."""
    folder = os.environ.get("MIM_RAY_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set MIM_RAY_TEST_DATA to the folder that holds movietweetings/, obd_small/ and fuxictr_tiny/")
    return Path(folder)


@pytest.fixture(scope="session")
def gloo_workers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """`gloo_workers(function, num_workers)`: runs `function(rank)` in gloo processes of one group, one thread each.

    The function is defined inside the test (it travels by value) and returns tensors and numbers; the results come back in
    rank order.
    """
    import torch
    from ray import cloudpickle

    program = """
import sys
import torch
from ray import cloudpickle
rank, world, port, code, result = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
torch.save(cloudpickle.load(open(code, "rb"))(rank), result)
torch.distributed.destroy_process_group()
"""

    def run(function: Callable[[int], dict[str, Any]], num_workers: int) -> list[dict[str, Any]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder = tmp_path_factory.mktemp("gloo")
        code = folder / "function"
        code.write_bytes(cloudpickle.dumps(function))
        results = [folder / f"result-{rank}" for rank in range(num_workers)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", program, str(rank), str(num_workers), str(port), str(code), str(result)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, result in enumerate(results)
        ]
        errors = [process.communicate(timeout=120)[1] for process in processes]
        for process, error in zip(processes, errors, strict=True):
            assert process.returncode == 0, error
        return [torch.load(result, weights_only=True) for result in results]

    return run
