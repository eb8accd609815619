"""What pre-training sees: images, titles and pairs of the catalogue, from before the CTR validation starts.

A part of the items, chosen by a hash of their ids, is held out and measured, never trained on. The input of a step is a
function of (seed, phase, rank, P, step) alone, so it can be made anywhere and a resumed run sees the same rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from mim_ray.data.catalogue import Catalogue
from mim_ray.data.decoded import DecodedPictures
from mim_ray.data.feeding import Chunk, json_array, json_value
from mim_ray.data.ids import hash_ids
from mim_ray.data.transforms import PictureFormat
from mim_ray.errors import DataError

PhaseName = Literal["image", "text", "alignment"]
PHASES: tuple[PhaseName, ...] = ("image", "text", "alignment")
HELD_OUT_RATIO = 0.05
MOST_HELD_OUT = 1_024
"""Held-out items that are measured; more would only cost time."""
Batch = Chunk
"""Of one step: rows (B,) int64 of the catalogue; pixels uint8 (B, 3, S, S) and broken (n,) int64, the rows whose pictures
could not be decoded; titles (`titles_in`); keys (B, 2) int64, equal where the title, or the picture, is the same."""
_MOST_DRAWS = 20  # of other rows for pictures that cannot be decoded


@dataclass(frozen=True)
class Items:
    """Rows of the catalogue by use, each (n,) int64."""

    with_image: np.ndarray
    with_title: np.ndarray
    with_both: np.ndarray
    held_out_image: np.ndarray
    held_out_title: np.ndarray
    held_out_both: np.ndarray

    def trained(self, phase: PhaseName) -> np.ndarray:
        """The rows that a phase trains on."""
        return {"image": self.with_image, "text": self.with_title, "alignment": self.with_both}[phase]


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


def titles_of(catalogue: Catalogue, rows: np.ndarray) -> list[str]:
    """Titles by row, empty where missing."""
    return [title or "" for title in catalogue.take(rows, ["title"]).column("title").to_pylist()]


def content_keys(catalogue: Catalogue, rows: np.ndarray) -> np.ndarray:
    """(B, 2) int64: a hash of each row's title and one of its picture's bytes."""
    table = catalogue.take(rows, ["title", "image"])
    titles = [(title or "").encode() for title in table.column("title").to_pylist()]
    keys = [
        [_key(title), _key(image or b"")]
        for title, image in zip(titles, table.column("image").to_pylist(), strict=True)
    ]
    return np.array(keys, np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class Share:
    """Which part of all batches is this worker's: a function of (seed, rank, world) and the step."""

    batch_size: int
    seed: int
    rank: int
    world: int


@dataclass(frozen=True)
class Content:
    """The items to learn from: URI of the catalogue, how its pictures are decoded, and the time (microseconds UTC) before
    which an item must have existed. A process opens it once.
    """

    catalogue: str
    picture: PictureFormat
    max_bytes: int
    max_pixels: int
    before_us: int

    def pictures(self) -> DecodedPictures:
        return _open_pictures(self)

    def items(self) -> Items:
        return _open_items(self)


@lru_cache(maxsize=1)
def _open_pictures(content: Content) -> DecodedPictures:
    return DecodedPictures(Catalogue.open(content.catalogue), content.picture, content.max_bytes, content.max_pixels)


@lru_cache(maxsize=1)
def _open_items(content: Content) -> Items:
    return choose_items(content.pictures().catalogue, content.before_us)


@dataclass(frozen=True)
class BatchSource:
    """The input of one phase for one worker as a ChunkSource (data/feeding.py): chunk i is what step i trains on."""

    content: Content
    phase: PhaseName
    share: Share

    def open(self) -> Callable[[int], Batch]:
        content = self.content
        return Batches(content.pictures(), self.phase, self.share, content.items().trained(self.phase))


class Batches:
    """`batches(step)`, any step in any order. Every epoch is a new order of all items, dealt evenly to the workers; all
    workers have batches of one size.

    Args:
        rows: the items of the phase, (n,) int64.
    """

    def __init__(self, pictures: DecodedPictures, phase: PhaseName, share: Share, rows: np.ndarray) -> None:
        self.catalogue, self.pictures, self.phase, self.share = pictures.catalogue, pictures, phase, share
        self.rows = rows
        self._order, self._order_of = np.zeros(0, np.int64), -1

    def __call__(self, step: int) -> Batch:
        """What `step` trains on.

        Raises:
            DataError: there are no items, or none of those drawn has a picture that can be decoded.
        """
        rows = self.rows_of(step)
        if self.phase == "text":
            return {"rows": rows, "titles": json_array(titles_of(self.catalogue, rows))}
        rows, pixels, broken = self._with_pixels(rows, step)
        batch = {"rows": rows, "pixels": pixels, "broken": broken}
        if self.phase == "alignment":
            batch["titles"] = json_array(titles_of(self.catalogue, rows))
            batch["keys"] = content_keys(self.catalogue, rows)
        return batch

    def rows_of(self, step: int) -> np.ndarray:
        """(B,) rows of `step`, before unusable pictures are replaced.

        Raises:
            DataError: there are no items.
        """
        if not len(self.rows):
            raise DataError(
                "No items are left to train on. See the summary of the samples stage for what was rejected."
            )
        share = self.share
        rank_rows = max(1, len(self.rows) // share.world)
        batch_size = min(share.batch_size, rank_rows)
        epoch, place = divmod(step, rank_rows // batch_size)
        if epoch != self._order_of:
            random = np.random.default_rng([share.seed, PHASES.index(self.phase), epoch])
            self._order, self._order_of = random.permutation(self.rows), epoch
        start = share.rank * rank_rows + place * batch_size
        return self._order[np.arange(start, start + batch_size) % len(self.rows)]

    def _with_pixels(self, rows: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows whose pictures can be decoded, their pixels, and the rows that gave way to others drawn at random."""
        pixels, fine = self.pictures.take(rows)
        if fine.all():
            return rows, pixels, np.zeros(0, np.int64)
        share = self.share
        random = np.random.default_rng([share.seed, PHASES.index(self.phase), share.rank, share.world, step])
        rows, pixels, broken = rows.copy(), pixels.copy(), []
        for _ in range(_MOST_DRAWS):
            bad = np.flatnonzero(~fine)
            if not len(bad):
                break
            broken.append(rows[bad])
            rows[bad] = random.choice(self.rows, len(bad))
            pixels[bad], fine[bad] = self.pictures.take(rows[bad])
        if not fine.all():
            broken.append(rows[~fine])
            if not fine.any():
                raise DataError(
                    f"Of {len(np.unique(np.concatenate(broken)))} pictures drawn for a step of pre-training none could be"
                    " decoded, though the samples stage accepted them. Run the samples stage again."
                )
            good = np.flatnonzero(fine)
            rows[~fine], pixels[~fine] = rows[good[0]], pixels[good[0]]
        return rows, pixels, np.unique(np.concatenate(broken))


def titles_in(batch: Batch) -> list[str]:
    """The titles of a batch."""
    titles: list[str] = json_value(batch["titles"])
    return titles


def _key(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
