"""What a user searched with, for models that were trained with queries: its vector is made by the new-item encoder app."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import numpy as np

from mim_ray.ciubm.export import Ranker
from mim_ray.errors import RequestError, UnavailableError
from mim_ray.serving.messages import RankRequest
from mim_ray.serving.similar_routes import Embed


class QueryVector(NamedTuple):
    """(D,), and the version of the encoder that made it."""

    vector: np.ndarray
    encoder_version: str

    def fits(self, model: Ranker) -> bool:
        """Whether the model was trained with queries of this encoder version; while a release is rolled out it may not."""
        return self.encoder_version == model.query_encoder_version and self.vector.shape == (model.query_width,)


def has_query(request: RankRequest) -> bool:
    """Whether the request says what the user searched with."""
    return request.query_text is not None or request.query_image is not None


async def encoded(request: RankRequest, embed: Embed, deadline_s: float) -> QueryVector | None:
    """The vector of the request's query, a picture before a text, as training took it; None where the encoder does not answer in
    time.

    Raises:
        RequestError: (422) a picture that cannot be used, or a blank text.
    """
    text = None if request.query_image else request.query_text
    try:
        async with asyncio.timeout(deadline_s):
            return QueryVector(*await embed(request.query_image, text))
    except (UnavailableError, TimeoutError):
        return None


def check_takes_queries(model: Ranker) -> None:
    """
    Raises:
        RequestError: (422) the model was trained without queries.
    """
    if model.query_width is None:
        raise RequestError(
            f"{model.variant} was trained without queries. Leave query_text and query_image out of the request.", 422
        )
