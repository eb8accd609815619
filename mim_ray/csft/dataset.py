"""Interest pairs as training batches: query image, purchased item, hard negative, decoded and tokenized.

A batch is a function of (seed, rank, P, step): rows come from RowBatches, those that cannot be used (held out, another
signal, no query image, nothing to embed the item from) are left out, and the rest is cut into batches of exactly N pairs.
`Position` says where the next batch starts, so that a resumed run goes on with the same rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from mim_ray.config.scenario import Data
from mim_ray.csft.negatives import HardNegativeSampler
from mim_ray.csft.purchases import Purchases
from mim_ray.data.batches import RowBatches, ordered_batches, prefetch
from mim_ray.data.catalogue import Catalogue
from mim_ray.data.ids import hash_ids, mix
from mim_ray.data.transforms import decode_images
from mim_ray.encoders import ItemEncoder
from mim_ray.errors import DataError

PAIR_COLUMNS = ["query_image", "query_item_id", "item_id", "signal", "timestamp", "user_id"]
Signal = Literal["purchase", "click", "any"]
_CACHE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Pairs:
    """Usable pairs with their decoded query pictures. All arrays have one row per pair.

    Attributes:
        pixels: (n, 3, S, S) uint8. items: catalogue row of the item. users: uint64 hash.
        query_items: catalogue row of the item whose picture is the query, -1 when the query is a picture of its own.
    """

    pixels: np.ndarray
    items: np.ndarray
    users: np.ndarray
    query_items: np.ndarray

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, rows: slice) -> Pairs:
        return Pairs(self.pixels[rows], self.items[rows], self.users[rows], self.query_items[rows])

    @staticmethod
    def joined(parts: list[Pairs]) -> Pairs:
        return Pairs(
            np.concatenate([part.pixels for part in parts]),
            np.concatenate([part.items for part in parts]),
            np.concatenate([part.users for part in parts]),
            np.concatenate([part.query_items for part in parts]),
        )


@dataclass(frozen=True)
class ItemBatch:
    """Items ready for the encoder: rows, contents (n,) int64; pixels (n, 3, S, S) uint8; tokens (n, T); flags (n,) bool."""

    rows: Tensor
    contents: Tensor
    pixels: Tensor
    has_image: Tensor
    tokens: dict[str, Tensor]
    has_text: Tensor


@dataclass(frozen=True)
class Position:
    """Where a worker's next batch starts: epoch, step of RowBatches in it, usable pairs of that step already given out."""

    epoch: int = 0
    step: int = 0
    offset: int = 0


@dataclass(frozen=True)
class PairBatch:
    """N pairs; items are the N positives, then the N hard negatives if there are any.

    Attributes:
        bought: places in the batch and catalogue rows of the users' purchases.
        next: where the batch after this one starts.
        num_other_category: hard negatives that could not come from the positive's category.
    """

    query_pixels: Tensor
    items: ItemBatch
    bought: tuple[Tensor, Tensor]
    next: Position
    num_other_category: int


