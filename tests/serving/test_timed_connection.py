"""A server that never stops talking, but so slowly that each wait of the client is short."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator

import pytest

from mim_ray.errors import UnavailableError
from mim_ray.serving.client import Client
from mim_ray.serving.timed_connection import TimedConnection, left

DEADLINE_S = 0.2
NUM_DROPS, EVERY_S = 90, 0.1  # then the answer is whole; http.client takes no more than 100 headers
FINE = b'{"fine": true}'
OK = b"HTTP/1.1 200 OK\r\n"
WHOLE = OK + b"Content-Length: 14\r\n\r\n" + FINE
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
DRIPPED = {  # what comes at once, what comes drop by drop, what comes at the end
    "status line": (b"HTTP/1.1 200 O", b"K", WHOLE.removeprefix(b"HTTP/1.1 200 OK")),
    "one header": (OK + b"X-Long: ", b"x", b"\r\n" + WHOLE.removeprefix(OK)),
    "headers": (OK, b"X-One: 1\r\n", WHOLE.removeprefix(OK)),
    "answers before the answer": (b"", b"HTTP/1.1 100 Continue\r\n\r\n", WHOLE),
    "body": (OK + b"Content-Length: %d\r\n\r\n" % (NUM_DROPS + 14), b" ", FINE),
    "body without a length": (OK + b"Connection: close\r\n\r\n", b" ", FINE),
    "chunks": (CHUNKED, b"1\r\n \r\n", b"e\r\n" + FINE + b"\r\n0\r\n\r\n"),
    "length of a chunk": (CHUNKED, b"0", b"e\r\n" + FINE + b"\r\n0\r\n\r\n"),
    "trailer": (CHUNKED + b"e\r\n" + FINE + b"\r\n0\r\n", b"X-One: 1\r\n", b"\r\n"),
}
Talk = Callable[[socket.socket, threading.Event], None]


class Server:
    """Says and hears what `talk` does with a connection, which may be of TLS."""

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        self.talk: Talk = answer
        self.over = threading.Event()
        self.said_all = False
        self._tls = tls
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self.over.is_set():
            with contextlib.suppress(OSError):  # the client has gone
                sock, _ = self._listening.accept()
                with self._tls.wrap_socket(sock, server_side=True) if self._tls else sock as open_socket:
                    self.talk(open_socket, self.over)

    def stop(self) -> None:
        self.over.set()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listening.close()


@pytest.fixture(params=["http", "https"])
def server(request, certificate, monkeypatch) -> Iterator[Server]:
    tls = None
    if request.param == "https":
        monkeypatch.setenv("SSL_CERT_FILE", certificate)  # what clients trust
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate)
    server = Server(tls)
    server.url = f"{request.param}://localhost:{server.port}"
    yield server
    server.stop()


def hear(sock: socket.socket) -> None:
    """All of a request."""
    with sock.makefile("rb") as stream:
        num_bytes = 0
        while (line := stream.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            num_bytes = int(value) if name.lower() == b"content-length" else num_bytes
        stream.read(num_bytes)


def answer(sock: socket.socket, over: threading.Event) -> None:
    for _ in range(3):  # on one connection
        hear(sock)
        sock.sendall(WHOLE)


@pytest.mark.parametrize("what", DRIPPED)
def test_a_call_ends_at_its_deadline_wherever_the_answer_comes_drop_by_drop(server, what):
    at_once, drop, end = DRIPPED[what]

    def drip(sock: socket.socket, over: threading.Event) -> None:
        hear(sock)
        sock.sendall(at_once)
        for _ in range(NUM_DROPS):
            if over.wait(EVERY_S):
                return
            sock.sendall(drop)
        server.said_all = True
        sock.sendall(end)

    server.talk = drip
    with pytest.raises(UnavailableError, match=r"within 0\.2 s"):
        Client(server.url, deadline_s=DEADLINE_S).rank("u", ["i"])
    assert not server.said_all


def test_a_call_ends_at_its_deadline_where_the_server_takes_the_request_drop_by_drop(server):
    num_bytes = 15_000_000  # more than the kernel's buffers hold

    def sip(sock: socket.socket, over: threading.Event) -> None:
        heard = 0
        while heard < num_bytes and not over.wait(EVERY_S / 10):
            heard += len(sock.recv(2**16))
        server.said_all = heard >= num_bytes
        sock.sendall(WHOLE)

    server.talk = sip
    with pytest.raises(UnavailableError, match=r"within 0\.2 s"):
        Client(server.url, deadline_s=DEADLINE_S).items([{"item_id": "i", "title": "x" * num_bytes}])
    assert not server.said_all


def test_a_tls_handshake_that_never_ends_is_given_up_at_the_deadline():
    server = Server(None)

    def stutter(sock: socket.socket, over: threading.Event) -> None:
        sock.sendall(b"\x16\x03\x03\x40\x00")  # a record of 16 kB begins
        for _ in range(NUM_DROPS):
            if over.wait(EVERY_S):
                return
            sock.sendall(b"\0")
        over.wait(30)

    server.talk = stutter
    try:
        with pytest.raises(UnavailableError, match=r"handshake|deadline"):
            Client(f"https://localhost:{server.port}", deadline_s=DEADLINE_S).rank("u", ["i"])
    finally:
        server.stop()


def test_an_address_that_nobody_answers_at_leaves_no_time_for_another(monkeypatch):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.create_server(("127.0.0.1", 0)) as other:
        others = [socket.socket() for _ in range(4)]
        for one in others:  # the queue of connections is full: another is not even refused
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", listening.getsockname())
            for listening in (full, full, full, other)
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        with pytest.raises(UnavailableError, match="within"):
            Client("http://shop.example", deadline_s=DEADLINE_S).rank("u", ["i"])
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()
        for one in others:
            one.close()


def test_one_client_asks_again_on_the_kept_connection_over_http_and_https(server):
    client = Client(server.url, deadline_s=60)
    for _ in range(3):
        assert client.rank("u", ["i"]) == {"fine": True}
    client.close()


def test_a_large_request_and_a_large_answer_come_over_whole(server):
    text = "é" * 3_000_000
    heard = []

    def talk(sock: socket.socket, over: threading.Event) -> None:
        with sock.makefile("rb") as stream:
            lengths = [line for line in iter(stream.readline, b"\r\n") if line.lower().startswith(b"content-length:")]
            body = stream.read(int(lengths[0].partition(b":")[2]))
        heard.append(body)
        sock.sendall(OK + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    server.talk = talk
    answered = Client(server.url, deadline_s=60).rank(text, ["i"])
    assert answered == {"user_id": text, "candidates": ["i"]}
    assert len(heard) == 1


def test_the_host_header_names_a_port_that_is_not_the_schemes():
    assert TimedConnection("shop", None, None, 0).port == 80
    assert TimedConnection("shop", 8443, ssl.create_default_context(), 0).port == 8443
    https = TimedConnection("shop", None, ssl.create_default_context(), 0)
    assert (https.port, https.default_port) == (443, 443)


def test_no_time_is_left_after_the_deadline():
    assert left(float("inf")) > 0
    with pytest.raises(TimeoutError, match="the deadline is over"):
        left(0.0)
