"""Fixtures: one small shared Ray for the session, and the real data where there is any."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import unittest.mock
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not spin: tests share the cores

import pytest

RAY_LANE = {"ciubm", "csft", "extraction", "pipeline", "pretraining", "training"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` runs the tests of these folders that use the session's Ray beside all others, in a process and a Ray of their
    own: each half takes about as long."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()) and item.path.parent.name in RAY_LANE:
            item.add_marker("ray_lane")


@dataclass(frozen=True)
class S3:
    """An S3 API server on loopback and an empty place on it.

    Attributes:
        uri: of the empty place, s3://bucket/…. env: what a process needs to reach it.
        secret: the secret key, unlike any other text, so that a search finds it wherever it leaks.
    """

    uri: str
    endpoint: str
    env: dict[str, str]
    secret: str

    def requests(self) -> list[str]:
        """Requests since the last call: METHOD /bucket/key?query."""
        with urllib.request.urlopen(f"{self.endpoint}/__requests__") as answer:
            return list(json.load(answer))

    def set_conditional_writes(self, on: bool) -> None:
        self._put(f"__conditional__/{'on' if on else 'off'}")

    def lose_answers(self, count: int) -> None:
        """The next commits are made, but answered with an error."""
        self._put(f"__lose__/{count}")

    def make_older(self, seconds: int) -> None:
        """All objects that are there."""
        self._put(f"__older__/{seconds}")

    def _put(self, path: str) -> None:
        urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/{path}", method="PUT")).close()

    def client(self) -> Any:
        """boto3's client: another library to look at the bucket with."""
        import boto3

        keys = {"aws_access_key_id": self.env["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": self.secret}
        return boto3.client("s3", endpoint_url=self.endpoint, region_name=self.env["AWS_REGION"], **keys)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """moto's S3 server in a process of its own, with one bucket."""
    script = Path(__file__).with_name("s3_server.py")
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        endpoint = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        secret = f"hidden-{secrets.token_hex(16)}"
        env = {
            "AWS_ACCESS_KEY_ID": f"key-{secrets.token_hex(8)}",
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "eu-central-1",
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        server = S3("s3://mim-ray-tests", endpoint, env, secret)
        where = {"LocationConstraint": env["AWS_REGION"]}
        server.client().create_bucket(Bucket="mim-ray-tests", CreateBucketConfiguration=where)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=10)


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3:
    """An empty place on the server, and this process' environment set for it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MIM_RAY_CACHE", str(tmp_path / "cache"))
    s3_server.requests()
    return replace(s3_server, uri=f"{s3_server.uri}/{secrets.token_hex(6)}")


@pytest.fixture(scope="session")
def ray_cluster(s3_server: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An embedded Ray with two CPUs and one pretended GPU, for all tests of the session. Its workers can reach `s3`."""
    from mim_ray.config.scenario import Run
    from mim_ray.runtime.cluster import cluster

    with contextlib.ExitStack() as stack:
        env = s3_server.env | {"MIM_RAY_CACHE": str(tmp_path_factory.mktemp("cache"))}
        with unittest.mock.patch.dict(os.environ, env):
            stack.enter_context(cluster(Run(num_cpus=2, num_gpus=1, object_store_mb=200)))
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
