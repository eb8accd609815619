"""Both apps on a real Ray Serve, over real HTTP on this machine."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import requests
from deltalake import DeltaTable
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from starlette.testclient import TestClient

from mim_ray.config.scenario import Serving
from mim_ray.errors import ConfigError, RequestError
from mim_ray.pipeline.layout import Layout
from mim_ray.pipeline.serve_run import TOP_K, requests_to_try
from mim_ray.serving import local
from mim_ray.serving.client import Client
from mim_ray.serving.exposures import exposure_log
from mim_ray.serving.limits import guarded
from mim_ray.serving.metrics import Metrics, counted
from mim_ray.serving.metrics_hub import Reporter, add_metrics_routes
from mim_ray.serving.ranking_app import RankingReplica
from mim_ray.serving.served import Served

from .conftest import add_impressions

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def url(ray_cluster, shared_run) -> Iterator[str]:
    serving = shared_run.scenario.serving.model_copy(update={"gpus_per_replica": 0.5, "log_exposures": True})
    yield local.start(shared_run.scenario.model_copy(update={"serving": serving}))
    local.stop()


def rank(url: str, *candidates: str) -> dict:
    answer = requests.post(f"{url}/v1/rank", json={"user_id": "u1", "candidates": candidates}, timeout=20)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_never_seen_item_is_posted_and_then_ranked_with_its_content(url, picture):
    assert rank(url, "i1", "new-mug")["items"][-1]["item_id"] in ("i1", "new-mug")
    assert {item["item_id"]: item["no_content"] for item in rank(url, "i1", "new-mug")["items"]}["new-mug"]
    body = {"item_id": "new-mug", "title": "striped mug", "image": base64.b64encode(picture(7)).decode()}
    posted = requests.post(f"{url}/v1/items", json=body | {"category": "mugs"}, timeout=20)
    assert posted.status_code == 200, posted.text
    assert posted.json()["items"][0]["rankable"]
    start = time.monotonic()
    while rank(url, "new-mug")["items"][0]["no_content"]:
        assert time.monotonic() - start < 5, "the ranker does not see the item"
        time.sleep(0.02)
    assert rank(url, "new-mug")["encoder_version"] == posted.json()["items"][0]["encoder_version"]


def test_a_new_item_is_found_by_its_picture_and_beside_similar_items(url, picture):
    image = base64.b64encode(picture(11)).decode()
    body = {"item_id": "new-sock", "title": "striped sock", "image": image, "category": "socks"}
    assert requests.post(f"{url}/v1/items", json=body, timeout=20).status_code == 200
    deadline = time.monotonic() + 15
    while (answer := requests.get(f"{url}/v1/similar/new-sock?top_k=3", timeout=20)).status_code != 200:
        assert answer.status_code in (404, 503), answer.text
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.1)
    assert len(answer.json()["items"]) == 3
    search = {"image": image, "title": "striped sock", "top_k": 1}
    answer = requests.post(f"{url}/v1/search/image", json=search, timeout=20)
    assert answer.status_code == 200, answer.text
    (found,) = answer.json()["items"]
    assert (found["item_id"], found["category"]) == ("new-sock", "socks")
    assert found["similarity"] == pytest.approx(1, abs=1e-3)
    bad = requests.post(f"{url}/v1/search/image", json={"image": "aGVsbG8="}, timeout=20)
    assert (bad.status_code, "Send a JPEG" in bad.json()["error"]) == (422, True), "the encoder's own sentence"


def test_new_items_are_folded_into_the_delta_table_once(url, shared_run):
    body = {"items": [{"item_id": f"folded-{row}", "title": f"thing {row}"} for row in range(3)]}
    assert requests.post(f"{url}/v1/items", json=body, timeout=20).status_code == 200
    deadline = time.monotonic() + 15
    while True:
        rows = DeltaTable(f"{shared_run.root}/center/table").to_pyarrow_table(columns=["item_id", "origin"]).to_pylist()
        folded = [row["origin"] for row in rows if row["item_id"].startswith("folded-")]
        if folded:
            break
        assert time.monotonic() < deadline, "the window is not folded"
        time.sleep(0.2)
    time.sleep(1.5)  # more rounds of the folder
    rows = DeltaTable(f"{shared_run.root}/center/table").to_pyarrow_table(columns=["item_id", "origin"]).to_pylist()
    assert [row["origin"] for row in rows if row["item_id"].startswith("folded-")] == ["realtime"] * 3
    assert all(not item["no_content"] for item in rank(url, "folded-0", "folded-1", "folded-2")["items"])


def test_the_client_posts_events_that_the_users_next_ranking_sees_and_what_was_shown_is_logged(url, shared_run):
    client = Client(url, deadline_s=20)
    first = client.rank("clicker", ["i1", "i2", "i3"], top_k=2)
    assert first["num_behaviors"] == 0
    click = {"user_id": "clicker", "item_id": "i7", "event": "click", "request_id": first["request_id"]}
    answers = [client.events([click], idempotency_key="click-1") for _ in range(2)]
    assert answers[0] == answers[1]
    assert client.rank("clicker", ["i1"])["num_behaviors"] == 1
    assert client.items([{"item_id": "by-client", "title": "striped mug"}])["items"][0]["rankable"]
    with pytest.raises(RequestError, match="candidates: List should have at least 1 item"):
        client.rank("clicker", [])
    deadline = time.monotonic() + 20
    while True:
        rows = exposure_log(f"{shared_run.root}/center").read().to_pylist()
        shown = [row["item_id"] for row in rows if row["request_id"] == first["request_id"]]
        if shown:
            break
        assert time.monotonic() < deadline, "exposures are not stored"
        time.sleep(0.2)
    assert shown == [item["item_id"] for item in first["items"]]
    assert "mim_ray_exposures_dropped" in requests.get(f"{url}/metrics", timeout=20).text


def test_the_encoder_replica_gets_the_share_of_a_gpu_that_it_asks_for(url):
    assert ray.cluster_resources()["GPU"] == 1, "the session's Ray pretends to have one"
    assert ray.available_resources()["GPU"] == 0.5


def test_bad_requests_get_a_sentence_over_http(url):
    for path, body in (("/v1/rank", {"user_id": "u"}), ("/v1/items", {"item_id": "x", "image": "aGVsbG8="})):
        answer = requests.post(url + path, json=body, timeout=20)
        assert answer.status_code == 422, answer.text
        assert set(answer.json()) == {"error"}
        assert "Traceback" not in answer.text
    assert requests.post(f"{url}/v1/rank", data=b"x" * 13_000_000, timeout=20).status_code == 413
    assert requests.post(f"{url}/v1/rank", data=b"{", timeout=20).status_code == 422


def test_health_readiness_and_pages_answer_under_both_prefixes(url):
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
        assert requests.get(url + path, timeout=20).status_code == 200, path
    for path in ("/v1/items/healthz", "/v1/items/readyz", "/v1/items/docs", "/v1/items/openapi.json"):
        assert requests.get(url + path, timeout=20).status_code == 200, path


def test_parallel_requests_agree_with_one_alone(url):
    candidates = [f"i{row}" for row in range(40)]
    alone = rank(url, *candidates)["items"]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: rank(url, *candidates), range(40)))
    assert all(answer["items"] == alone for answer in answers)
    assert len({answer["request_id"] for answer in answers}) == 40


def counters(url: str) -> dict[tuple, float]:
    answer = requests.get(url, timeout=20)
    assert answer.status_code == 200, answer.text
    return {
        (sample.name, sample.labels.get("app"), sample.labels.get("route"), sample.labels.get("status")): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def until(done, url: str) -> dict[tuple, float]:
    """Processes report each second."""
    deadline = time.monotonic() + 30
    while not done(found := counters(url)):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


def test_either_apps_metrics_tell_of_both(url):
    ranked = ("mim_ray_requests_total", "ranking", "/v1/rank", "2xx")
    refused = ("mim_ray_requests_total", "new_item_encoder", "/v1/items", "4xx")
    before = counters(f"{url}/metrics")
    for _ in range(3):
        rank(url, "i1", "i2")
        assert requests.post(f"{url}/v1/items", json={"item_id": "x"}, timeout=20).status_code == 422
    for path in ("/metrics", "/v1/items/metrics"):
        until(lambda found: found.get(refused, 0) >= before.get(refused, 0) + 3, url + path)
        found = until(lambda found: found.get(ranked, 0) >= before.get(ranked, 0) + 3, url + path)
        assert found["mim_ray_freshness_seconds", "ranking", None, None] < 60
        text = requests.get(url + path, timeout=20).text
        infra = Path(__file__).parents[2] / "infra"
        used = {
            name
            for file in ("grafana-dashboard.json", "prometheus-rules.yaml")
            for name in re.findall(r"\bmim_ray_\w+", (infra / file).read_text())
        }
        assert {name for name in used if name not in text} == set(), "dashboard and rules use what is there"


class Counting:
    """Two replicas that count, and can be killed; no model."""

    def __serve_build_asgi_app__(self):
        app, metrics = FastAPI(), Metrics("counting")
        self._reporter = Reporter(metrics)

        @app.get("/counting/pid")
        def pid() -> int:
            return os.getpid()

        add_metrics_routes(app, metrics, path="/counting/metrics")
        return counted(guarded(app, Serving()), app, metrics)


@pytest.fixture
def counting(url) -> Iterator[str]:
    replicas = serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 0})(serve.ingress()(Counting))
    serve.run(replicas.bind(), name="counting", route_prefix="/counting")
    yield f"{url}/counting"
    serve.delete("counting")


COUNTED = ("mim_ray_requests_total", "counting", "/counting/pid", "2xx")


@pytest.mark.chaos  # two more Serve workers
def test_counters_of_two_replicas_are_summed(counting, url):
    pids = [requests.get(f"{counting}/pid", timeout=20).json() for _ in range(40)]
    assert len(set(pids)) == 2
    for path in (f"{counting}/metrics", f"{url}/metrics"):
        assert until(lambda found: found.get(COUNTED, 0) % 40 == 0, path)[COUNTED] == 40


@pytest.mark.chaos
def test_what_a_killed_replica_had_counted_stays_in_the_sum(counting, url):
    before = until(lambda found: True, f"{url}/metrics").get(COUNTED, 0)
    pids = [requests.get(f"{counting}/pid", timeout=20).json() for _ in range(40)]
    until(lambda found: found.get(COUNTED, 0) >= before + 40, f"{url}/metrics")
    os.kill(pids[0], signal.SIGKILL)
    served = []
    for _ in range(200):
        answer = requests.get(f"{counting}/pid", timeout=20)
        served += [answer.json()] if answer.status_code == 200 else []
        if len(served) == 20:
            break
    assert len(served) == 20
    assert pids[0] not in served, "it was killed"
    found = until(lambda found: found.get(COUNTED, 0) >= before + 60, f"{url}/metrics")
    assert found[COUNTED] == before + 60


def test_the_printed_requests_work_when_pasted(url, shared_run, tmp_path):
    add_impressions(shared_run.root)
    layout = Layout.of(shared_run.scenario)
    answers = []
    for request in requests_to_try(shared_run.scenario, layout, url, tmp_path):
        done = subprocess.run(["bash", "-c", request.line], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        answers.append(json.loads(done.stdout))
        if "error" in answers[-1]:  # the item is found within a second
            time.sleep(1)
            answers[-1] = json.loads(
                subprocess.run(["bash", "-c", request.line], capture_output=True, timeout=60).stdout
            )
    posted, ranked, similar = answers
    (item,) = posted["items"]
    assert item["rankable"]
    assert len(ranked["items"]) == TOP_K
    assert ranked["num_behaviors"] == 5, "the behavior store knows the user"
    assert "items" in similar, similar
    assert len(similar["items"]) == TOP_K
    assert similar["encoder_version"] == item["encoder_version"] == ranked["encoder_version"]
    assert len(json.loads((tmp_path / "new_item.json").read_text())["image"]) > 100, "a real picture"


def test_the_fast_proxy_is_refused_without_keys(shared_run, monkeypatch):
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(ConfigError, match="listen on all interfaces, and there are no API keys"):
        local.start(shared_run.scenario)


@pytest.mark.filterwarnings("ignore:coroutine .*__del__")  # Python calls it again, without awaiting it
def test_a_replica_that_serve_stops_stores_what_it_has_shown_and_counted(url, shared_run, monkeypatch):
    """Serve calls the replica's __del__ after its last request, and then kills the process."""
    monkeypatch.setattr("mim_ray.serving.exposures.EVERY_S", 3_600.0)
    monkeypatch.setattr("mim_ray.serving.metrics_hub.REPORT_EVERY_S", 3_600.0)
    kind = serve.ingress()(RankingReplica)
    serving = shared_run.scenario.serving.model_copy(update={"log_exposures": True, "similar_items": False})

    async def one_life() -> dict:
        replica = kind.__new__(kind)
        await replica.__init__(Served.of_run(shared_run.scenario), serving)
        answer = TestClient(replica.__serve_build_asgi_app__()).post(
            "/v1/rank", json={"user_id": "u1", "candidates": ["i1", "i2"]}
        )
        await replica.__del__()
        replica._service.embeddings.stop()
        replica._service.behaviors.stop()
        return answer.json()

    before = counted_requests(url)
    shown = asyncio.run(one_life())
    rows = exposure_log(f"{shared_run.root}/center").read().to_pylist()
    logged = [row["item_id"] for row in rows if row["request_id"] == shown["request_id"]]
    assert logged == [item["item_id"] for item in shown["items"]]
    assert counted_requests(url) >= before + 1


def counted_requests(url: str) -> float:
    found = text_string_to_metric_families(requests.get(f"{url}/metrics", timeout=20).text)
    return sum(
        sample.value
        for family in found
        for sample in family.samples
        if sample.name == "mim_ray_requests_total" and sample.labels["route"] == "/v1/rank"
    )
