"""The client against a real HTTP server that fails in every way it should bear, and in some that it should tell."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mim_ray.errors import ConfigError, RequestError, UnavailableError
from mim_ray.serving.client import Client


class Server:
    """Does what `plan` says, one entry for each request; then it answers."""

    def __init__(self, port: int = 0) -> None:
        self.plan: list[object] = []
        self.seen: list[dict] = []
        self.num_connections = 0
        ours = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                ours.num_connections += 1
                super().setup()

            def log_message(self, *_) -> None:
                pass

            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                ours.seen.append(
                    {"path": self.path, "headers": dict(self.headers), "body": json.loads(body) if body else None}
                )
                step = ours.plan.pop(0) if ours.plan else {}
                if callable(step):
                    step(self)
                    return
                answer = {"status": 200, "body": b'{"fine": true}', "headers": {}} | step
                self.send_response(answer["status"])
                for name, value in answer["headers"].items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer["body"])))
                self.end_headers()
                self.wfile.write(answer["body"])

            do_GET = do_POST = handle_one

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if not self._thread.is_alive():
            return
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def client(server):
    client = Client(f"http://127.0.0.1:{server.port}", "the-key", deadline_s=5)
    yield client
    client.close()


# what goes wrong once


def reset(handler) -> None:
    """The process was killed: the kernel resets the connection."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


def hang_up(handler) -> None:
    handler.close_connection = True


def cut_off(handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b'{"half":')
    handler.close_connection = True


def cut_off_chunk(handler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"40\r\n{")
    handler.close_connection = True


def garbage(handler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
    handler.close_connection = True


BUSY = {"status": 503, "body": b'{"error": "The queue is full."}', "headers": {"Retry-After": "0"}}
ONCE = [
    reset,
    hang_up,
    cut_off,
    cut_off_chunk,
    garbage,
    BUSY,
    {"status": 500, "body": b"Internal"},
    {"status": 502},
    {"status": 408},
]


@pytest.mark.parametrize("failure", ONCE)
@pytest.mark.parametrize("kept", [False, True])
def test_what_fails_once_is_asked_again_with_the_same_key(server, client, failure, kept):
    if kept:
        client.rank("u", ["i"])
        server.seen.clear()
    server.plan = [failure]
    assert client.events([{"user_id": "u", "item_id": "i", "event": "click"}]) == {"fine": True}
    assert len(server.seen) == 2
    keys = {seen["headers"]["Idempotency-Key"] for seen in server.seen}
    assert len(keys) == 1
    assert server.seen[0]["body"] == server.seen[1]["body"]


@pytest.mark.parametrize("failure", [reset, cut_off, BUSY, {"status": 504, "body": b"<html>late</html>"}])
def test_what_goes_on_failing_is_told_after_one_retry(server, client, failure):
    server.plan = [failure] * 5
    with pytest.raises(UnavailableError, match=r"POST /v1/rank of 127\.0\.0\.1 was not answered within 5 s"):
        client.rank("u", ["i"])
    assert len(server.seen) == 2


def test_a_kept_connection_that_was_closed_meanwhile_costs_no_retry(server, client):
    client.rank("u", ["i"])
    server.plan = [hang_up, BUSY]
    assert client.rank("u", ["i"]) == {"fine": True}
    assert len(server.seen) == 4


def test_a_connection_is_kept_and_used_again(server, client):
    for _ in range(5):
        client.rank("u", ["i"])
    assert server.num_connections == 1
    server.plan = [{"headers": {"Connection": "close"}}]
    client.rank("u", ["i"])
    client.rank("u", ["i"])
    assert server.num_connections == 2


def test_each_thread_has_its_own_connection(server, client):
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(client.rank("u", ["i"]))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [{"fine": True}] * 6
    assert server.num_connections == 6


@pytest.mark.parametrize("text", ["0.3", "date"])
def test_retry_after_is_honoured(server, text):
    client = Client(f"http://127.0.0.1:{server.port}", deadline_s=10)
    in_two_s = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)  # whole seconds: 1 to 2 from now
    server.plan = [BUSY | {"headers": {"Retry-After": in_two_s if text == "date" else text}}]
    start = time.monotonic()
    client.rank("u", ["i"])
    assert time.monotonic() - start >= 0.29
    assert len(server.seen) == 2


@pytest.mark.parametrize(("named", "at_most_s"), [("0.25", 0.25), ("1", 1.0), ("3600", 30.0), ("inf", 30.0)])
def test_a_retry_after_is_waited_for_but_no_longer_than_half_of_what_is_left(server, monkeypatch, named, at_most_s):
    client = Client(f"http://127.0.0.1:{server.port}", deadline_s=60)
    waited = []
    monkeypatch.setattr("mim_ray.serving.client.time.sleep", waited.append)
    server.plan = [BUSY | {"headers": {"Retry-After": named}}]
    assert client.rank("u", ["i"]) == {"fine": True}
    assert len(server.seen) == 2
    before, between = waited
    assert before == 0.0
    assert at_most_s * 0.5 < between <= at_most_s


def test_a_queue_that_stays_full_is_told_after_one_retry(server):
    server.plan = [BUSY | {"headers": {"Retry-After": "1"}}] * 3
    with pytest.raises(UnavailableError, match=r"within 0\.5 s \(503: The queue is full\.\)"):
        Client(f"http://127.0.0.1:{server.port}", deadline_s=0.5).rank("u", ["i"])
    assert len(server.seen) == 2


def test_a_retry_after_that_is_nonsense_is_none(server, client):
    server.plan = [BUSY | {"headers": {"Retry-After": "soon"}}]
    assert client.rank("u", ["i"]) == {"fine": True}


