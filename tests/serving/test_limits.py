import asyncio
import errno
import json
import socket
import struct
import threading

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from mim_ray.config.scenario import Serving
from mim_ray.errors import ArtifactError, RequestError
from mim_ray.serving.guard import is_loopback
from mim_ray.serving.limits import guarded, max_queued_rankings
from mim_ray.serving.messages import NewItemsRequest, RankRequest


@pytest.fixture
def client():
    app = FastAPI()

    @app.post("/rank")
    def rank(request: RankRequest) -> dict[str, int]:
        return {"num_candidates": len(request.candidates)}

    @app.post("/items")
    def items(request: NewItemsRequest) -> dict[str, list[str]]:
        return {"ids": [item.item_id for item in request.items]}

    @app.get("/fails/{kind}")
    def fails(kind: str) -> None:
        raise {
            "request": RequestError("no such thing; ask for another", 404),
            "ours": ArtifactError("secret path"),
            "disk": OSError(errno.ENOSPC, "secret", "/secret/path"),
            "gone file": FileNotFoundError(errno.ENOENT, "secret", "/secret/path"),
            "reset": ConnectionResetError("secret"),
            "late": TimeoutError("secret"),
        }.get(kind, RuntimeError("secret"))

    return TestClient(guarded(app, Serving(max_body_bytes=20_000)), raise_server_exceptions=False)


def rank_body(**changes) -> bytes:
    return json.dumps({"user_id": "u1", "candidates": ["i1"], **changes}).encode()


def test_a_good_request_passes(client):
    assert client.post("/rank", json=json.loads(rank_body())).json() == {"num_candidates": 1}
    assert client.post("/items", json={"item_id": "a", "title": "t"}).json() == {"ids": ["a"]}
    assert client.post("/items", json={"items": [{"item_id": "a"}, {"item_id": "b"}]}).json() == {"ids": ["a", "b"]}


BAD_RANK_BODIES = {
    "no body": (b"", "Content-Type: application/json"),
    "not JSON": (b"{user_id: 1}", "no valid JSON"),
    "cut JSON": (rank_body()[:-3], "no valid JSON"),
    "a list": (b"[]", "must be a JSON object"),
    "no user": (b'{"candidates": ["i"]}', "user_id is missing"),
    "no candidates": (rank_body(candidates=[]), "candidates"),
    "candidates null": (rank_body(candidates=None), "candidates"),
    "candidates a string": (rank_body(candidates="i1"), "candidates"),
    "id a number": (rank_body(candidates=[17]), "candidates[0]"),
    "id empty": (rank_body(candidates=["i", ""]), "candidates[1]"),
    "id blank": (rank_body(user_id="  "), "must not be blank"),
    "id long": (rank_body(user_id="u" * 1000), "user_id"),
    "id with NUL": (rank_body(user_id="a\0b"), "NUL"),
    "half a character": (b'{"user_id": "\\ud800", "candidates": ["i"]}', "half of a character"),
    "wrong UTF-8": (b'{"user_id": "\xff\xfe", "candidates": ["i"]}', "body"),
    "unknown key": (rank_body(behaviours=["i"]), "behaviours is no known key"),
    "unknown key with half a character": (
        b'{"user_id": "u", "candidates": ["i"], "\\ud800": 1}',
        "half of a character",
    ),
    "top_k 0": (rank_body(top_k=0), "top_k"),
    "top_k a float": (rank_body(top_k=1.5), "top_k"),
    "top_k NaN": (b'{"user_id": "u", "candidates": ["i"], "top_k": NaN}', "NaN"),
    "top_k huge": (b'{"user_id": "u", "candidates": ["i"], "top_k": 1' + b"0" * 5_000 + b"}", ""),
    "deep JSON": (b"[" * 9_000 + b"]" * 9_000, ""),
    "deep JSON in a field": (b'{"user_id": ' + b'{"a":' * 3_000 + b"1" + b"}" * 3_001, ""),
}


