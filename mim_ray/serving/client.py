"""A small client of the serving apps: one retry within a deadline, so that a killed replica is no failed page.

    client = Client("http://127.0.0.1:8000", key="…", deadline_s=0.5)
    answer = client.rank("u17", ["i3", "i1", "i2"], top_k=2)
    client.events([{"user_id": "u17", "item_id": "i1", "event": "click", "request_id": answer["request_id"]}])

Standard library only. Thread-safe: each thread has a connection of its own, which stays open. What is tried again, once: a
connection that breaks, 5xx answers and 408, these after Retry-After or half of the time that is left, whichever is shorter.
Asking twice is harmless: rankings change nothing, events carry an Idempotency-Key, the same item's content is encoded once.
A request that nobody took, because connections are refused or the proxy has just started and knows no app yet, is no try: it
is offered until the deadline. So a proxy that dies and comes back in time costs nothing but that time.
"""

from __future__ import annotations

import base64
import errno
import http.client
import json
import random
import ssl
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from mim_ray.errors import ConfigError, RequestError, UnavailableError
from mim_ray.serving.timed_connection import TimedConnection

MAX_ANSWER_BYTES = 64 * 2**20
BACKOFF_S = 0.02  # before the second try, where the server names no time
MOST_BACKOFF_S = 0.25  # between offers to a server that is away
_AWAY = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN}
_TOO_SLOW = 408  # the server gave up waiting for all of the request, and has done nothing
_NO_ROUTES = b"/-/routes"  # in the 404 of a Serve proxy that knows no app of this path
_STALE = (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError, ConnectionAbortedError)


