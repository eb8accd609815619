"""GET /v1/similar/{item_id} and POST /v1/search/image, in the ranking app: its replicas search, the encoder app embeds the query.

The encoder is asked through its Serve handle, so that this app imports none and ranks on when the encoder is away.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, HTTPException, Path, Query
from fastapi.concurrency import run_in_threadpool
from grpc import RpcError
from pydantic import ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from mim_ray.errors import ConfigError, RequestError, UnavailableError
from mim_ray.serving.messages import MAX_ID_CHARS, Base64Bytes, Message, Problem
from mim_ray.serving.similar import Found, SimilarItems

logger = logging.getLogger("ray.serve")
ENCODER_APP = "new_item_encoder"  # name of its Serve application
ENCODER_DEADLINE_S = 5.0
RETRY_AFTER_S = 2
MAX_TOP_K = 1_000
MAX_EMBEDDING = 3  # queries that one replica has the encoder read at once: half of its places stay for others

Embed = Callable[[bytes | None, str | None], Awaitable[tuple[np.ndarray, str]]]
"""(image, title) -> the query's vector (D,), and the version of the encoder that made it."""
TopK = Annotated[int, Field(ge=1, le=MAX_TOP_K)]
Category = Annotated[str, Field(max_length=MAX_ID_CHARS)]


class SimilarItem(Message):
    """One item near the query."""

    item_id: str
    similarity: float
    """Cosine of the two MM embeddings, in [-1, 1]."""
    category: str | None
    """Null where it is not known."""


class SimilarResponse(Message):
    """Items by falling similarity."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "items": [{"item_id": "i7", "similarity": 0.93, "category": "mugs"}],
                    "encoder_version": "csft-0a1b2c3d4e5f",
                }
            ]
        }
    )

    items: list[SimilarItem]
    encoder_version: str


class SearchRequest(Message):
    """What to search with: a picture, a text, or both."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"image": "iVBORw0KGgo=", "top_k": 5}, {"title": "striped blue mug"}]}
    )

    image: Base64Bytes | None = None
    """Bytes of a JPEG, PNG, WebP or GIF file, as base64."""
    title: Annotated[str, Field(max_length=100_000)] | None = None
    """Words. With an image: what the item in it is called."""
    top_k: TopK = 10
    category: Category | None = None
    """Only items of this category."""


def add_similar_routes(app: FastAPI, similar: SimilarItems | None, embed: Embed | None = None) -> None:
    """
    Args:
        similar: None: serving.similar_items is off, which both routes answer.
        embed: makes a query's vector. Default: the new-item encoder app that runs beside this one.
    """
    embed = encoder_app() if embed is None else embed
    problems: dict[int | str, dict[str, Any]] = {status: {"model": Problem} for status in (400, 404, 422, 501, 503)}

    @app.get("/v1/similar/{item_id:path}", responses=problems | {409: {"model": Problem}})
    def similar_items(
        item_id: Annotated[str, Path(min_length=1, max_length=MAX_ID_CHARS)],
        top_k: Annotated[int, Query(ge=1, le=MAX_TOP_K)] = 10,
        category: Annotated[str | None, Query(max_length=MAX_ID_CHARS)] = None,
    ) -> SimilarResponse:
        """The items whose content is nearest to that of an item, by cosine."""
        found = _asked(similar)
        return _answer(lambda: found.of_item(item_id, top_k, category=category))

    @app.post("/v1/search/image", responses=problems | {413: {"model": Problem}})
    async def search(request: SearchRequest) -> SimilarResponse:
        """The items whose content is nearest to a picture, a text, or both."""
        found = _asked(similar)
        if not request.image and not (request.title or "").strip():
            raise RequestError("Send an image, a title, or both to search with.", 422)
        try:
            vector, encoder_version = await embed(request.image, request.title)
        except UnavailableError as error:
            raise _later(error) from None
        return await run_in_threadpool(
            _answer, lambda: found.of_vector(vector, request.top_k, encoder_version, category=request.category)
        )


def encoder_app(name: str = ENCODER_APP, deadline_s: float = ENCODER_DEADLINE_S) -> Embed:
    """Asks the Serve application `name`, whose ingress has `embed_query`.

    The function raises RequestError for a picture that cannot be used, and UnavailableError where nobody answers, or
    MAX_EMBEDDING others wait already.
    """
    handles: list[Any] = []
    waiting = 0

    async def embed(image: bytes | None, title: str | None) -> tuple[np.ndarray, str]:
        nonlocal waiting
        if waiting >= MAX_EMBEDDING:
            raise UnavailableError("The new-item encoder has many queries to read already. Try again.")
        waiting += 1
        try:
            if not handles:
                handles.append(await run_in_threadpool(serve.get_app_handle, name))
            answer = await asyncio.wait_for(handles[0].embed_query.remote(image, title), deadline_s)
        except (RayServeException, RayError, RpcError, TimeoutError) as error:  # RpcError: on the fast path
            logger.warning("no answer of the app %s: %s", name, type(error).__name__)
            raise UnavailableError(
                "The new-item encoder, which reads pictures and texts to search with, does not answer. Try again."
            ) from None
        finally:
            waiting -= 1
        if isinstance(answer, RequestError):
            raise answer
        return answer

    return embed


def _asked(similar: SimilarItems | None) -> SimilarItems:
    if similar is None:
        raise HTTPException(404, "Similar items are switched off here. Start the app with serving.similar_items=true.")
    return similar


def _answer(search: Callable[[], Found]) -> SimilarResponse:
    try:
        found = search()
    except UnavailableError as error:
        raise _later(error) from None
    except ConfigError as error:  # FAISS is missing
        raise HTTPException(501, str(error)) from None
    items = [SimilarItem(item_id=one.item_id, similarity=one.similarity, category=one.category) for one in found.items]
    return SimilarResponse(items=items, encoder_version=found.encoder_version)


def _later(why: object) -> HTTPException:
    return HTTPException(503, str(why), headers={"Retry-After": str(RETRY_AFTER_S)})