@pytest.mark.parametrize("name", BAD_RANK_BODIES)
def test_a_bad_rank_request_gets_a_4xx_with_a_sentence(client, name):
    body, words = BAD_RANK_BODIES[name]
    answer = client.post("/rank", content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text
    assert set(answer.json()) == {"error"}
    assert words in answer.json()["error"]
    assert "Traceback" not in answer.text
    assert len(answer.text) < 2_000


@pytest.mark.parametrize("image", ["nö base64", "a", "%%%", 17, ["a"], {"url": "file:///etc/passwd"}])
def test_an_image_that_is_no_base64_text_gets_a_4xx(client, image):
    answer = client.post("/items", json={"item_id": "a", "image": image})
    assert answer.status_code == 422
    assert "image" in answer.json()["error"]


def test_a_data_url_and_line_breaks_are_understood():
    request = NewItemsRequest.model_validate({"item_id": "a", "image": "data:image/png;base64,aGVs\nbG8="})
    assert request.items[0].image == b"hello"


def test_a_time_without_a_zone_is_refused(client):
    answer = client.post("/items", json={"item_id": "a", "title": "t", "content_at": "2026-01-01T00:00:00"})
    assert answer.status_code == 422
    assert "content_at" in answer.json()["error"]


def test_a_large_body_is_refused_before_it_is_parsed(client):
    answer = client.post("/rank", content=b"x" * 30_000)
    assert answer.status_code == 413
    assert "20,000" in answer.json()["error"]


def test_a_large_body_without_a_length_is_refused_as_it_comes_in(client):
    def endless():
        for _ in range(10_000):
            yield b"x" * 1_000

    assert client.post("/rank", content=endless()).status_code == 413


def test_a_chunked_body_within_the_limit_passes(client):
    body = rank_body(candidates=["i1", "i2"])
    answer = client.post(
        "/rank", content=(body[i : i + 7] for i in range(0, len(body), 7)), headers={"content-type": "application/json"}
    )
    assert answer.json() == {"num_candidates": 2}


def test_failures_of_ours_tell_no_secrets(client):
    assert client.get("/fails/request").status_code == 404
    assert client.get("/fails/request").json() == {"error": "no such thing; ask for another"}
    for kind, status in (
        ("ours", 503),
        ("disk", 503),
        ("gone file", 503),
        ("reset", 503),
        ("late", 503),
        ("other", 500),
    ):
        answer = client.get(f"/fails/{kind}")
        assert answer.status_code == status
        assert answer.headers.get("retry-after") == ("1" if status == 503 else None)
        assert "secret" not in answer.text
        assert set(answer.json()) == {"error"}


def test_a_problem_of_the_machine_is_logged_by_its_kind_and_place_without_what_it_names(client, caplog):
    assert client.get("/fails/disk").status_code == 503
    (told,) = caplog.messages
    assert "a request met OSError (ENOSPC)" in told
    assert "in fails" in told
    assert "secret" not in told


@pytest.mark.parametrize("how", [BrokenPipeError, ConnectionResetError, OSError])
def test_a_caller_who_goes_away_is_no_problem_of_ours(client, caplog, how):
    """ASGI 2.4: `send` raises OSError then."""

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    sent = []

    async def send(message):
        sent.append(message)
        raise how("the caller is gone")

    scope = {"type": "http", "method": "GET", "path": "/nowhere", "query_string": b"", "headers": []}
    for path in ("/nowhere", "/fails/request", "/fails/disk"):
        caplog.clear()
        sent.clear()
        asyncio.run(client.app({**scope, "path": path}, receive, send))
        assert len(sent) == 1, "nobody is there to be told more"
        assert [told for told in caplog.messages if "ENOSPC" not in told] == []


def test_over_uvicorn_a_caller_who_hangs_up_is_not_in_the_log(caplog):
    app, entered, gone, left = FastAPI(), threading.Event(), threading.Event(), threading.Event()

    @app.get("/slow")
    def slow() -> str:
        entered.set()
        gone.wait(30)
        return "x" * 5_000_000  # more than the kernel's buffers hold

    api = guarded(app, Serving())

    async def watched(scope, receive, send) -> None:
        await api(scope, receive, send)
        if scope["type"] == "http":
            left.set()

    server = uvicorn.Server(uvicorn.Config(watched, port=0, log_config=None, lifespan="off"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        with socket.create_connection(listening.getsockname()) as caller:
            caller.sendall(b"GET /slow HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert entered.wait(30)
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
        gone.set()
        assert left.wait(30)
    finally:
        server.should_exit = True
        thread.join()
    assert [told for told in caplog.messages if "request met" in told] == []


def test_unknown_paths_and_methods_are_answered_in_the_same_form(client):
    assert client.get("/nowhere").status_code == 404
    assert client.get("/rank").status_code == 405
    assert "error" in client.get("/rank").json()


def test_loopback_is_recognised():
    assert all(is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "127.8.0.1"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""))


def test_few_rankings_wait_on_the_fast_path_so_that_an_overload_does_not_make_the_accepted_slow(monkeypatch):
    assert max_queued_rankings(Serving()) == 200
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert max_queued_rankings(Serving()) == 2
    assert max_queued_rankings(Serving(max_queued_requests=7)) == 7