class Client:
    """
    Args:
        base_url: of both apps, such as https://ranking.shop. key: an API key.
        deadline_s: in which a call answers or raises, the retry and the waiting for a server included; only resolving the
            host's name, which the standard library cannot end, may take longer.

    Raises:
        ConfigError: the URL is none.
    """

    def __init__(self, base_url: str, key: str | None = None, *, deadline_s: float = 2.0) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{base_url!r} is no address of a server. Give it as http://HOST:PORT or https://HOST.")
        if deadline_s <= 0:
            raise ConfigError(f"deadline_s = {deadline_s} leaves no time. Give a positive number of seconds.")
        self._host, self._port = parts.hostname, parts.port
        self._prefix = parts.path.rstrip("/")
        self._headers = {"Accept": "application/json", "User-Agent": "mim_ray"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._deadline_s = deadline_s
        self._of_thread = threading.local()
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None

    def rank(self, user_id: str, candidates: Sequence[str], **more: Any) -> dict[str, Any]:
        """POST /v1/rank.

        Args:
            more: other fields of the request, such as top_k, context, behaviors.

        Raises:
            RequestError: the server refuses this request, with its sentence and status.
            UnavailableError: no answer within the deadline.
        """
        return self._call("POST", "/v1/rank", {"user_id": user_id, "candidates": list(candidates), **more})

    def items(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """POST /v1/items. `image` may be bytes; `content_at` is now where it is not given, so that a second try is no newer
        content. Raises as `rank`."""
        now = datetime.now(UTC).isoformat()
        encoded = [
            {"content_at": now}
            | {
                name: base64.b64encode(value).decode() if isinstance(value, bytes) else _plain(value)
                for name, value in item.items()
            }
            for item in items
        ]
        return self._call("POST", "/v1/items", {"items": encoded})

    def events(self, events: Sequence[Mapping[str, Any]], *, idempotency_key: str | None = None) -> dict[str, Any]:
        """POST /v1/events. `timestamp` may be a datetime with a time zone. Raises as `rank`.

        Args:
            idempotency_key: of these events; when this call raises UnavailableError, call again with the same key until it
                answers, and they count once. Default: a new one.
        """
        plain = [{name: _plain(value) for name, value in event.items()} for event in events]
        return self._call("POST", "/v1/events", {"events": plain}, idempotency_key=idempotency_key or uuid.uuid4().hex)

    def similar(self, item_id: str, **more: Any) -> dict[str, Any]:
        """GET /v1/similar/{item_id}. Raises as `rank`.

        Args:
            more: top_k, category.
        """
        given = {name: value for name, value in more.items() if value is not None}
        path = f"/v1/similar/{quote(item_id, safe='')}"
        return self._call("GET", f"{path}?{urlencode(given)}" if given else path, None)

    def close(self) -> None:
        """Close this thread's connection."""
        connection = getattr(self._of_thread, "connection", None)
        if connection is not None:
            connection.close()
            self._of_thread.connection = None

    def _call(self, method: str, path: str, body: Any, idempotency_key: str | None = None) -> dict[str, Any]:
        content = None if body is None else json.dumps(body, allow_nan=False).encode()
        headers = dict(self._headers)
        if content is not None:
            headers["Content-Type"] = "application/json"
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        deadline = time.monotonic() + self._deadline_s
        wait_s, problem, tries, offers = 0.0, "", 0, 0
        while tries < 2 and time.monotonic() + wait_s < deadline:
            time.sleep(wait_s)
            try:
                status, answer_headers, answer = self._exchange(method, path, content, headers, deadline)
            except (OSError, http.client.HTTPException) as error:
                self.close()
                problem = f"{type(error).__name__}: {error}"
                tries, wait_s = tries + 1, _backoff_s(0)
                continue
            if status == 404 and _NO_ROUTES in answer:
                problem = f"404: {_sentence(answer)}"
                offers, wait_s = offers + 1, _backoff_s(offers)
                continue
            if status < 500 and status != _TOO_SLOW:
                return _answer(status, answer)
            problem = f"{status}: {_sentence(answer)}"
            named = _retry_after(answer_headers.get("Retry-After"))
            half_s = (deadline - time.monotonic()) / 2  # the other half is for the second try
            tries, wait_s = tries + 1, _backoff_s(0) if named is None else max(0.0, min(named, half_s))
        raise UnavailableError(
            f"{method} {path.partition('?')[0].split('/similar/')[0]} of {self._host} was not answered within "
            f"{self._deadline_s:g} s ({problem or 'no time was left'}). Try again, or go on without."
        )

    def _exchange(
        self, method: str, path: str, content: bytes | None, headers: dict[str, str], deadline: float
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """One question and its answer. A kept connection that the server closed meanwhile is replaced: that is no try."""
        connection = getattr(self._of_thread, "connection", None)
        if connection is not None:
            try:
                return self._on(connection, method, path, content, headers, deadline)
            except _STALE:
                self.close()
        connection = self._of_thread.connection = self._connected(deadline)
        return self._on(connection, method, path, content, headers, deadline)

    def _connected(self, deadline: float) -> TimedConnection:
        """A new connection. Where nobody listens: as soon as somebody does."""
        offers = 0
        while True:
            connection = TimedConnection(self._host, self._port, self._tls, deadline)
            try:
                connection.connect()
                return connection
            except OSError as error:
                connection.close()
                if not isinstance(error, ConnectionError) and error.errno not in _AWAY:
                    raise
                time.sleep(max(0.0, min(_backoff_s(offers), deadline - time.monotonic())))
                if time.monotonic() >= deadline:
                    raise
                offers += 1

    def _on(
        self,
        connection: TimedConnection,
        method: str,
        path: str,
        content: bytes | None,
        headers: dict[str, str],
        deadline: float,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection.deadline = deadline
        connection.request(method, self._prefix + path, content, headers)
        response = connection.getresponse()
        parts, num_bytes = [], 0
        while not response.isclosed() and response.length != 0:
            part = response.read1(2**16)
            if not part:
                break
            parts.append(part)
            num_bytes += len(part)
            if num_bytes > MAX_ANSWER_BYTES:
                raise http.client.HTTPException(f"an answer of more than {MAX_ANSWER_BYTES:,} bytes")
        if response.length:
            raise http.client.IncompleteRead(b"".join(parts), response.length)
        response.close()  # of the answer alone: the connection can be used again
        if response.will_close:
            self.close()
        return response.status, response.headers, b"".join(parts)


def _backoff_s(offers: int) -> float:
    """Before the next offer, after so many that nobody took."""
    return float(min(BACKOFF_S * 2 ** min(offers, 10), MOST_BACKOFF_S) * random.uniform(0.5, 1.5))


def _answer(status: int, content: bytes) -> dict[str, Any]:
    if status >= 300:
        raise RequestError(_sentence(content), status)
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise UnavailableError(f"The server answered {status} with no JSON object; is this address that of the apps?")
    return answer


def _sentence(content: bytes) -> str:
    """What the server says is wrong."""
    try:
        told = json.loads(content)
    except ValueError:
        told = None
    if isinstance(told, dict) and isinstance(told.get("error"), str):
        return str(told["error"])
    return content[:200].decode("utf-8", "replace") or "no reason was given"


def _retry_after(text: str | None) -> float | None:
    """Seconds to wait; None where the server names none that can be read."""
    if text is None:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value
