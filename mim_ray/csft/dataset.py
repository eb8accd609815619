"""Training batches of exactly N pairs, cut in order from chunks (chunks.py).

`Position` says where the next batch starts, so that a resumed run goes on with the same rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mim_ray.csft.chunks import renumbered
from mim_ray.csft.items import Items
from mim_ray.data.feeding import Chunk, json_value
from mim_ray.errors import DataError


@dataclass(frozen=True)
class Position:
    """Where a worker's next batch starts: number of the chunk, pairs of it already given out."""

    chunk: int = 0
    offset: int = 0


@dataclass(frozen=True)
class PairBatch:
    """N pairs, or a part of such a batch.

    Attributes:
        query_pixels: (N, 3, S, S) uint8.
        groups: N items each: the positives, then the hard negatives if there are any.
        bought: places in the batch and catalogue rows of the users' purchases.
        shown: places in the batch, and the items that those users saw and did not click; None unless asked for.
    """

    query_pixels: np.ndarray
    groups: list[Items]
    bought: tuple[np.ndarray, np.ndarray]
    shown: tuple[np.ndarray, Items] | None

    def __len__(self) -> int:
        return len(self.query_pixels)

    def __getitem__(self, rows: slice) -> PairBatch:
        start, stop, _ = rows.indices(len(self))
        wanted = np.arange(start, stop)
        shown = None
        if self.shown is not None:
            inside = np.flatnonzero((self.shown[0] >= start) & (self.shown[0] < stop))
            shown = (self.shown[0][inside] - start, self.shown[1][inside])
        bought = renumbered(self.bought, wanted, len(self))
        return PairBatch(self.query_pixels[rows], [group[rows] for group in self.groups], bought, shown)

    @staticmethod
    def of_chunk(chunk: Chunk) -> PairBatch:
        def items(prefix: str) -> Items:
            start = len(prefix) + 1
            return Items.of_chunk({key[start:]: value for key, value in chunk.items() if key.startswith(f"{prefix}.")})

        groups = [items(name) for name in ("items0", "items1") if f"{name}.rows" in chunk]
        shown = (chunk["shown_place"], items("shown")) if "shown_place" in chunk else None
        return PairBatch(chunk["query_pixels"], groups, (chunk["bought_place"], chunk["bought_row"]), shown)

    @staticmethod
    def joined(parts: list[PairBatch]) -> PairBatch:
        starts = np.cumsum([0, *(len(part) for part in parts)])[:-1]
        placed = list(zip(parts, starts, strict=True))
        shown = None
        if parts[0].shown is not None:
            found = [(part.shown, start) for part, start in placed if part.shown is not None]
            shown = (
                np.concatenate([places + start for (places, _), start in found]),
                Items.joined([items for (_, items), _ in found]),
            )
        return PairBatch(
            np.concatenate([part.query_pixels for part in parts]),
            [Items.joined(list(group)) for group in zip(*(part.groups for part in parts), strict=True)],
            (
                np.concatenate([part.bought[0] + start for part, start in placed]),
                np.concatenate([part.bought[1] for part in parts]),
            ),
            shown,
        )


class PairBatches:
    """Batches of exactly N pairs cut from a stream of chunks.

    Attributes:
        position: where the next batch starts.
        rejects: what could not be used so far, each key once, 10,000 at most; num_rejected counts by reason.
        num_other_category: hard negatives so far that could not come from the positive's category.
    """

    _MOST_REJECTS = 10_000

    def __init__(self, chunks: Iterator[Chunk], position: Position, batch_size: int, chunks_per_epoch: int) -> None:
        self.position = position
        self.rejects: dict[str, str] = {}
        self.num_other_category = 0
        self._chunks, self._batch_size, self._per_epoch = chunks, batch_size, chunks_per_epoch
        self._numbers = position.chunk
        self._held: list[tuple[Position, PairBatch]] = []
        self._empty_chunks = 0

    def next(self) -> PairBatch:
        """
        Raises:
            DataError: a whole epoch had no usable pair.
        """
        while sum(len(pairs) for _, pairs in self._held) < self._batch_size:
            self._take_chunk()
        parts, missing = [], self._batch_size
        while missing:
            at, pairs = self._held.pop(0)
            parts.append(pairs[:missing])
            given = len(parts[-1])
            if len(pairs) > missing:
                self._held.insert(0, (Position(at.chunk, at.offset + given), pairs[missing:]))
            self.position = Position(at.chunk, at.offset + given)
            missing -= given
        return PairBatch.joined(parts)

    def _take_chunk(self) -> None:
        chunk = next(self._chunks)
        at = Position(self._numbers, self.position.offset if self._numbers == self.position.chunk else 0)
        self._numbers += 1
        self.num_other_category += int(chunk["num_other_category"][0])
        for key, reason in json_value(chunk["rejects"]):
            if len(self.rejects) < self._MOST_REJECTS:
                self.rejects[key] = reason
        pairs = PairBatch.of_chunk(chunk)
        self._empty_chunks = 0 if len(pairs) else self._empty_chunks + 1
        if self._empty_chunks >= self._per_epoch:
            counts = sorted(Counter(self.rejects.values()).items())
            raise DataError(
                "No interest pair can be trained on: "
                + (", ".join(f"{n} with {reason}" for reason, n in counts) or "none of the wanted signal")
                + ". See csft.supervision, and samples.pair_events for which events make pairs."
            )
        self._held.append((at, pairs[at.offset :]))
