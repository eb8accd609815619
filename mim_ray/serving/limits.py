"""What is refused, and how: one sentence for every bad request, no door open to strangers.

`guarded` wraps a FastAPI app for Ray Serve or bare uvicorn. It knows no model. What is looked at before the app sees a
request is in guard.py, who may call in keys.py.
"""

from __future__ import annotations

import errno
import logging
import os
import traceback
from collections.abc import Sequence
from typing import Any

import ray
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.serve.config import BackpressureConfig
from ray.serve.context import _get_global_client
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from mim_ray.config.scenario import Serving
from mim_ray.errors import ConfigError, MimRayError, RequestError
from mim_ray.serving.guard import Guard, is_loopback
from mim_ray.serving.keys import VARIABLE, KeyRing
from mim_ray.serving.openapi import document

MAX_SENTENCE_CHARS = 1_000
logger = logging.getLogger("ray.serve")
FULL_QUEUE = BackpressureConfig(status_code=503, retry_after_s=1.0)
"""How Serve's proxy refuses what max_queued_requests leaves no place for: at once, in plain text."""


def check_exposure(serving: Serving) -> Serving:
    """Refuse to start where strangers could reach the apps and no API keys are set.

    Returns:
        the settings for the replicas: with `require_keys` where keys are set or others can reach them, so that a replica on
        a node without the keys does not start, instead of answering everyone.

    Raises:
        ConfigError: others can reach the app and there are no keys, or the keys cannot be used.
    """
    why = exposed_by(serving)
    keys = KeyRing.of(serving)
    if why is not None and keys is None:
        raise ConfigError(
            f"{why}, and there are no API keys, so that strangers could call. Set serving.keys_file (python -m "
            f"mim_ray.serving.keys new makes a key) or {VARIABLE}, or let the apps listen on 127.0.0.1 only."
        )
    return serving if keys is None else serving.model_copy(update={"require_keys": True})


def on_fast_path() -> bool:
    """Whether requests come from HAProxy straight to the replicas."""
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0") == "1"


def max_queued_rankings(serving: Serving) -> int:
    """`serving.max_queued_requests`, or its default where requests come from."""
    if serving.max_queued_requests is not None:
        return serving.max_queued_requests
    return 2 if on_fast_path() else 200


def exposed_by(serving: Serving) -> str | None:
    """What lets others than this machine reach the apps; None where nothing does, as far as this process can see."""
    if on_fast_path():
        return "RAY_SERVE_ENABLE_HA_PROXY=1 makes Ray Serve listen on all interfaces"
    if not is_loopback(serving.host):
        return f"serving.host = {serving.host} can be reached from other machines"
    host = _proxy_host()
    if host is not None and not is_loopback(host):
        return f"Ray Serve's proxy listens on {host} (http_options.host), which can be reached from other machines"
    return None


def check_count(name: str, count: int, largest: int) -> None:
    """
    Raises:
        RequestError: (422) more than `largest` entries.
    """
    if count > largest:
        raise RequestError(f"{name} holds {count:,} items; at most {largest:,} go into one request. Split it.", 422)


def guarded(app: FastAPI, serving: Serving) -> ASGIApp:
    """`app` for those who may call it, with limits on what they send, and with every failure told as {"error": sentence}.

    Raises:
        ConfigError: as check_exposure; an app that others can reach never starts without keys.
    """
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(MimRayError, _our_problem)
    app.add_exception_handler(OSError, _system_problem)
    app.add_exception_handler(Exception, _our_fault)
    document(app)
    checked = check_exposure(serving)
    return Guard(app, checked, KeyRing.of(checked), exposed=exposed_by(checked) is not None)


def _proxy_host() -> str | None:
    """Where the running Ray Serve listens, which serving.host does not decide; None where none runs or it has no proxy."""
    if not ray.is_initialized():
        return None
    client = _get_global_client(raise_if_no_controller_running=False)  # there is no public way to ask
    return None if client is None else client.http_config.host


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
        sentence = error.message  # it may name what the caller sent: a key of a dictionary, for one
        if len(sentence) > MAX_SENTENCE_CHARS:
            half = MAX_SENTENCE_CHARS // 2 - 1
            sentence = f"{sentence[:half]}…{sentence[-half:]}"
        return JSONResponse({"error": sentence.encode("utf-8", "replace").decode()}, status_code=error.status)
    logger.error("a request met %s: %s", type(error).__name__, error)
    return _later()


async def _system_problem(_: Request, error: Exception) -> JSONResponse:
    """A full or broken disk, too many open files, a connection of ours that broke: not the caller's, see guard.py."""
    assert isinstance(error, OSError)
    kind = errno.errorcode.get(error.errno or 0, "no number")
    lines = "".join(traceback.format_tb(error.__traceback__))  # without the message: it may name a user or a path
    logger.error("a request met %s (%s)\n%s", type(error).__name__, kind, lines)
    return _later()


def _later() -> JSONResponse:
    text = "The tables or models behind this endpoint cannot be used now. Try again; the replica's log has the reason."
    return JSONResponse({"error": text}, status_code=503, headers={"Retry-After": "1"})


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