class ItemLoader:
    """Catalogue rows to encoder input; decoded pictures stay in memory where all of them fit 512 MB."""

    def __init__(self, catalogue: Catalogue, encoder: ItemEncoder, data: Data) -> None:
        self.catalogue = catalogue
        self._tokenize = encoder.text.tokenize
        self._size, self._resize = encoder.image_size, encoder.resize
        self._limits = (data.max_image_bytes, data.max_image_pixels)
        self._kept: np.ndarray | None = None
        if catalogue.num_items * 3 * self._size**2 <= _CACHE_BYTES:
            self._kept = np.empty((catalogue.num_items, 3, self._size, self._size), np.uint8)
        self._state = np.zeros(catalogue.num_items, np.int8)  # 0 not decoded yet, 1 decoded, 2 no usable picture

    def items(
        self, rows: np.ndarray, *, drop_image: np.ndarray | None = None, drop_text: np.ndarray | None = None
    ) -> ItemBatch:
        """Args: rows: (n,). drop_image, drop_text: (n,) bool, items that are to be seen without their picture (title)."""
        table = self.catalogue.take(rows, ["title", "content_hash"])
        pixels, has_image = self.pictures(rows)
        titles = table.column("title").to_pylist()
        has_text = np.array([title is not None and bool(title.strip()) for title in titles], bool)
        if drop_image is not None:
            has_image = has_image & ~(drop_image & has_text)
        if drop_text is not None:
            has_text = has_text & ~(drop_text & has_image)
        return ItemBatch(
            torch.from_numpy(rows),
            torch.from_numpy(hash_ids(table.column("content_hash")).view(np.int64)),
            torch.from_numpy(pixels),
            torch.from_numpy(has_image),
            self._tokenize(titles),
            torch.from_numpy(has_text),
        )

    def pictures(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (n, 3, S, S), anything where there is none, and (n,) bool."""
        if self._kept is None:
            return self._decode_rows(rows)
        missing = np.unique(rows[self._state[rows] == 0])
        if len(missing):
            self._kept[missing], usable = self._decode_rows(missing)
            self._state[missing] = np.where(usable, 1, 2)
        return self._kept[rows], self._state[rows] == 1

    def decode(self, images: list[bytes | None]) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (n, 3, S, S) and (n,) bool of encoded pictures."""
        return decode_images(images, self._size, self._resize, *self._limits)

    def _decode_rows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.decode(self.catalogue.take(rows, ["image"]).column("image").to_pylist())


class PairSource:
    """The usable pairs of a table of pairs, split into those to train on and those held out.

    Args:
        held_out_ratio: part of the pairs, chosen by a hash of user, item and time, that is never trained on.
        rejected: counts why pairs were left out, by reason.
    """

    def __init__(self, loader: ItemLoader, *, signal: Signal, held_out_ratio: float) -> None:
        self.loader = loader
        self._signal, self._held_out_ratio = signal, held_out_ratio
        catalogue = loader.catalogue
        self._has_content = catalogue.has_image | catalogue.has_title
        self.rejected: Counter[str] = Counter()

    def usable(self, table: pa.Table, *, held_out: bool) -> Pairs:
        """The pairs of `table` (PAIR_COLUMNS) that are of the wanted part and can be used."""
        catalogue = self.loader.catalogue
        wanted = self._is_held_out(table) == held_out
        if self._signal != "any":
            wanted &= np.asarray(pc.fill_null(pc.equal(table.column("signal"), self._signal), False))
        table = table.filter(pa.array(wanted))
        items = catalogue.rows(table.column("item_id"))
        query_items = catalogue.rows(table.column("query_item_id"))
        known = items >= 0
        with_content = known & self._has_content[np.maximum(items, 0)]
        images = table.column("query_image").to_pylist()
        pixels, has_query = self.loader.decode(images)
        own = np.array([image is not None for image in images], bool)
        from_item = np.flatnonzero(~own & (query_items >= 0))
        if len(from_item):
            pixels[from_item], has_query[from_item] = self.loader.pictures(query_items[from_item])
        query_items[own] = -1
        self._count("unknown item", ~known)
        self._count("item without content", known & ~with_content)
        self._count("query image corrupt", with_content & own & ~has_query)
        self._count("no query image", with_content & ~own & ~has_query)
        keep = np.flatnonzero(with_content & has_query)
        return Pairs(pixels[keep], items[keep], hash_ids(table.column("user_id"))[keep], query_items[keep])

    def held_out(self, pairs: str, most: int) -> Pairs | None:
        """The first `most` held-out pairs of the table at a URI; None if there are none."""
        parts: list[Pairs] = []
        for table in ordered_batches(pairs, PAIR_COLUMNS, 4_096, read_ahead=False):
            parts.append(self.usable(table, held_out=True))
            if sum(map(len, parts)) >= most:
                break
        joined = Pairs.joined(parts)[:most] if parts else None
        return joined if joined is not None and len(joined) else None

    def _is_held_out(self, table: pa.Table) -> np.ndarray:
        time = np.asarray(table.column("timestamp").cast(pa.int64()).fill_null(0)).astype(np.uint64)
        key = mix(hash_ids(table.column("user_id")) ^ mix(hash_ids(table.column("item_id")) ^ mix(time)))
        share: np.ndarray = (key >> np.uint64(11)).astype(np.float64) * 2.0**-53 < self._held_out_ratio
        return share

    def _count(self, reason: str, rows: np.ndarray) -> None:
        if rows.any():
            self.rejected[reason] += int(rows.sum())


class PairBatches:
    """Training batches of one worker.

    Args:
        hard_negatives: None for none.
        modality_dropout: chance that an item is seen without its picture, and likewise its title (never without both).
    """

    def __init__(
        self,
        source: PairSource,
        rows: RowBatches,
        purchases: Purchases,
        hard_negatives: HardNegativeSampler | None,
        *,
        batch_size: int,
        modality_dropout: float,
        seed: int,
        rank: int,
    ) -> None:
        self._source, self._rows, self._purchases = source, rows, purchases
        self._hard_negatives, self._batch_size = hard_negatives, batch_size
        self._dropout, self._seed, self._rank = modality_dropout, seed, rank

    def steps(self, num_steps: int, start_step: int = 0, position: Position | None = None) -> Iterator[PairBatch]:
        """Batches `start_step` to `num_steps` − 1, made ahead in a thread; `position` is where `start_step` begins."""
        return prefetch(self._steps(num_steps, start_step, position or Position()))

    def _steps(self, num_steps: int, start_step: int, position: Position) -> Iterator[PairBatch]:
        chunks = self._chunks(position)
        held: list[tuple[Position, Pairs]] = []
        for step in range(start_step, num_steps):
            while sum(len(pairs) for _, pairs in held) < self._batch_size:
                held.append(next(chunks))
            parts, missing = [], self._batch_size
            while missing:
                at, pairs = held.pop(0)
                parts.append(pairs[:missing])
                if len(pairs) > missing:
                    held.insert(0, (replace(at, offset=at.offset + missing), pairs[missing:]))
                following = replace(at, offset=at.offset + len(parts[-1]))
                missing -= len(parts[-1])
            yield self._batch(Pairs.joined(parts), step, following)

    def _batch(self, pairs: Pairs, step: int, following: Position) -> PairBatch:
        random = np.random.default_rng([self._seed, 3, self._rank, step])
        bought = self._purchases.of(pairs.users)
        rows, num_other = pairs.items, 0
        if self._hard_negatives is not None:
            drawn = self._hard_negatives.draw(pairs.items, bought, random)
            rows, num_other = np.concatenate([rows, drawn.rows]), drawn.num_other_category
        drop_image, drop_text = random.random((2, len(rows))) < self._dropout
        items = self._source.loader.items(rows, drop_image=drop_image, drop_text=drop_text)
        return PairBatch(
            torch.from_numpy(pairs.pixels),
            items,
            (torch.from_numpy(bought[0]), torch.from_numpy(bought[1])),
            following,
            num_other,
        )

    def _chunks(self, position: Position) -> Iterator[tuple[Position, Pairs]]:
        """Usable pairs of one RowBatches step after the other, over the epochs."""
        epoch, step, skip = position.epoch, position.step, position.offset
        while True:
            whole, found = step == 0, skip
            for table in self._rows.epoch(epoch, step):
                pairs = self._source.usable(table, held_out=False)
                yield Position(epoch, step, skip), pairs[skip:]
                found += len(pairs)
                step, skip = step + 1, 0
            if whole and not found:
                raise DataError(
                    "No interest pair can be trained on: "
                    + (", ".join(f"{n} with {reason}" for reason, n in sorted(self._source.rejected.items())) or "none")
                    + ". See csft.supervision, and samples.pair_events for which events make pairs."
                )
            epoch, step = epoch + 1, 0
