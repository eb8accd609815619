"""The encoder of the release that serves, with the face of a NewItemEncoder, while releases are rolled out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mim_ray.serving.messages import NewItemsRequest, NewItemsResponse
from mim_ray.serving.query_encoder import QueryEncoder
from mim_ray.serving.rollout import Rollout
from mim_ray.serving.served import Served

if TYPE_CHECKING:
    from mim_ray.serving.new_item_encoder import NewItemEncoder


@dataclass(frozen=True)
class OpenEncoder:
    """The encoder of one release, for items and for queries."""

    served: Served
    items: NewItemEncoder
    queries: QueryEncoder

    def close(self) -> None:
        """It has no thread of its own."""


class CurrentEncoder:
    """Each request runs wholly on one encoder: the release's, or none."""

    def __init__(self, rollout: Rollout[OpenEncoder]) -> None:
        self.rollout = rollout

    @property
    def encoder_version(self) -> str:
        """Of the encoder that serves now."""
        return self.rollout.current.items.encoder_version

    def check_release(self) -> None:
        """
        Raises:
            VersionMismatchError: another encoder version was promoted, and is not open yet.
        """
        self.rollout.current.items.check_release()

    def encode(self, request: NewItemsRequest) -> NewItemsResponse:
        """As NewItemEncoder.encode."""
        return self.rollout.current.items.encode(request)
