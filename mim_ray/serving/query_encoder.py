"""What somebody searches with, as a vector in MM space. Part of the new-item encoder app: other apps reach no encoder."""

from __future__ import annotations

import numpy as np

from mim_ray.config.scenario import Data
from mim_ray.data.transforms import BadImage, clean_title
from mim_ray.encoders.item_encoder import ItemEncoder, encode_batch, encode_queries
from mim_ray.errors import RequestError
from mim_ray.serving.decoding import ImageDecoder, TimeLeft


class QueryEncoder:
    """Args: as of `NewItemEncoder`."""

    def __init__(self, encoder: ItemEncoder, limits: Data, *, decode_timeout_s: float = 10.0) -> None:
        self._encoder, self._limits = encoder, limits
        self._decoder = ImageDecoder.shared(limits.max_image_bytes, limits.max_image_pixels)
        self._decode_timeout_s = decode_timeout_s

    def embed(self, image: bytes | None, title: str | None) -> np.ndarray:
        """(D,) of length 1: h^img of a picture, which C-SFT trains to be near the h^MM of what was bought (Eq. 5); h^txt of a
        text; of both together the h^MM of an item that looks and is called so.

        Raises:
            RequestError: (422) neither of them, or a picture that cannot be used. UnavailableError: as of ImageDecoder.decode.
        """
        size, limits = self._encoder.image_size, self._limits
        text = clean_title(title, limits.max_title_chars)
        if text is None and not image:
            raise RequestError("Send an image, a title, or both to search with.", 422)
        pixels = np.zeros((1, 3, size, size), np.uint8)
        if image:
            try:
                pixels[0] = self._decoder.decode(image, self._encoder.picture, TimeLeft(self._decode_timeout_s))
            except BadImage as error:
                raise RequestError(
                    f"image: {error.reason} ({error.detail[:200]}). Send a JPEG, PNG, WebP or GIF file of at most "
                    f"{limits.max_image_bytes:,} bytes and {limits.max_image_pixels:,} pixels.",
                    422,
                ) from None
        embed = encode_batch if image and text is not None else encode_queries
        vector = embed(self._encoder, [text], pixels, np.array([bool(image)]))[0]
        if not np.isfinite(vector).all():
            raise FloatingPointError(f"{self._encoder.encoder_version} gave an embedding that is no number")
        return vector
