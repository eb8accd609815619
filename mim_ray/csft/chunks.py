"""Interest pairs in chunks: query image, purchased item, hard negative, decoded. Runs where pictures are decoded: no torch.

A chunk is what one decoding task makes: about 64 pairs of the worker's row order (data/batches.py), without those that
cannot be used (held out, another signal, no query image, nothing to embed an item from), with a hard negative for each.
Everything in it follows from (seed, rank, P, number). dataset.py cuts batches from the chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mim_ray.config.scenario import Csft, Data
from mim_ray.csft.hard_negatives import HardNegativeSampler, hard_negative_weights
from mim_ray.csft.items import ItemLoader, eligible
from mim_ray.csft.training_pairs import CHOICE_COLUMNS, chosen, open_counts
from mim_ray.csft.user_items import UserItems
from mim_ray.data.batches import RowBatches, ordered_batches
from mim_ray.data.catalogue import Catalogue
from mim_ray.data.feeding import Chunk, json_array
from mim_ray.data.ids import hash_ids
from mim_ray.data.transforms import PictureFormat

PAIR_COLUMNS = ["query_image", "query_item_id", *CHOICE_COLUMNS]
CHUNK_PAIRS = 64
Reject = tuple[str, str]
"""Key of a row that cannot be used, and the reason."""


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

    def __getitem__(self, rows: slice | np.ndarray) -> Pairs:
        return Pairs(self.pixels[rows], self.items[rows], self.users[rows], self.query_items[rows])


class PairReader:
    """Rows of the pairs table to usable pairs, either those to train on or those held out."""

    def __init__(self, loader: ItemLoader, settings: Csft) -> None:
        self._loader, self._settings = loader, settings
        catalogue = loader.catalogue
        self._has_content = catalogue.has_image | catalogue.has_title

    def usable(self, table: pa.Table, *, held_out: bool) -> tuple[Pairs, list[Reject]]:
        """The pairs of `table` (PAIR_COLUMNS) that are of the wanted part and can be used, and the others of that part."""
        catalogue = self._loader.catalogue
        table = table.filter(pa.array(chosen(table, self._settings, held_out=held_out)))
        items = catalogue.rows(table.column("item_id"))
        query_items = catalogue.rows(table.column("query_item_id"))
        known = items >= 0
        with_content = known & self._has_content[np.maximum(items, 0)]
        images = table.column("query_image").to_pylist()
        pixels, has_query = self._loader.pictures.decode(images)
        own = np.array([image is not None for image in images], bool)
        from_item = np.flatnonzero(~own & (query_items >= 0))
        if len(from_item):
            pixels[from_item], has_query[from_item] = self._loader.pictures.take(query_items[from_item])
        query_items[own] = -1
        reasons = np.full(len(items), "", object)
        reasons[~known] = "unknown item"
        reasons[known & ~with_content] = "item without content"
        reasons[with_content & ~has_query] = np.where(own, "query image corrupt", "no query image")[
            with_content & ~has_query
        ]
        bad = np.flatnonzero(reasons != "")
        rows = table.select(["user_id", "item_id", "timestamp"]).take(pa.array(bad)).to_pylist()
        rejects = [
            (f"{row['user_id']} {row['item_id']} {row['timestamp']}", str(reason))
            for row, reason in zip(rows, reasons[bad], strict=True)
        ]
        pairs = Pairs(pixels, items, hash_ids(table.column("user_id")), query_items)
        return pairs[np.flatnonzero(reasons == "")], rejects

    def held_out(self, pairs: str, most: int) -> Pairs | None:
        """The first `most` held-out pairs of the table at a URI; None if there are none."""
        parts: list[Pairs] = []
        for table in ordered_batches(pairs, PAIR_COLUMNS, 4_096, read_ahead=False):
            parts.append(self.usable(table, held_out=True)[0])
            if sum(map(len, parts)) >= most:
                break
        if not sum(map(len, parts)):
            return None
        names = ("pixels", "items", "users", "query_items")
        return Pairs(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))[:most]


@dataclass(frozen=True)
class PairChunks:
    """One worker's training pairs as a ChunkSource (data/feeding.py).

    Attributes:
        samples: URI of the samples. user_items: URI of bought/ and, for binary losses, shown/ (UserItems).
        pair_counts: URI of the items' numbers of training pairs (training_pairs.py), for hard negatives.
        before_us: hard negatives are items that existed then (microseconds UTC).
    """

    samples: str
    user_items: str
    pair_counts: str
    settings: Csft
    data: Data
    picture: PictureFormat
    before_us: int
    seed: int
    rank: int
    num_workers: int

    def rows(self) -> RowBatches:
        """The worker's row order; its steps are the chunks of an epoch."""
        pairs = f"{self.samples}/interest_pairs"
        return RowBatches(pairs, PAIR_COLUMNS, CHUNK_PAIRS, self.seed, self.rank, self.num_workers)

    def open(self) -> Callable[[int], Chunk]:
        catalogue = Catalogue.open(f"{self.samples}/catalogue")
        loader = ItemLoader(catalogue, self.picture, self.data)
        reader, rows = PairReader(loader, self.settings), self.rows()
        bought = UserItems.open(f"{self.user_items}/bought")
        shown = UserItems.open(f"{self.user_items}/shown") if self.settings.supervision.endswith("-binary") else None
        hard = None
        if self.settings.draws_hard_negatives:
            weights = hard_negative_weights(open_counts(self.pair_counts), self.settings.hard_negative_power)
            hard = HardNegativeSampler.of_catalogue(catalogue, eligible(catalogue, self.before_us), weights)

        def make(number: int) -> Chunk:
            epoch, step = divmod(number, rows.steps_per_epoch)
            pairs, rejects = reader.usable(rows.batch(epoch, step), held_out=False)
            random = np.random.default_rng([self.seed, 3, self.rank, number])
            return self._chunk(pairs, rejects, loader, bought, shown, hard, random)

        return make

    def _chunk(
        self,
        pairs: Pairs,
        rejects: list[Reject],
        loader: ItemLoader,
        bought: UserItems,
        shown: UserItems | None,
        hard: HardNegativeSampler | None,
        random: np.random.Generator,
    ) -> Chunk:
        owned = bought.of(pairs.users)
        groups, num_other = [pairs.items], 0
        if hard is not None:
            drawn = hard.draw(pairs.items, owned, random)
            groups.append(drawn.rows)
            num_other = drawn.num_other_category
        rejects = rejects + [
            (name, "image corrupt")
            for name in loader.catalogue.ids.take(pa.array(loader.broken(np.concatenate(groups)))).to_pylist()
        ]
        drop = random.random((2, len(groups), len(pairs))) < self.settings.modality_dropout
        items = [
            loader.items(rows, drop_image=drop[0, group], drop_text=drop[1, group]) for group, rows in enumerate(groups)
        ]
        whole = np.flatnonzero(np.all([part.has_image | part.has_text for part in items], axis=0))
        place, row = renumbered(owned, whole, len(pairs))
        chunk = {
            "query_pixels": pairs.pixels[whole],
            "bought_place": place,
            "bought_row": row,
            "num_other_category": np.array([num_other]),
            "rejects": json_array(rejects),
        }
        for group, part in enumerate(items):
            chunk |= {f"items{group}.{name}": array for name, array in part[whole].as_chunk().items()}
        if shown is not None:
            seen, rows = shown.draw(pairs.users[whole], random)
            kept = loader.items(rows)
            fine = np.flatnonzero(kept.has_image | kept.has_text)
            chunk |= {"shown_place": seen[fine]}
            chunk |= {f"shown.{name}": array for name, array in kept[fine].as_chunk().items()}
        return chunk


def renumbered(owned: tuple[np.ndarray, np.ndarray], kept: np.ndarray, num_pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """(place, row) of `kept` places only, counted from 0 among them."""
    new = np.full(num_pairs, -1, np.int64)
    new[kept] = np.arange(len(kept))
    place = new[owned[0]]
    return place[place >= 0], owned[1][place >= 0]
