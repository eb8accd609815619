"""The picture of a new item: sent or fetched, then decoded; what is wrong with it becomes a sentence for the caller."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mim_ray.config.scenario import Data, Serving
from mim_ray.data.transforms import BadImage, PictureFormat
from mim_ray.errors import RequestError
from mim_ray.serving.decoding import ImageDecoder, TimeLeft
from mim_ray.serving.fetch import ImageFetcher
from mim_ray.serving.messages import NewItem


@dataclass
class TimeLimits:
    """What one request may still spend on its pictures."""

    decoding: TimeLeft
    fetching: TimeLeft


class Pictures:
    """
    Args:
        picture: what the encoder takes.
        fetcher: another one than the settings describe.

    Raises:
        ConfigError: serving.image_url_prefixes cannot be used.
    """

    def __init__(
        self, picture: PictureFormat, limits: Data, serving: Serving, *, fetcher: ImageFetcher | None = None
    ) -> None:
        self._picture = picture
        self._limits = limits
        self._serving = serving
        self._decoder = ImageDecoder.shared(limits.max_image_bytes, limits.max_image_pixels)
        self._fetcher = fetcher or ImageFetcher(serving.image_url_prefixes, limits.max_image_bytes)

    def time_limits(self) -> TimeLimits:
        """For a new request."""
        serving = self._serving
        return TimeLimits(TimeLeft(serving.decode_timeout_s), TimeLeft(serving.image_url_timeout_s))

    def get(self, item: NewItem, place: int, left: TimeLimits) -> tuple[bytes | None, np.ndarray | None]:
        """Bytes and (3, S, S) uint8 pixels; None and None for an item without a picture.

        Raises:
            RequestError: (422) the picture cannot be fetched or used; `place` is the item's in the request.
            UnavailableError: the decoder is busy with the pictures of others.
        """
        image = item.image or None
        if item.image_url is not None:
            if image is not None:
                raise RequestError(f"items[{place}] has both image and image_url. Send one of them.", 422)
            try:
                image = self._fetcher.fetch(item.image_url, left.fetching)
            except RequestError as error:
                raise RequestError(f"items[{place}].image_url: {error.message}", error.status) from None
        return image, None if image is None else self._decode(image, place, left.decoding)

    def _decode(self, image: bytes, place: int, left: TimeLeft) -> np.ndarray:
        try:
            return self._decoder.decode(image, self._picture, left)
        except BadImage as error:
            limits = self._limits
            raise RequestError(
                f"items[{place}].image: {error.reason} ({error.detail[:200]}). Send a JPEG, PNG, WebP or GIF file of at most "
                f"{limits.max_image_bytes:,} bytes and {limits.max_image_pixels:,} pixels.",
                422,
            ) from None
