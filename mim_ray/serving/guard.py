"""The shell around an app: who calls, how large a body is and what its JSON looks like, before the app sees anything.

Its answers are {"error": sentence}, as the app's own (limits.py). Nothing of a request goes to the log.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import traceback
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mim_ray.config.scenario import Serving
from mim_ray.errors import RequestError
from mim_ray.serving.json_limits import check_json
from mim_ray.serving.keys import OPEN, PAGE, KeyRing, needed_scope

logger = logging.getLogger("ray.serve")


class Guard:
    """ASGI shell. Keys come first; then body bytes are counted as they come in, whatever Content-Length says.

    It also hides Serve's route prefix: our routes are full paths (/v1/rank), whatever prefix an app is deployed under.

    Args:
        keys: who may call. None: everyone on this machine, and nobody else.
        exposed: others can reach the app.
    """

    def __init__(self, app: ASGIApp, serving: Serving, keys: KeyRing | None, *, exposed: bool) -> None:
        self._app = app
        self._serving = serving
        self._keys = keys
        self._exposed = exposed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no WebSockets
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            self._check_caller(scope)
            reads_none = needed_scope(scope["path"]) in (OPEN, PAGE)
            body = b"" if reads_none else await self._body(scope, receive)
            if body is None:
                return
            if body and _is_json(scope):
                check_json(body, self._serving.max_json_values)
        except _Refused as refused:
            await _send(send, refused)
            return
        except RequestError as error:
            await _send(send, _Refused(error.status, error.message))
            return
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        caller_is_gone = False

        async def answer(message: Message) -> None:
            nonlocal caller_is_gone
            try:
                await send(message)
            except OSError:  # so ASGI 2.4 tells it; uvicorn and Ray Serve say nothing
                caller_is_gone = True
                raise

        try:
            await self._app({**scope, "root_path": ""}, replay, answer)
        except Exception as error:  # noqa: BLE001  (limits.py has answered it; it is logged here, once)
            if caller_is_gone:
                return
            lines = "".join(traceback.format_tb(error.__traceback__))  # without the message: it may name a user
            logger.error("a request met %s\n%s", type(error).__name__, lines)

    def _check_caller(self, scope: Scope) -> None:
        from_outside = not _arrived_here(scope)
        if self._keys is None:
            self._check_local(scope, from_outside)
            return
        refusal = self._keys.authorize(scope["path"], scope["headers"], exposed=self._exposed or from_outside)
        if refusal is not None:
            raise _Refused(refusal.status, refusal.sentence, [(b"www-authenticate", refusal.challenge.encode())])

    def _check_local(self, scope: Scope, from_outside: bool) -> None:
        """Without keys: the connection was made to this machine's loopback, and not by a page of another site."""
        if from_outside:
            text = "This app has no API keys, so it answers only callers on its own machine. Set serving.keys_file."
            raise _Refused(403, text)
        if not all(is_loopback(_host_of(origin)) for origin in _headers(scope, b"origin")):
            raise _Refused(403, "This app has no API keys, so it does not answer the pages of other sites.")
        hosts = [_host_of(b"//" + host) for host in _headers(scope, b"host")]
        if _headers(scope, b"sec-fetch-site") and not all(
            is_loopback(host) for host in hosts
        ):  # a name that leads here
            raise _Refused(403, "This app has no API keys, so browsers reach it as localhost or 127.0.0.1 only.")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """None: the caller went away."""
        largest = self._serving.max_body_bytes
        for declared in _headers(scope, b"content-length"):
            if declared.isdigit() and (len(declared) > 18 or int(declared) > largest):
                raise _too_large(largest)
        body = bytearray()
        try:
            async with asyncio.timeout(self._serving.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > largest:
                        raise _too_large(largest)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            text = f"The body did not arrive within {self._serving.body_timeout_s:g} s. Send it again."
            raise _Refused(408, text, [(b"connection", b"close")]) from None


class _Refused(Exception):
    def __init__(self, status: int, sentence: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
        super().__init__(status, sentence, headers)
        self.status = status
        self.sentence = sentence
        self.headers = headers or []


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _too_large(largest: int) -> _Refused:
    text = f"The body has more than {largest:,} bytes, and no more are read. Send a smaller one."
    return _Refused(413, text, [(b"connection", b"close")])  # the rest of the body is not read


def _arrived_here(scope: Scope) -> bool:
    """False where the connection was made to an address that others can reach. Servers that do not say are trusted: a
    socket file, a test's client."""
    server = scope.get("server")
    try:
        return server is None or ipaddress.ip_address(server[0]).is_loopback
    except ValueError:
        return True


def _host_of(origin: bytes) -> str:
    try:
        return urlsplit(origin.decode("latin-1")).hostname or ""
    except ValueError:
        return ""


def _is_json(scope: Scope) -> bool:
    """Whether any part of the app could read the body as JSON: several headers, or odd ones, do not hide it."""
    kinds = _headers(scope, b"content-type")
    return not kinds or any(b"json" in kind.lower() for kind in kinds)


def _headers(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


async def _send(send: Send, refused: _Refused) -> None:
    content = json.dumps({"error": refused.sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers + refused.headers})
    await send({"type": "http.response.body", "body": content})
