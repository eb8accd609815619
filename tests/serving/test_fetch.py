"""Image URLs lead to configured public places and nowhere else. The names and addresses are faked at the border; the HTTP
and TLS servers are real ones on loopback."""

from __future__ import annotations

import http.server
import socket
import ssl
import threading
import time
from collections.abc import Iterator

import pytest

from mim_ray.errors import ConfigError, RequestError
from mim_ray.serving.decoding import TimeLeft
from mim_ray.serving.fetch import ImageFetcher, check_prefixes, is_public, parse

PUBLIC = "93.184.216.34"
PICTURE = b"\x89PNG, as far as this server knows"


class Server(http.server.BaseHTTPRequestHandler):
    """Answers by path, and keeps what it was asked."""

    asked: list[tuple[str, str]]

    def do_GET(self) -> None:
        type(self).asked.append((self.path, self.headers["Host"]))
        name = self.path.partition("?")[0].rpartition("/")[2]
        if name == "moved.png":
            self.send_response(302)
            self.send_header("Location", "http://169.254.169.254/latest/meta-data/")
            self.end_headers()
        elif name == "endless.png":
            self.send_response(200)
            self.end_headers()
            while True:
                self.wfile.write(bytes(65_536))
        elif name == "slow.png":
            self.send_response(200)
            self.end_headers()
            while True:
                self.wfile.write(b"x")
                time.sleep(0.02)
        elif name == "silent.png":
            time.sleep(60)
        elif name == "slow-header.png":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while True:
                self.wfile.write(b"x")
                time.sleep(0.02)
        elif name == "cut.png":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(PICTURE)
        elif name == "packed.png":
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(PICTURE)
        elif name == "gone.png":
            self.send_error(404, "secret of the server")
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(PICTURE)))
            self.end_headers()
            self.wfile.write(PICTURE)

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            return  # the client has gone, as it should


class Border:
    """Names and the way to addresses: what is asked for is kept, and every address leads to the server."""

    def __init__(self, server: http.server.HTTPServer | None, *answers: list[str]) -> None:
        self._server = server
        self._answers = list(answers) or [[PUBLIC]]
        self.resolved: list[tuple[str, int]] = []
        self.connected: list[tuple[str, int]] = []

    def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append((host, port))
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]

    def connect(self, address: tuple[str, int], timeout_s: float) -> socket.socket:
        self.connected.append(address)
        assert self._server is not None
        return socket.create_connection(self._server.server_address[:2], timeout_s)


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    yield from serving(None)


