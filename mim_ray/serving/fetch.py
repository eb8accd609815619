"""Pictures by URL, off by default: only from configured prefixes, only from public addresses, no redirects, with caps.

A service that fetches what strangers name reads, in their stead, what only it can reach: cloud metadata, databases, other
tenants. So the prefix decides what may be fetched, and the address is checked as well, in case a name of the prefix points
inside: there is one parser, the name is resolved once, and the connection goes to the address that was checked.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from mim_ray.errors import ConfigError, RequestError
from mim_ray.serving.decoding import TimeLeft

MAX_URL_CHARS = 2_048
Resolve = Callable[[str, int], Sequence[str]]
"""(host, port) -> addresses."""
Connect = Callable[[tuple[str, int], float], socket.socket]
"""((address, port), timeout in seconds) -> socket."""
_URL = re.compile(
    r"(https?)://([a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?)(?::([0-9]{1,5}))?"  # scheme, host, port
    r"(/[!$-;=@-\[\]_a-z~]*)?(\?[!$-;=?-\[\]_a-z~]*)?",  # path, query
    re.IGNORECASE | re.ASCII,
)
_HIDDEN = re.compile(rb"(?i)%(2e|2f|5c|00)")
_PORTS = {"http": 80, "https": 443}
_REFUSED = [
    ipaddress.ip_network(one)
    for one in (
        "168.63.129.16/32",  # Azure's host agent, in a public range
        "192.0.0.0/24",  # older Pythons count parts of it as global
        "192.88.99.0/24",  # relays into 6to4
        "2001::/23",  # protocols, such as Teredo, which has an IPv4 address inside
        "2002::/16",  # 6to4: an IPv4 address inside
        "3fff::/20",  # documentation
    )
]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")


@dataclass(frozen=True)
class Url:
    """`path` begins with a slash, `target` is path and query."""

    scheme: str
    host: str
    port: int
    path: str
    target: str

    @property
    def authority(self) -> str:
        """The Host header."""
        return self.host if self.port == _PORTS[self.scheme] else f"{self.host}:{self.port}"

    def is_below(self, prefix: Url) -> bool:
        same = (self.scheme, self.host, self.port) == (prefix.scheme, prefix.host, prefix.port)
        return same and self.path.startswith(prefix.path)


class ImageFetcher:
    """
    Args:
        prefixes: what URLs may begin with, such as https://images.example.com/shop/; none: every URL is refused.
        max_bytes: of one picture.
        resolve, connect, tls: the border to the network.

    Raises:
        ConfigError: a prefix that is no http or https URL ending in a slash.
    """

    def __init__(
        self,
        prefixes: Sequence[str],
        max_bytes: int,
        *,
        resolve: Resolve | None = None,
        connect: Connect = socket.create_connection,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._prefixes = check_prefixes(prefixes)
        self._max_bytes = max_bytes
        self._resolve = resolve or _resolve
        self._connect = connect
        self._tls = tls or ssl.create_default_context()
        self._resolvers = ThreadPoolExecutor(4, thread_name_prefix="resolve")  # a name server may take its time

    def fetch(self, text: str, left: TimeLeft) -> bytes:
        """The body that a URL answers with. Takes the time it needs from `left`.

        Raises:
            RequestError: (422) with a sentence that holds neither the URL nor what is behind it.
        """
        if not self._prefixes:
            raise RequestError("Image URLs are switched off here. Send the bytes as `image` (base64).", 422)
        url = parse(text)
        if not any(url.is_below(prefix) for prefix in self._prefixes):
            raise RequestError("This URL is not below one of the prefixes that images are fetched from.", 422)
        start = time.monotonic()
        try:
            return self._get(url, start + left.seconds)
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # UnicodeError: a name that DNS cannot hold
            if isinstance(error, ssl.SSLCertVerificationError):
                raise RequestError("The host of this URL has no valid certificate.", 422) from None
            raise RequestError(
                "This URL did not answer in time, or not with a picture. Try again later.", 422
            ) from None
        finally:
            left.seconds -= time.monotonic() - start

    def _get(self, url: Url, deadline: float) -> bytes:
        found = self._resolvers.submit(self._resolve, url.host, url.port)
        addresses = found.result(timeout=max(0.0, deadline - time.monotonic()))
        if not addresses or not all(is_public(address) for address in addresses):
            raise RequestError("The host of this URL has no public address.", 422)
        connection = _Connection(url, addresses[0], self._connect, self._tls, deadline)
        watch = threading.Timer(max(0.0, deadline - time.monotonic()), connection.cut)
        watch.start()
        try:
            headers = {
                "Accept": "image/*",
                "Accept-Encoding": "identity",
                "User-Agent": "mim_ray",
                "Connection": "close",
            }
            connection.request("GET", url.target, headers=headers | {"Host": url.authority})
            body = self._read(connection.getresponse())
            if connection.was_cut:  # what came until then looks like a whole answer where no length was named
                raise TimeoutError
            return body
        finally:
            watch.cancel()
            connection.close()

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        if 300 <= response.status < 400:
            raise RequestError("This URL redirects, and redirects are not followed. Send the URL it leads to.", 422)
        if response.status != 200:
            raise RequestError(f"This URL answered {response.status} instead of 200.", 422)
        if response.getheader("Content-Encoding", "identity").lower() != "identity":
            raise RequestError("This URL answered with compressed content; pictures are taken as they are.", 422)
        body = bytearray()
        while len(body) <= self._max_bytes:
            piece = response.read(65_536)
            if not piece:
                if response.length:  # bytes that the header promised
                    raise http.client.IncompleteRead(bytes(body), response.length)
                return bytes(body)
            body += piece
        raise RequestError(f"The picture behind this URL has more than {self._max_bytes:,} bytes.", 422)


def check_prefixes(prefixes: Sequence[str]) -> list[Url]:
    """
    Raises:
        ConfigError: one is no http or https URL ending in a slash.
    """
    urls, problems = [], []
    for prefix in prefixes:
        try:
            urls.append(parse(prefix))
            if not prefix.endswith("/") or "?" in prefix or prefix.count("/") < 3:
                problems.append(f"{prefix!r} does not end in a slash: https://host/ or https://host/folder/")
        except RequestError:
            problems.append(f"{prefix!r} is no plain http or https URL")
    if problems:
        raise ConfigError(f"serving.image_url_prefixes: {'; '.join(problems)}.")
    return urls


def parse(text: str) -> Url:
    """
    Raises:
        RequestError: (422) not a plain http or https URL: another scheme, a user name, a fragment, backslashes, control
            characters, letters outside ASCII, `..`, or a slash in disguise.
    """
    found = _URL.fullmatch(text) if len(text) <= MAX_URL_CHARS else None
    if found is None:
        raise RequestError(
            f"image_url is no plain http or https URL of at most {MAX_URL_CHARS:,} characters. Write names with other "
            "letters in their xn-- form, escape other characters with %, and leave out user names and fragments.",
            422,
        )
    scheme, host, port, path, query = found[1].lower(), found[2].lower(), found[3], found[4] or "/", found[5] or ""
    once = unquote_to_bytes(path)
    segments = [segment.partition(b";")[0] for segment in once.split(b"/")]  # some servers read `..;` as `..`
    if b"." in segments or b".." in segments or _HIDDEN.search(path.encode()) or _HIDDEN.search(once) or b"\\" in once:
        raise RequestError("image_url has `.` or `..` in its path, or hides dots or slashes in it.", 422)
    number = int(port) if port else _PORTS[scheme]
    if not 0 < number < 65_536:
        raise RequestError("image_url names a port that does not exist.", 422)
    return Url(scheme, host, number, path, path + query)


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address belongs to the open internet, with those that IPv6 wraps unwrapped."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip not in _GLOBAL_V6 or ip.scope_id is not None:
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _REFUSED)


class _Connection(http.client.HTTPConnection):
    """Goes to one address, whatever the name says now; TLS checks the name."""

    def __init__(self, url: Url, address: str, connect: Connect, tls: ssl.SSLContext, deadline: float) -> None:
        super().__init__(url.host, url.port)
        self._url, self._address, self._dial, self._tls, self._deadline = url, address, connect, tls, deadline
        self._kept: socket.socket | None = None
        self.was_cut = False

    def connect(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.sock: Any = self._dial((self._address, self._url.port), left)
        self.sock.settimeout(left)
        self._kept = self.sock  # http.client forgets the socket while the answer is still being read
        if self._url.scheme == "https":
            self._kept = self.sock = self._tls.wrap_socket(
                self.sock, server_hostname=self._url.host, do_handshake_on_connect=False
            )
            self.sock.do_handshake()

    def cut(self) -> None:
        """End a conversation that goes on for too long, from another thread."""
        self.was_cut = True
        if self._kept is not None:
            with contextlib.suppress(OSError):  # closed by now
                self._kept.shutdown(socket.SHUT_RDWR)


def _resolve(host: str, port: int) -> list[str]:
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
