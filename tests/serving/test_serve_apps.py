"""Both apps on a real Ray Serve, over real HTTP on this machine."""

from __future__ import annotations

import base64
import concurrent.futures
import time
from collections.abc import Iterator

import pytest
import ray
import requests
from deltalake import DeltaTable

from mim_ray.errors import ConfigError
from mim_ray.serving import local

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def url(ray_cluster, shared_run) -> Iterator[str]:
    serving = shared_run.scenario.serving.model_copy(update={"gpus_per_replica": 0.5})
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


def test_the_next_ranking_of_a_user_sees_a_posted_event(url):
    body = {"user_id": "clicker", "candidates": ["i1", "i2"]}
    assert requests.post(f"{url}/v1/rank", json=body, timeout=20).json()["num_behaviors"] == 0
    event = {"user_id": "clicker", "item_id": "i7", "event": "click"}
    answers = [
        requests.post(f"{url}/v1/events", json=event, headers={"Idempotency-Key": "click-1"}, timeout=20)
        for _ in range(2)
    ]
    assert answers[0].status_code == 200, answers[0].text
    assert answers[0].json() == answers[1].json()
    assert requests.post(f"{url}/v1/rank", json=body, timeout=20).json()["num_behaviors"] == 1


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


def test_the_fast_proxy_is_refused_without_keys(shared_run, monkeypatch):
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(ConfigError, match="listen on all interfaces, and there are no API keys"):
        local.start(shared_run.scenario)
