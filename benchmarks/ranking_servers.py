"""The servers of benchmarks/ranking.py as processes: bare uvicorn and Ray Serve, with the same app, keys and tables.

    python benchmarks/ranking_servers.py uvicorn FOLDER VARIANT SOCKET
    python benchmarks/ranking_servers.py serve FOLDER VARIANT PROCESSES PORT

They load their libraries, and Ray, at once, open FOLDER when a line comes, and end when their input does. `Server` is the
other end: it starts them, and ends them and all they have started.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mim_ray.config import Scenario

START_S = 600.0
END_S = 40.0
THREADS = 1  # of torch, in each process
PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": "120"}
EQUAL = {"RAY_worker_niceness": "0"}  # Ray's is 15, uvicorn's is 0
PATH = "/v1/rank"


class NotStartedError(Exception):
    """A server did not come up; holds the end of what it wrote."""


class Server:
    """
    with Server.uvicorn(folder, "din-mim", processes=1) as server:
        make_run(folder, shop)
        server.open()
        server.wait()
        ask(server.url)
    """

    def __init__(self, name: str, port: int, children: Sequence[subprocess.Popen[bytes]], log: Path) -> None:
        self.name, self.url = name, f"http://127.0.0.1:{port}{PATH}"
        self._port, self._children, self._log = port, children, log

    @classmethod
    def uvicorn(cls, folder: Path, variant: str, processes: int) -> Server:
        """`processes` of bare uvicorn that share one port."""
        name = f"uvicorn-{variant}"
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen(1_024)
            number = listening.fileno()
            command = ["uvicorn", str(folder), variant, str(number)]
            log = folder / f"{name}.log"
            children = [_start(command, log, {}, (number,)) for _ in range(processes)]
            return cls(name, listening.getsockname()[1], children, log)

    @classmethod
    def serve(cls, folder: Path, variant: str, processes: int, *, fast: bool) -> Server:
        """Ray Serve with `processes` replicas, behind HAProxy (`fast`) or its own proxy."""
        name = "serve-fast" if fast else "serve-default"
        (port,) = free_ports(1)
        log = folder / f"{name}.log"
        command = ["serve", str(folder), variant, str(processes), str(port)]
        return cls(name, port, [_start(command, log, PATIENCE | EQUAL | (fast_path() if fast else {}))], log)

    def open(self) -> None:
        """Let it open the run, which is there now."""
        for child in self._children:
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended: `wait` says so
                child.stdin.write(b"\n")
                child.stdin.flush()

    def wait(self) -> None:
        """Until it is ready in all its processes.

        Raises:
            NotStartedError: one of them has ended, or takes too long.
        """
        end = time.monotonic() + START_S
        for child in self._children:
            assert child.stdout is not None
            os.set_blocking(child.stdout.fileno(), False)
            while b"ready" not in (child.stdout.read() or b""):
                if child.poll() is not None or time.monotonic() > end:
                    lines = self._log.read_text(errors="replace").strip().splitlines()[-8:]
                    raise NotStartedError(f"{self.name} did not start: " + " | ".join(lines))
                time.sleep(0.05)

    def stop(self) -> None:
        """End its processes, and theirs, by their ids."""
        import psutil

        started = [family for child in self._children for family in _family(child.pid)]
        for child in self._children:
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
        for child in self._children:
            try:
                child.wait(END_S)
            except subprocess.TimeoutExpired:
                started += _family(child.pid)
                child.kill()
                child.wait()
        for process in started:
            try:
                process.kill()  # psutil looks whether the id is still this process's
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(started, timeout=10)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def scenario_of(folder: Path, variant: str = "din-mim") -> Scenario:
    """The scenario that finds the run in `folder`: `tiny`, with the paper's width, and API keys."""
    from mim_ray.config import load_scenario

    sizes = json.loads((folder / "shop.json").read_text())
    return load_scenario(
        "tiny",
        [
            f"run.root={folder}/run",
            f"encoders.width={sizes['width']}",
            f"ciubm.max_behaviors={max(sizes['lengths'])}",
            f"serving.variant={variant}",
            "serving.similar_items=false",
            f"serving.keys_file={folder}/keys",
        ],
    )


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def fast_path() -> dict[str, str]:
    """The environment of Serve's fast path; its ports apart from those of another Serve on the machine."""
    metrics, stats = free_ports(2)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
    }


def _start(
    command: Sequence[str], log: Path, environment: dict[str, str], files: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, __file__, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            pass_fds=tuple(files),
            env=os.environ | {"OMP_NUM_THREADS": str(THREADS), "RAY_USAGE_STATS_ENABLED": "0"} | environment,
        )


def _family(pid: int) -> list:
    import psutil

    try:
        process = psutil.Process(pid)
        return [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []


def _uvicorn(folder: Path, variant: str, number: int) -> None:
    """The app of a replica, without Ray: the same service, guard, metrics and keys."""
    import torch
    import uvicorn

    from mim_ray.runtime.memory import keep_freed_memory
    from mim_ray.serving.ranker import RankingService
    from mim_ray.serving.ranking_app import ranking_api
    from mim_ray.serving.served import Served
    from mim_ray.serving.traffic import Traffic

    torch.set_num_threads(THREADS)
    keep_freed_memory()
    sys.stdin.readline()
    scenario = scenario_of(folder, variant)
    serving, served = scenario.serving, Served.of(scenario)
    service = RankingService.open(served, serving, scenario.machines, scenario)
    api = ranking_api(service, serving, Traffic.open(serving, served, {}, lambda other: service))
    server = uvicorn.Server(uvicorn.Config(api, access_log=False, log_level="warning", lifespan="off"))

    def end_with_input() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=end_with_input, daemon=True).start()
    gc.collect()
    gc.freeze()  # as Serve does in its replicas; else a collection of what is loaded stops all requests for 0.2 s
    print("ready", flush=True)
    server.run(sockets=[socket.socket(fileno=number)])


def _serve(folder: Path, variant: str, processes: int, port: int) -> None:
    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig

    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    _start_ray(processes + 1)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    try:
        options = {"host": "127.0.0.1", "port": port, "request_timeout_s": 30.0}
        serve.start(proxy_location="HeadOnly", http_options=options, logging_config=quiet)
        from mim_ray.serving.ranking_app import bind_ranking

        sys.stdin.readline()
        scenario = scenario_of(folder, variant)
        changes = {"num_replicas": processes, "cpus_per_replica": float(THREADS)}
        scenario = scenario.model_copy(update={"serving": scenario.serving.model_copy(update=changes)})
        serve.run(bind_ranking(scenario), name="ranking", logging_config=quiet)
        print("ready", flush=True)
        sys.stdin.read()
    finally:
        ray.shutdown()  # with all of Serve; serve.shutdown waits for half a minute on the fast path


def _start_ray(num_cpus: int) -> None:
    """Ray gives its node half a minute to start, which is not enough where the machine is busy: then once more, and again."""
    import ray

    for left in (2, 1, 0):
        try:
            ray.init(
                "local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=200_000_000,
            )
            return
        except Exception:  # what Ray raises then is nothing more special
            ray.shutdown()
            if not left:
                raise


if __name__ == "__main__":
    kind, where, *rest = sys.argv[1:]
    if kind == "uvicorn":
        _uvicorn(Path(where), rest[0], int(rest[1]))
    else:
        _serve(Path(where), rest[0], int(rest[1]), int(rest[2]))