def serving(tls: ssl.SSLContext | None) -> Iterator[http.server.HTTPServer]:
    handler = type("Handler", (Server,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def fetcher(
    border: Border, *prefixes: str, max_bytes: int = 1_000_000, tls: ssl.SSLContext | None = None
) -> ImageFetcher:
    prefixes = prefixes or ("http://cdn.example/shop/",)
    return ImageFetcher(prefixes, max_bytes, resolve=border.resolve, connect=border.connect, tls=tls)


def refusal(fetcher: ImageFetcher, url: str, seconds: float = 20.0) -> str:
    with pytest.raises(RequestError) as refused:
        fetcher.fetch(url, TimeLeft(seconds))
    assert refused.value.status == 422
    assert "secret" not in refused.value.message
    assert PUBLIC not in refused.value.message
    return refused.value.message


def test_a_picture_below_a_prefix_is_fetched_from_the_address_that_was_checked(server):
    border = Border(server)
    left = TimeLeft(20.0)
    for url in ("http://cdn.example/shop/a.png", "HTTP://CDN.Example:80/shop/b/c.png?w=100&sig=a%2Bb"):
        assert fetcher(border).fetch(url, left) == PICTURE
    assert border.resolved == [("cdn.example", 80)] * 2
    assert border.connected == [(PUBLIC, 80)] * 2
    asked = server.RequestHandlerClass.asked
    assert asked == [("/shop/a.png", "cdn.example"), ("/shop/b/c.png?w=100&sig=a%2Bb", "cdn.example")]
    assert left.seconds < 20.0


def test_without_prefixes_every_url_is_refused_and_nothing_is_looked_up(server):
    border = Border(server)
    off = ImageFetcher((), 100, resolve=border.resolve, connect=border.connect)
    assert "switched off" in refusal(off, "http://cdn.example/shop/a.png")
    assert border.resolved == border.connected == []


ELSEWHERE = [
    "",
    "cdn.example/shop/a.png",
    "//cdn.example/shop/a.png",
    "file:///etc/passwd",
    "file://cdn.example/shop/a.png",
    "data:image/png;base64,iVBORw0KGgo=",
    "gopher://cdn.example/shop/a.png",
    "ftp://cdn.example/shop/a.png",
    "javascript:alert(1)",
    "https://cdn.example/shop/a.png",
    "http://cdn.example/shop",
    "http://cdn.example/shopping/a.png",
    "http://cdn.example/Shop/a.png",
    "http://cdn.example/a.png",
    "http://cdn.example:8080/shop/a.png",
    "http://cdn.example:0/shop/a.png",
    "http://cdn.example:99999/shop/a.png",
    "http://cdn.example:/shop/a.png",
    "http://cdn.example./shop/a.png",
    "http://evil.example/shop/a.png",
    "http://cdn.example.evil.example/shop/a.png",
    "http://cdn.example@evil.example/shop/a.png",
    "http://cdn.example:80@evil.example/shop/a.png",
    "http://user:secret@cdn.example/shop/a.png",
    "http://evil.example#@cdn.example/shop/a.png",
    "http://evil.example\\@cdn.example/shop/a.png",
    "http://cdn.example\\@evil.example/shop/a.png",
    "http:\\\\cdn.example\\shop\\a.png",
    "http://evil.example?http://cdn.example/shop/a.png",
    "http://cdn.example/shop/../secret/a.png",
    "http://cdn.example/shop/%2e%2e/secret/a.png",
    "http://cdn.example/shop/%252e%252e/secret/a.png",
    "http://cdn.example/shop/..%2fsecret/a.png",
    "http://cdn.example/shop/..%5csecret/a.png",
    "http://cdn.example/shop/./a.png",
    "http://cdn.example/shop/a.png%00",
    "http://cdn.example/shop/a.png#part",
    "http://cdn.example/shop/a b.png",
    "http://cdn.example/shop/..;/private/a.png",
    "http://cdn.example/shop/..%3bx/private/a.png",
    "http://cdn.example/shop/a.png\r\nX-Evil: 1",
    "http://cdn.example/shop/a\tb.png",
    " http://cdn.example/shop/a.png",
    "http://cdn.example/shop/a.png ",
    "http://cdn.example\t/shop/a.png",
    "http://cdn。example/shop/a.png",
    "http://ｃdn.example/shop/a.png",
    "http://ſhop.example/shop/a.png",
    "http://cdn.example/shop/ü.png",
    "http://127.0.0.1/shop/a.png",
    "http://2130706433/shop/a.png",
    "http://0x7f000001/shop/a.png",
    "http://0177.0.0.1/shop/a.png",
    "http://127.1/shop/a.png",
    "http://[::1]/shop/a.png",
    "http://[::ffff:127.0.0.1]/shop/a.png",
    "http://169.254.169.254/latest/meta-data/",
    "http://localhost/shop/a.png",
    "http://cdn.example/shop/" + "a" * 3_000,
]


@pytest.mark.parametrize("url", ELSEWHERE)
def test_what_is_not_plainly_below_a_prefix_is_refused_without_a_look_up(url):
    border = Border(None)
    assert refusal(fetcher(border), url).endswith(".")
    assert border.resolved == border.connected == []


PRIVATE = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "192.0.2.1", "198.18.0.1", "224.0.0.1",
    "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "fec0::1",
    "::ffff:127.0.0.1", "::ffff:a9fe:a9fe", "::7f00:1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::",
    "2001::1", "2001:db8::1", "100::1", "no address", "",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_a_name_that_leads_inside_is_not_followed(address):
    for answer in ([address], [PUBLIC, address]):
        border = Border(None, answer)
        assert "no public address" in refusal(fetcher(border), "http://cdn.example/shop/a.png")
        assert border.connected == []


def test_public_addresses_are_recognised():
    public = (PUBLIC, "1.1.1.1", "2606:4700::1111", f"::ffff:{PUBLIC}", "64:ff9b::5db8:d822")
    assert all(is_public(address) for address in public)


def test_a_prefix_that_is_an_inner_address_leads_nowhere(server):
    border = Border(server, ["127.0.0.1"])
    inner = fetcher(border, "http://127.0.0.1/", "http://0x7f.1/", "http://localhost/")
    for url in ("http://127.0.0.1/a", "http://0x7f.1/a", "http://localhost/a"):
        assert "no public address" in refusal(inner, url)
    assert border.connected == []


def test_a_name_that_answers_otherwise_the_second_time_is_asked_once(server):
    border = Border(server, [PUBLIC], ["127.0.0.1"])
    assert fetcher(border).fetch("http://cdn.example/shop/a.png", TimeLeft(20.0)) == PICTURE
    assert border.resolved == [("cdn.example", 80)]
    assert border.connected == [(PUBLIC, 80)]
    assert "no public address" in refusal(fetcher(border), "http://cdn.example/shop/a.png")


def test_redirects_are_not_followed(server):
    border = Border(server)
    assert "redirects are not followed" in refusal(fetcher(border), "http://cdn.example/shop/moved.png")
    assert len(border.connected) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("endless.png", "more than 1,000 bytes"),
        ("cut.png", "did not answer"),
        ("packed.png", "compressed"),
        ("gone.png", "answered 404"),
    ],
)
def test_answers_that_are_no_picture_of_a_fair_size_are_refused(server, name, words):
    assert words in refusal(fetcher(Border(server), max_bytes=1_000), f"http://cdn.example/shop/{name}")


