"""Catalogue rows as encoder input: pictures decoded, titles as text, content hashes. Runs where pictures are decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mim_ray.config.scenario import Data
from mim_ray.data.catalogue import Catalogue
from mim_ray.data.decoded import DecodedPictures
from mim_ray.data.feeding import Chunk, json_array, json_value
from mim_ray.data.ids import hash_ids
from mim_ray.data.transforms import PictureFormat

_ARRAYS = ("rows", "contents", "pixels", "has_image", "has_text")


@dataclass(frozen=True)
class Items:
    """n items before tokens: rows, contents (n,) int64; pixels (n, 3, S, S) uint8; flags (n,) bool; n titles."""

    rows: np.ndarray
    contents: np.ndarray
    pixels: np.ndarray
    has_image: np.ndarray
    has_text: np.ndarray
    titles: list[str | None]

    def __getitem__(self, places: slice | np.ndarray) -> Items:
        titles = self.titles[places] if isinstance(places, slice) else [self.titles[i] for i in places]
        return Items(
            self.rows[places], self.contents[places], self.pixels[places], self.has_image[places],
            self.has_text[places], titles,
        )  # fmt: skip

    @staticmethod
    def joined(parts: list[Items]) -> Items:
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
        return Items(titles=[title for part in parts for title in part.titles], **arrays)

    def as_chunk(self) -> Chunk:
        return {name: getattr(self, name) for name in _ARRAYS} | {"titles": json_array(self.titles)}

    @staticmethod
    def of_chunk(chunk: Chunk) -> Items:
        return Items(titles=json_value(chunk["titles"]), **{name: chunk[name] for name in _ARRAYS})


class ItemLoader:
    """Reads and decodes items of a catalogue."""

    def __init__(self, catalogue: Catalogue, picture: PictureFormat, data: Data) -> None:
        self.catalogue = catalogue
        self.pictures = DecodedPictures(catalogue, picture, data.max_image_bytes, data.max_image_pixels)

    def items(
        self, rows: np.ndarray, *, drop_image: np.ndarray | None = None, drop_text: np.ndarray | None = None
    ) -> Items:
        """Args: rows: (n,). drop_image, drop_text: (n,) bool, items that are to be seen without their picture (title)."""
        table = self.catalogue.take(rows, ["title", "content_hash"])
        pixels, has_image = self.pictures.take(rows)
        titles = table.column("title").to_pylist()
        has_text = np.array([title is not None and bool(title.strip()) for title in titles], bool)
        if drop_image is not None:
            has_image = has_image & ~(drop_image & has_text)
        if drop_text is not None:
            has_text = has_text & ~(drop_text & has_image)
        contents = hash_ids(table.column("content_hash")).view(np.int64)
        return Items(np.asarray(rows, np.int64), contents, pixels, has_image, has_text, titles)

    def broken(self, rows: np.ndarray) -> np.ndarray:
        """Of given rows those whose picture is there but cannot be decoded."""
        rows = np.unique(rows)
        return rows[self.catalogue.has_image[rows] & ~self.pictures.take(rows)[1]]


@dataclass(frozen=True)
class GalleryChunks:
    """A worker's part of the items among which retrieval looks, as a ChunkSource: chunk i is its i-th `chunk_items` rows.

    Attributes:
        samples: URI. before_us: only items that existed then. most: a larger catalogue is sampled; None for no limit.
    """

    samples: str
    picture: PictureFormat
    data: Data
    before_us: int
    most: int | None
    seed: int
    rank: int
    num_workers: int
    chunk_items: int = 256

    def rows(self, catalogue: Catalogue) -> np.ndarray:
        """All workers' gallery: catalogue rows, ascending."""
        rows = eligible(catalogue, self.before_us)
        if self.most is not None and len(rows) > self.most:
            rows = np.sort(np.random.default_rng(self.seed).choice(rows, self.most, replace=False))
        return rows

    def num_chunks(self, catalogue: Catalogue) -> int:
        """Of this worker."""
        return -(-len(self.rows(catalogue)[self.rank :: self.num_workers]) // self.chunk_items)

    def open(self) -> Callable[[int], Chunk]:
        catalogue = Catalogue.open(f"{self.samples}/catalogue")
        loader = ItemLoader(catalogue, self.picture, self.data)
        own = self.rows(catalogue)[self.rank :: self.num_workers]

        def make(number: int) -> Chunk:
            return loader.items(own[number * self.chunk_items : (number + 1) * self.chunk_items]).as_chunk()

        return make


def eligible(catalogue: Catalogue, before_us: int) -> np.ndarray:
    """Rows of items with content that existed before a time (microseconds UTC)."""
    return np.flatnonzero((catalogue.has_image | catalogue.has_title) & (catalogue.created_at < before_us))
