"""Both apps for a finished run on this machine, until Ctrl-C, and requests that somebody can paste to meet them."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mim_ray import artifacts
from mim_ray.config import Scenario
from mim_ray.errors import ArtifactError, ConfigError
from mim_ray.pipeline.layout import Layout
from mim_ray.pipeline.live_check import a_user, as_message, unseen_item
from mim_ray.runtime.cluster import cluster
from mim_ray.serving import local
from mim_ray.serving.keys import KeyRing
from mim_ray.serving.served import Served

NUM_CANDIDATES, TOP_K = 8, 5
KEY_VARIABLE = "MIM_RAY_KEY"  # of whoever pastes the lines: the apps know hashes only


@dataclass(frozen=True)
class Request:
    """A line for the shell, and what it does."""

    says: str
    line: str


def serve_run(scenario: Scenario) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ArtifactError: the run is not finished.
        ConfigError: the port is taken, or strangers could call.
    """
    layout = Layout.of(scenario)
    _check_finished(scenario, layout)
    _check_port(scenario.serving.host, scenario.serving.port)
    print(f"Starting both apps for {layout.root} …", flush=True)
    with tempfile.TemporaryDirectory(prefix="mim_ray-") as folder, cluster(scenario.run):
        try:
            base = local.start(scenario)
            requests = requests_to_try(scenario, layout, base, Path(folder))
            print(f"They listen on {base}. Try in another terminal:\n")
            if KeyRing.of(scenario.serving) is not None:
                print(f"# Keys are set. Name one with the scopes rank and write:\nread -rs {KEY_VARIABLE}\n")
            for request in requests:
                print(f"# {request.says}\n{request.line}\n")
            print(
                f"All requests: {base}/docs and {base}/v1/items/docs. Metrics: {base}/metrics. Ctrl-C stops.",
                flush=True,
            )
            with _stop_signal() as stop:
                stop.wait()
            print("\nStopping …", flush=True)
        finally:
            local.stop()
    print("Stopped.")


def requests_to_try(scenario: Scenario, layout: Layout, base: str, folder: Path) -> list[Request]:
    """Post an item that nobody has seen, rank it for a user, and ask what is similar to it.

    Args:
        base: URL of the apps. folder: where the item's content goes; it must stay while the lines are used.
    """
    curl = "curl -sS"
    if KeyRing.of(scenario.serving) is not None:
        curl += f' -H "Authorization: Bearer ${KEY_VARIABLE}"'
    post = f"{curl} -H 'Content-Type: application/json'"
    item = unseen_item(scenario, layout)
    content = folder / "new_item.json"
    content.write_text(json.dumps(as_message(item)))
    user, _, candidates = a_user(scenario, layout)
    others = candidates[:NUM_CANDIDATES]
    ranking = {"user_id": user, "candidates": [*others, item.item_id], "top_k": TOP_K}
    called = f" ({item.title})" if item.title else ""
    return [
        Request(
            f"Post an item that nobody has seen{called}: it is encoded and stored.",
            f"{post} {base}/v1/items -d {shlex.quote(f'@{content}')}",
        ),
        Request(
            f"Rank it for a user, among {len(others)} others.",
            f"{post} {base}/v1/rank -d {shlex.quote(json.dumps(ranking))}",
        ),
        Request(
            "The items that look and are called like it.",
            f"{curl} {shlex.quote(f'{base}/v1/similar/{item.item_id}?top_k={TOP_K}')}",
        ),
    ]


def _check_finished(scenario: Scenario, layout: Layout) -> None:
    try:
        served = Served.of(scenario)
    except ArtifactError as error:
        raise ArtifactError(f"{layout.root} holds nothing to serve yet. Run make demo first. ({error})") from None
    if not artifacts.exists(f"{served.ctr}/ctr.json"):
        raise ArtifactError(f"{served.ctr} holds no finished CTR model. Run make demo first, to its end.")


def _check_port(host: str, port: int) -> None:
    """
    Raises:
        ConfigError: somebody else listens there.
    """
    if port == 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was just given up is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"serving.port = {port} on {host} cannot be used ({error.strerror}). Stop what listens there, or take "
                "another one: make serve PORT=8001 (serving.port=8001)."
            ) from None


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """Set by SIGINT and SIGTERM, which end nothing else meanwhile."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
