"""What is refused, and how: sizes before parsing, one sentence for every bad request, no door open to strangers.

`guarded` wraps a FastAPI app for Ray Serve or bare uvicorn. It knows no model.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mim_ray.config.scenario import Serving
from mim_ray.errors import ConfigError, MimRayError, RequestError

logger = logging.getLogger("ray.serve")


def check_exposure(serving: Serving) -> None:
    """Refuse to start where strangers could reach the apps: authentication is not there yet.

    Raises:
        ConfigError: Serve's fast proxy is on, which opens ports on all interfaces, or the host is not loopback.
    """
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0") == "1":
        raise ConfigError(
            "RAY_SERVE_ENABLE_HA_PROXY=1 makes Ray Serve listen on all interfaces, and these apps do not check who "
            "calls. Unset it to listen on 127.0.0.1 only, or put an authenticating gateway on the same host."
        )
    if not is_loopback(serving.host):
        raise ConfigError(
            f"serving.host = {serving.host} can be reached from other machines, and these apps do not check who calls. "
            "Use serving.host=127.0.0.1 and put an authenticating gateway before it."
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_count(name: str, count: int, largest: int) -> None:
    """
    Raises:
        RequestError: (422) more than `largest` entries.
    """
    if count > largest:
        raise RequestError(f"{name} holds {count:,} items; at most {largest:,} go into one request. Split it.", 422)


def guarded(app: FastAPI, max_body_bytes: int) -> ASGIApp:
    """`app` with a byte limit on bodies, and with every failure told as {"error": sentence}."""
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(MimRayError, _our_problem)
    app.add_exception_handler(Exception, _our_fault)
    return _Guard(app, max_body_bytes)


class _Guard:
    """ASGI shell: counts body bytes as they come in, whatever Content-Length says, before anything is parsed.

    It also hides Serve's route prefix: our routes are full paths (/v1/rank), whatever prefix an app is deployed under.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            await self._refuse(send, int(declared))
            return
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                await self._refuse(send, len(body))
                return
            if not message.get("more_body", False):
                break
        pending: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        try:
            await self._app({**scope, "root_path": ""}, replay, send)
        except Exception:  # starlette raises again what _our_fault has answered: log it here, once
            logger.exception("a request failed")

    async def _refuse(self, send: Send, num_bytes: int) -> None:
        text = (
            f"The body has {num_bytes:,} bytes or more; at most {self._max_body_bytes:,} are read. Send a smaller one."
        )
        await _send(send, 413, text)


async def _send(send: Send, status: int, text: str) -> None:
    content = json.dumps({"error": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if status == 413:
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def _invalid_request(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    sentences = [_sentence(detail) for detail in error.errors()[:5]]
    if len(error.errors()) > 5:
        sentences.append(f"And {len(error.errors()) - 5:,} more problems.")
    return JSONResponse({"error": " ".join(sentences)}, status_code=422)


async def _http_problem(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": str(error.detail)}, status_code=error.status_code, headers=error.headers)


async def _our_fault(_: Request, error: Exception) -> JSONResponse:
    text = "This request failed on our side. Try again; the replica's log has the reason."
    return JSONResponse({"error": text}, status_code=500)


async def _our_problem(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, RequestError):
        return JSONResponse({"error": error.message}, status_code=error.status)
    logger.error("a request met %s: %s", type(error).__name__, error)
    text = "The tables or models behind this endpoint cannot be used now. Try again; the replica's log has the reason."
    return JSONResponse({"error": text}, status_code=503)


def _sentence(detail: dict[str, Any]) -> str:
    """One problem of pydantic's list, without the value: values may be large or private."""
    place = _place(detail["loc"])
    kind = detail["type"]
    if kind == "json_invalid":
        return f"The body is no valid JSON ({detail.get('ctx', {}).get('error', 'syntax error')})."
    if kind == "extra_forbidden":
        return f"{place} is no known key. See /docs for the keys."
    if place == "the body" and kind in ("missing", "model_attributes_type"):
        return "The body must be a JSON object, sent with Content-Type: application/json."
    if kind == "missing":
        return f"{place} is missing."
    return f"{place}: {detail['msg'].removeprefix('Value error, ')}."


def _place(loc: Sequence[str | int]) -> str:
    parts = list(loc[1:]) if loc and loc[0] == "body" else list(loc)
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text[:200].encode("utf-8", "replace").decode() or "the body"
