"""The ranking app behind a real proxy that others can reach."""

from __future__ import annotations

import concurrent.futures
import socket
from collections.abc import Iterator

import pytest
import requests
from ray import serve
from ray.exceptions import RayActorError

from mim_ray.errors import ConfigError
from mim_ray.serving.keys import new_key
from mim_ray.serving.ranking_app import bind_ranking

pytestmark = pytest.mark.ray
KEY, LINE = new_key("shop", ["rank"])
BODY = {"user_id": "u1", "candidates": [f"i{row}" for row in range(40)]}


@pytest.fixture(scope="module")
def open_proxy(ray_cluster) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        start_serve(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


def start_serve(port: int, attempts: int = 5) -> None:
    """A proxy of a Serve that has just been shut down may still be ending, and takes the new one with it."""
    for left in reversed(range(attempts)):
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": "0.0.0.0", "port": port})
            return
        except RayActorError:
            serve.shutdown()
            if not left:
                raise


def test_a_proxy_that_others_can_reach_needs_keys_whatever_serving_host_says(open_proxy, shared_run):
    assert shared_run.scenario.serving.host == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"proxy listens on 0\.0\.0\.0.* no API keys"):
        bind_ranking(shared_run.scenario)


@pytest.fixture(scope="module")
def url(open_proxy, shared_run, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(LINE)
    changes = {"keys_file": str(path), "max_queued_requests": 1}
    serving = shared_run.scenario.serving.model_copy(update=changes)
    serve.run(bind_ranking(shared_run.scenario.model_copy(update={"serving": serving})))
    return open_proxy


def test_with_keys_it_starts_and_every_caller_needs_one(url):
    assert requests.post(f"{url}/v1/rank", json=BODY, timeout=20).status_code == 401
    assert requests.post(f"{url}/v1/rank", json=BODY, headers={"X-API-Key": KEY}, timeout=20).status_code == 200
    assert requests.get(f"{url}/metrics", headers={"X-API-Key": KEY}, timeout=20).status_code == 403
    assert requests.get(f"{url}/openapi.json", timeout=20).status_code == 401
    assert requests.get(f"{url}/healthz", timeout=20).status_code == 200


def test_a_full_queue_is_a_503_at_once_that_says_when_to_try_again(url):
    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {KEY}"
    slow = BODY | {"behaviors": ["i1"] * 10_000}  # takes long enough to parse

    def post(_: int) -> tuple[int, str | None]:
        answer = session.post(f"{url}/v1/rank", json=slow, timeout=60)
        return answer.status_code, answer.headers.get("Retry-After")

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        assert set(pool.map(post, range(120))) == {(200, None), (503, "1")}
    assert post(0) == (200, None), "a moment later there is a place again"