@pytest.mark.parametrize("name", ["slow.png", "slow-header.png", "silent.png"])
def test_an_answer_that_drips_is_cut_off(server, name):
    left = TimeLeft(0.3)
    with pytest.raises(RequestError, match="did not answer in time"):
        fetcher(Border(server)).fetch(f"http://cdn.example/shop/{name}", left)
    assert left.seconds > -30, "it would have gone on for a minute or more"


def test_names_that_take_too_long_or_do_not_exist_are_refused(server):
    border = Border(server)
    waiting = threading.Event()
    slow = ImageFetcher(["http://cdn.example/"], 100, resolve=lambda *_: waiting.wait(20.0) and [PUBLIC])
    assert "did not answer in time" in refusal(slow, "http://cdn.example/a", seconds=0.1)
    waiting.set()

    def unknown(*_: object) -> list[str]:
        raise socket.gaierror(-2, "secret name or service not known")

    none = ImageFetcher(["http://cdn.example/"], 100, resolve=unknown, connect=border.connect)
    assert "did not answer" in refusal(none, "http://cdn.example/a")


def test_no_time_left_means_no_connection(server):
    border = Border(server)
    refusal(fetcher(border), "http://cdn.example/shop/a.png", seconds=-1.0)
    assert border.connected == []


def test_tls_checks_the_name_and_not_the_address(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    trusting = ssl.create_default_context(cafile=certificate)
    for server in serving(context):
        border = Border(server)
        both = fetcher(border, "https://cdn.example/", "https://other.example/", tls=trusting)
        assert both.fetch("https://cdn.example/a.png", TimeLeft(20.0)) == PICTURE
        assert border.connected == [(PUBLIC, 443)]
        assert "no valid certificate" in refusal(both, "https://other.example/a.png")
        assert "no valid certificate" in refusal(fetcher(border, "https://cdn.example/"), "https://cdn.example/a.png")
        assert [path for path, _ in server.RequestHandlerClass.asked] == ["/a.png"]


def test_prefixes_that_could_mean_more_than_they_say_are_refused_at_the_start():
    bad = [
        "https://cdn.example",
        "https://cdn.example/shop",
        "cdn.example/",
        "file:///srv/",
        "https://user@cdn.example/",
    ]
    with pytest.raises(ConfigError) as refused:
        check_prefixes([*bad, "https://cdn.example/?a/", "https://cdn.example/good/"])
    assert all(repr(prefix) in str(refused.value) for prefix in bad)
    assert "good" not in str(refused.value)


def test_a_url_is_read_by_one_parser():
    url = parse("HTTPS://CDN.Example:8443/Shop/a.png?x=1")
    assert (url.scheme, url.host, url.port, url.target) == ("https", "cdn.example", 8443, "/Shop/a.png?x=1")
    assert url.authority == "cdn.example:8443"
