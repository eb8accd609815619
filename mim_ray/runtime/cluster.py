"""Joining the Ray cluster this process belongs to, or starting a small one of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.data import DataContext
from ray.exceptions import RayTaskError

from mim_ray import errors
from mim_ray.config.scenario import Run, Workers
from mim_ray.errors import ConfigError, MimRayError

_CONNECT_S = 5.0
SERVE_ENVIRONMENT = {
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "16777216",
}
"""Serve's controller starts another proxy when three checks in a row fail: a dead proxy is missed after 3 s instead of Ray's 30, and
a new one on a busy machine gets the time that it needs. On the fast path apps call each other by gRPC: pictures to search with
must fit. Read where Ray was started: `ray start` needs them in its environment."""


@contextlib.contextmanager
def cluster(run: Run) -> Iterator[None]:
    """Ray for the time of a block: the running one if there is one (RAY_ADDRESS, a submitted job), else an embedded one.

    An embedded Ray has no dashboard, listens on this machine only, and is shut down at the end.

    Raises:
        ConfigError: RAY_ADDRESS names a place where nothing answers, or Ray does not take this process in.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", "600")  # a lost rank ends in an error, not in waiting
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not spin: workers share the cores
    for name, value in SERVE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    joined = bool(os.environ.get("RAY_ADDRESS")) or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if joined:
        _check_answers(os.environ.get("RAY_ADDRESS", ""))
        if "RAY_AUTH_TOKEN" in os.environ or Path.home().joinpath(".ray/auth_token").is_file():
            # where there is a token, `ray start` asks for it; a Ray without authentication does not mind
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        try:
            ray.init(address="auto", logging_level=logging.ERROR)
        except ConnectionError as error:
            raise ConfigError(
                f"Ray does not take this process in ({error}). Where it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to "
                "that of its head; else look whether it runs."
            ) from None
    else:
        ray.init(
            address="local",
            num_cpus=run.num_cpus,
            num_gpus=run.num_gpus,
            object_store_memory=run.object_store_mb * 2**20,
            include_dashboard=False,
            logging_level=logging.ERROR,
        )
    _quiet()
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself tries for many minutes. Addresses other than host:port are Ray's to judge."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"No Ray answers at RAY_ADDRESS = {address} ({error}). Start one there (ray start --head), or unset RAY_ADDRESS: the "
            "job then starts one of its own."
        ) from None


def worker_threads(workers: Workers) -> int:
    """Torch threads of each worker: as configured, else this machine's cores shared evenly."""
    if workers.threads_per_worker is not None:
        return workers.threads_per_worker
    return max(1, (os.cpu_count() or 1) // workers.num_workers)


def user_error(error: BaseException) -> MimRayError | None:
    """The mim_ray error at the root of `error`, which Ray may have wrapped several times; None if there is none.

    Ray keeps only the outermost cause when an error travels, and of an actor's constructor only the text of the
    traceback; the sentence is then taken from there.
    """
    seen: list[BaseException] = []
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop(0)
        if current is None or any(current is other for other in seen):
            continue
        seen.append(current)
        if isinstance(current, MimRayError) and not isinstance(current, RayTaskError):
            return current
        queue += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        queue += list(getattr(current, "worker_failures", {}).values())
    for current in seen:
        found = re.findall(r"^mim_ray\.errors\.(\w+): (.+)$", str(current), flags=re.MULTILINE)
        if found and isinstance(kind := getattr(errors, found[-1][0], None), type):
            return kind(found[-1][1])
    return None


def quiet_data() -> None:
    """No bars, plans or notes of Ray Data in this process: our own Progress shows rate and remaining time."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _quiet() -> None:
    logging.getLogger("ray").setLevel(logging.WARNING)  # its start, at ERROR, tells what is no news
    for name in ("ray.train", "ray.tune", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    quiet_data()
