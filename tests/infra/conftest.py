"""A real head node, started with `ray start` as a user would, on ports and in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """A running head node.

    Attributes:
        folder: Ray's own folder; with what was uploaded below it.
        checkout: a copy of the repository beside an environment, runs and a .git folder of 30 MB each.
    """

    address: str
    dashboard: str
    folder: Path
    checkout: Path
    env: dict[str, str]

    def run(self, *command: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command line in the checkout, as someone with the environment activated."""
        return subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            cwd=self.checkout,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    @staticmethod
    def free_port() -> int:
        return _free_ports(1)[0]

    def submit(self, *entrypoint: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . -- ENTRYPOINT`"""
        address = ("--address", self.dashboard)
        return self.run("ray", "job", "submit", *address, "--working-dir", ".", "--", *entrypoint, timeout=timeout)


@pytest.fixture(scope="package")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """`ray start --head` with token authentication, everything on loopback; stopped by its process group at the end."""
    folder = Path(tempfile.mkdtemp(prefix="mr-"))  # short: Ray's sockets live below it
    checkout = _checkout(tmp_path_factory.mktemp("checkout") / "mim_ray")
    gcs, dashboard, client, agent = _free_ports(4)
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HOME": str(folder / "home"),
        "COLUMNS": "200",
    }
    (folder / "home").mkdir()
    log = (folder / "start.log").open("wb")
    process = subprocess.Popen(
        [
            *(str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
            *("--node-ip-address", "127.0.0.1", "--port", str(gcs), "--ray-client-server-port", str(client)),
            *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)),
            *("--dashboard-agent-listen-port", str(agent), "--temp-dir", str(folder / "ray")),
            *("--num-cpus", "3", "--object-store-memory", str(200 * 2**20)),
        ],
        cwd=checkout,
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    head = Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", folder, checkout, env)
    try:
        _wait_for_jobs_api(head, process)
        yield head
    finally:
        _stop(process)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _checkout(folder: Path) -> Path:
    """What a user's folder looks like after `make demo`: the code, and large folders that no cluster needs."""
    ignored = shutil.ignore_patterns(".git", ".venv", ".uv", "runs", "dist", "build", "*_cache", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ignored)
    for large in (".venv/lib/large.so", ".uv/lib/large.so", "runs/demo/large.parquet", ".git/objects/large.pack"):
        (folder / large).parent.mkdir(parents=True, exist_ok=True)
        (folder / large).write_bytes(secrets.token_bytes(30 * 2**20))
    return folder


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for entry in sockets:
            entry.bind(("127.0.0.1", 0))
        return [entry.getsockname()[1] for entry in sockets]


def _wait_for_jobs_api(head: Head, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, (head.folder / "start.log").read_text()
        answer = head.run("ray", "job", "list", "--address", head.dashboard, timeout=60)
        if answer.returncode == 0:
            return
        time.sleep(1)
    raise AssertionError(f"no jobs API: {answer.stdout[-2000:]}\n{(head.folder / 'start.log').read_text()[-2000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)  # `ray start --block` stops what it has started
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