def test_a_server_that_hangs_is_given_up_at_the_deadline_however_slowly_it_talks(server):
    client = Client(f"http://127.0.0.1:{server.port}", deadline_s=0.4)
    released = threading.Event()

    def drip(handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        while not released.wait(0.05):
            handler.wfile.write(b" ")

    for step in (lambda _: released.wait(30), drip):
        server.plan = [step]
        with pytest.raises(UnavailableError, match=r"within 0\.4 s"):
            client.rank("u", ["i"])
    released.set()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_where_nobody_listens_the_deadline_is_waited_for():
    with pytest.raises(UnavailableError, match="ConnectionRefusedError"):
        Client(f"http://127.0.0.1:{closed_port()}", deadline_s=0.3).rank("u", ["i"])


def test_nobody_listens_and_then_somebody_does(monkeypatch):
    port, answers, refused = closed_port(), [], threading.Semaphore(0)
    monkeypatch.setattr("mim_ray.serving.client._backoff_s", lambda offers: refused.release() or 0.01)
    client = Client(f"http://127.0.0.1:{port}", deadline_s=60)
    asked = threading.Thread(target=lambda: answers.append(client.rank("u", ["i"])))
    asked.start()
    for _ in range(4):
        assert refused.acquire(timeout=30), "it gave up"
    server = Server(port)
    try:
        asked.join(60)
    finally:
        server.stop()
    assert answers == [{"fine": True}]


def test_a_server_that_dies_in_work_and_comes_back_costs_no_answer_and_still_leaves_the_retry(server):
    client = Client(f"http://127.0.0.1:{server.port}", deadline_s=60)
    client.rank("u", ["i"])
    gone = threading.Event()
    again = []

    def die(handler) -> None:
        server._server.socket.close()  # later connections are refused
        reset(handler)
        gone.set()

    def come_back() -> None:
        gone.wait(30)
        server.stop()
        again.append(Server(server.port))

    server.plan = [die]
    back = threading.Thread(target=come_back)
    back.start()
    assert client.events([{"user_id": "u", "item_id": "i", "event": "click"}], idempotency_key="k") == {"fine": True}
    back.join()
    (new,) = again
    new.stop()
    assert [seen["headers"]["Idempotency-Key"] for seen in (server.seen[-1], *new.seen)] == ["k", "k"]


NO_ROUTES = {
    "status": 404,
    "body": b"Path '/v1/rank' not found. Ping http://.../-/routes for available routes.",
    "headers": {"Content-Type": "text/plain"},
}


def test_a_proxy_that_has_just_started_and_knows_no_app_is_asked_until_it_does(server, client):
    server.plan = [NO_ROUTES] * 4 + [BUSY]
    assert client.rank("u", ["i"]) == {"fine": True}
    assert len(server.seen) == 6
    server.plan = [NO_ROUTES] * 1_000
    with pytest.raises(UnavailableError, match=r"404: Path '/v1/rank' not found"):
        Client(f"http://127.0.0.1:{server.port}", deadline_s=0.5).rank("u", ["i"])


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 429])
def test_what_the_server_refuses_is_its_sentence_and_is_not_asked_again(server, client, status):
    server.plan = [{"status": status, "body": b'{"error": "candidates is missing."}'}]
    with pytest.raises(RequestError, match="candidates is missing") as refused:
        client.rank("u", [])
    assert refused.value.status == status
    assert len(server.seen) == 1


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b"\xff\xfe"])
def test_an_answer_that_is_no_object_is_told(server, client, body):
    server.plan = [{"body": body}]
    with pytest.raises(UnavailableError, match="no JSON object"):
        client.rank("u", ["i"])


def test_each_method_asks_what_the_apps_understand(server, client):
    at = datetime(2026, 3, 2, 12, tzinfo=UTC)
    client.rank("ü/1", ("i1", "i2"), top_k=1)
    client.events([{"user_id": "u", "item_id": "i", "event": "click", "timestamp": at}], idempotency_key="mine")
    client.items([{"item_id": "n", "image": b"\x89PNG", "content_at": at}])
    client.similar("a/b ü", top_k=3, category=None)
    ranked, events, items, similar = server.seen
    assert "Idempotency-Key" not in items["headers"]
    assert (ranked["path"], ranked["body"]) == (
        "/v1/rank", {"user_id": "ü/1", "candidates": ["i1", "i2"], "top_k": 1},
    )  # fmt: skip
    assert events["body"]["events"][0]["timestamp"] == "2026-03-02T12:00:00+00:00"
    assert events["headers"]["Idempotency-Key"] == "mine"
    assert items["body"] == {"items": [{"item_id": "n", "image": "iVBORw==", "content_at": at.isoformat()}]}
    assert similar["path"] == "/v1/similar/a%2Fb%20%C3%BC?top_k=3"
    assert {seen["headers"]["Authorization"] for seen in server.seen} == {"Bearer the-key"}
    assert "Idempotency-Key" not in ranked["headers"]


def test_a_path_before_the_apps_is_kept_and_without_a_key_none_is_sent(server):
    Client(f"http://127.0.0.1:{server.port}/shop/").rank("u", ["i"])
    assert server.seen[0]["path"] == "/shop/v1/rank"
    assert "Authorization" not in server.seen[0]["headers"]


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://"])
def test_an_address_that_is_none_is_a_sentence(url):
    with pytest.raises(ConfigError, match="no address of a server"):
        Client(url)


def test_no_number_and_no_time_is_refused_before_it_is_sent(client, server):
    with pytest.raises(ConfigError, match="leaves no time"):
        Client("http://localhost", deadline_s=0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        client.events([{"user_id": "u", "item_id": "i", "event": "x", "revenue": float("nan")}])
    assert server.seen == []
