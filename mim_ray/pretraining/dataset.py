"""What pre-training sees: images, titles and pairs of the catalogue, from before the CTR validation starts.

A part of the items, chosen by a hash of their ids, is held out and measured, never trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mim_ray.data.batches import catalogue_batches, prefetch
from mim_ray.data.catalogue import Catalogue
from mim_ray.data.ids import hash_ids
from mim_ray.data.transforms import PictureFormat, decode_images

HELD_OUT_RATIO = 0.05
MOST_HELD_OUT = 1_024
"""Held-out items that are measured; more would only cost time."""
_CACHE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Items:
    """Rows of the catalogue by use, each (n,) int64."""

    with_image: np.ndarray
    with_title: np.ndarray
    with_both: np.ndarray
    held_out_image: np.ndarray
    held_out_title: np.ndarray
    held_out_both: np.ndarray


def choose_items(catalogue: Catalogue, before_us: int) -> Items:
    """The items known to exist before a time (microseconds UTC), for training and held out."""
    known = catalogue.created_at < before_us
    held_out = hash_ids(catalogue.ids) % np.uint64(10_000) < HELD_OUT_RATIO * 10_000
    image, title = catalogue.has_image, catalogue.has_title

    def rows(condition: np.ndarray, most: int | None = None) -> np.ndarray:
        return np.flatnonzero(known & condition)[:most]

    return Items(
        with_image=rows(image & ~held_out),
        with_title=rows(title & ~held_out),
        with_both=rows(image & title & ~held_out),
        held_out_image=rows(image & held_out, MOST_HELD_OUT),
        held_out_title=rows(title & held_out, MOST_HELD_OUT),
        held_out_both=rows(image & title & held_out, MOST_HELD_OUT),
    )


class Pictures:
    """Decoded pictures of catalogue rows; kept in memory where the whole catalogue fits `cache_bytes`."""

    def __init__(
        self,
        catalogue: Catalogue,
        picture: PictureFormat,
        max_bytes: int,
        max_pixels: int,
        cache_bytes: int = _CACHE_BYTES,
    ) -> None:
        self._catalogue, self._picture = catalogue, picture
        self._limits = (max_bytes, max_pixels)
        self._kept: np.ndarray | None = None
        if catalogue.num_items * 3 * picture.size**2 <= cache_bytes:
            self._kept = np.empty(
                (catalogue.num_items, 3, picture.size, picture.size), np.uint8
            )  # pages are taken as they are filled
        self._state = np.zeros(catalogue.num_items, np.int8)  # 0 not decoded yet, 1 decoded, 2 unusable
        self.num_unusable = 0

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (B, 3, S, S) and the rows they are of: a row whose picture cannot be decoded gives way to the next usable."""
        if self._kept is None:
            pixels, usable = self._decode(rows)
        else:
            missing = np.unique(rows[self._state[rows] == 0])
            if len(missing):
                self._kept[missing], fine = self._decode(missing)
                self._state[missing] = np.where(fine, 1, 2)
            pixels, usable = self._kept[rows], self._state[rows] == 1
        if usable.all() or not usable.any():
            return pixels, rows
        self.num_unusable += int((~usable).sum())
        good = np.flatnonzero(usable)
        source = good[np.searchsorted(good, np.arange(len(rows))) % len(good)]  # itself, or the next usable
        return pixels[source], rows[source]

    def _decode(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = self._catalogue.take(rows, ["image"]).column("image").to_pylist()
        return decode_images(images, self._picture, *self._limits)


def titles_of(catalogue: Catalogue, rows: np.ndarray) -> list[str]:
    """Titles by row, empty where missing."""
    return [title or "" for title in catalogue.take(rows, ["title"]).column("title").to_pylist()]


@dataclass(frozen=True)
class Share:
    """Which part of all batches is this worker's: a function of (seed, rank, world) and the step."""

    batch_size: int
    seed: int
    rank: int
    world: int


class PretrainingData:
    """Batches of a catalogue for one worker, made ahead in a thread."""

    def __init__(self, catalogue: Catalogue, pictures: Pictures, share: Share) -> None:
        self.catalogue, self.pictures, self._share = catalogue, pictures, share

    def images(self, rows: np.ndarray, num_steps: int) -> Iterator[Tensor]:
        """uint8 (B, 3, S, S) per step."""
        return prefetch(torch.from_numpy(self.pictures.take(batch)[0]) for batch in self._rows(rows, num_steps))

    def titles(self, rows: np.ndarray, num_steps: int) -> Iterator[list[str]]:
        """B titles per step."""
        return prefetch(titles_of(self.catalogue, batch) for batch in self._rows(rows, num_steps))

    def pairs(self, rows: np.ndarray, num_steps: int) -> Iterator[tuple[Tensor, list[str]]]:
        """Images and their titles per step."""
        return prefetch(self.pair(batch) for batch in self._rows(rows, num_steps))

    def pair(self, rows: np.ndarray) -> tuple[Tensor, list[str]]:
        """uint8 (B, 3, S, S) and B titles of given rows."""
        pixels, rows = self.pictures.take(rows)
        return torch.from_numpy(pixels), titles_of(self.catalogue, rows)

    def titles_of(self, rows: np.ndarray) -> list[str]:
        return titles_of(self.catalogue, rows)

    def _rows(self, rows: np.ndarray, num_steps: int) -> Iterator[np.ndarray]:
        share = self._share
        return catalogue_batches(self.catalogue, rows, share.batch_size, share.seed, share.rank, share.world, num_steps)
