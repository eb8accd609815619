"""What a user searched with, for models that were trained with queries: its vector is made by the new-item encoder app."""

from __future__ import annotations

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

    def for_model(self, model: Ranker) -> np.ndarray:
        """
        Raises:
            RequestError: (422) the model was trained without queries.
            UnavailableError: it was trained with queries of another encoder version.
        """
        check_takes_queries(model)
        if self.encoder_version != model.query_encoder_version or self.vector.shape != (model.query_width,):
            raise UnavailableError(
                f"The query was encoded by {self.encoder_version}, and the model was trained with queries of "
                f"{model.query_encoder_version}: a release is being rolled out. Try again."
            )
        return self.vector


def has_query(request: RankRequest) -> bool:
    """Whether the request says what the user searched with."""
    return request.query_text is not None or request.query_image is not None


async def encoded(request: RankRequest, embed: Embed) -> QueryVector:
    """The vector of the request's query, a picture before a text, as training took it.

    Raises:
        RequestError: (422) a picture that cannot be used, or a blank text. UnavailableError: the encoder does not answer.
    """
    text = None if request.query_image else request.query_text
    return QueryVector(*await embed(request.query_image, text))


def check_takes_queries(model: Ranker) -> None:
    """
    Raises:
        RequestError: (422) the model was trained without queries.
    """
    if model.query_width is None:
        raise RequestError(
            f"{model.variant} was trained without queries. Leave query_text and query_image out of the request.", 422
        )
