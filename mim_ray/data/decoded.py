"""Pictures of catalogue rows, decoded; kept in memory where the whole catalogue is small."""

from __future__ import annotations

import math

import numpy as np

from mim_ray.data.catalogue import Catalogue
from mim_ray.data.transforms import PictureFormat, decode_images

_CACHE_BYTES = 256 * 2**20


class DecodedPictures:
    """Reads and decodes pictures by row.

    Args:
        cache_bytes: decoded pictures are kept if all of the catalogue's fit; memory is taken as they are met.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        picture: PictureFormat,
        max_bytes: int,
        max_pixels: int,
        cache_bytes: int = _CACHE_BYTES,
    ) -> None:
        self.catalogue, self._picture, self._limits = catalogue, picture, (max_bytes, max_pixels)
        self._kept: np.ndarray | None = None
        shape = (catalogue.num_items, 3, picture.size, picture.size)
        if math.prod(shape) <= cache_bytes:
            self._kept = np.empty(shape, np.uint8)
        self._state = np.zeros(catalogue.num_items, np.int8)  # 0 not decoded yet, 1 decoded, 2 no usable picture

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (B, 3, S, S), anything where there is none, and (B,) bool: whether the row has a picture that decodes."""
        if self._kept is None:
            return self._read(rows)
        missing = np.unique(rows[self._state[rows] == 0])
        if len(missing):
            self._kept[missing], fine = self._read(missing)
            self._state[missing] = np.where(fine, 1, 2)
        return self._kept[rows], self._state[rows] == 1

    def decode(self, images: list[bytes | None]) -> tuple[np.ndarray, np.ndarray]:
        """The same of encoded pictures that are not the catalogue's."""
        return decode_images(images, self._picture, *self._limits)

    def _read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.decode(self.catalogue.take(rows, ["image"]).column("image").to_pylist())
