"""Nearest items in MM space: a snapshot's index (nearest_rows.py), and the items that came since, compared one by one.

    similar = SimilarItems(lambda: rollout.current, exact_rows=50_000, recall=0.95)
    similar.start()                                  # builds the index in a thread; until then: UnavailableError
    similar.of_item("i3", top_k=10).items            # [Neighbor(item_id, similarity, category), …]
    similar.of_vector(vector, 10, encoder_version, category="mugs")

Items that were replaced or deleted since the snapshot are left out of the index's answers. When another release serves, or a newer
snapshot of this one, its index is built while the one before still answers, and still takes in new items. Since an index takes
minutes to build for millions of items, a newer snapshot is waited with until what came since the old one is a share of it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from mim_ray.ciubm.vocabulary import ItemIndex
from mim_ray.data.ids import Ids
from mim_ray.errors import ConfigError, RequestError, UnavailableError
from mim_ray.representation_center.lookup import STORAGE_PROBLEMS, EmbeddingLookup
from mim_ray.representation_center.parameter_store import ParameterStore
from mim_ray.serving.loaded import Loaded, LocalRows
from mim_ray.serving.nearest_rows import NearestRows
from mim_ray.serving.newer_items import NewerItems

logger = logging.getLogger("ray.serve")
FOLLOW_EVERY_S = 1.0  # how often new items are looked for, where the ranker itself leaves that to parameter machines
LOOK_AGAIN_S = 0.1  # where nobody else follows what comes; so often at most
_LOOK_EVERY_S = 1.0  # whether another release serves
FEW_NEWER, NEWER_SHARE = 1_000, 0.02  # rows since the indexed snapshot that are worth another index
_NICENESS = 10  # of the thread that builds: requests come first


@dataclass(frozen=True)
class Neighbor:
    """An item near another: cosine in [-1, 1], and its category where that is known."""

    item_id: str
    similarity: float
    category: str | None


@dataclass(frozen=True)
class Found:
    """Highest cosine first, and the version of the embeddings that were compared."""

    items: list[Neighbor]
    encoder_version: str


class SimilarItems:
    """Searches what is served.

    Args:
        current: the release that serves now.
        exact_rows, recall: as of `NearestRows.open`.
    """

    def __init__(self, current: Callable[[], Loaded], *, exact_rows: int, recall: float) -> None:
        self._current = current
        self._exact_rows, self._recall = exact_rows, recall
        self._searched: _Searched | None = None
        self._cannot: ConfigError | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def recall(self) -> float:
        """Share of the true nearest items that is found, measured when the index was built; 0 until it is there."""
        searched = self._searched
        return 0.0 if searched is None else searched.nearest.recall

    def start(self) -> None:
        """Build the index in a thread, and again when another release serves."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, daemon=True, name="similar-items")
        self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        if self._searched is not None:
            self._searched.close()

    def refresh(self) -> None:
        """Build, or map, the index of what is served, if that is another release than before, or a newer snapshot with enough
        rows more.

        Raises:
            ConfigError: FAISS is not installed. ArtifactError: the snapshot is missing or damaged.
        """
        loaded, before = self._current(), self._searched
        if before is None or before.loaded is not loaded or before.is_old:
            self._searched = _Searched.open(loaded, self._exact_rows, self._recall)
            if before is not None:
                before.close()

    def of_item(self, item_id: str, top_k: int, *, category: str | None = None) -> Found:
        """The nearest other items.

        Raises:
            RequestError: (404) an unknown item; (409) one without content.
            UnavailableError: the index is being built. ConfigError: FAISS is not installed.
        """
        searched = self._now()
        vector = searched.vector(item_id)
        near = searched.near(vector, top_k + 1, category)
        return Found([one for one in near if one.item_id != item_id][:top_k], searched.lookup.encoder_version)

    def of_vector(self, vector: np.ndarray, top_k: int, encoder_version: str, *, category: str | None = None) -> Found:
        """The items nearest to a (D,) vector that this encoder version made.

        Raises:
            UnavailableError: the index is being built, or is another version's. ConfigError: FAISS is not installed.
        """
        searched = self._now()
        version = searched.lookup.encoder_version
        if version != encoder_version:
            raise UnavailableError(
                f"The encoder is {encoder_version} and the items were embedded by {version}: a release is being rolled out. "
                "Try again."
            )
        return Found(searched.near(vector, top_k, category), version)

    def _now(self) -> _Searched:
        searched = self._searched
        if searched is not None:
            return searched
        if self._cannot is not None:
            raise self._cannot
        raise UnavailableError("The index of similar items is being built. Try again in a few seconds.")

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)  # Linux: of this thread alone
        while True:
            try:
                self.refresh()
            except ConfigError as error:
                self._cannot = error
                logger.warning("%s", error)
                return
            except Exception:  # a full disk, storage away: rankings go on, and it is tried again
                logger.exception("the index of similar items could not be built; it is tried again")
            if self._stop.wait(_LOOK_EVERY_S):
                return


@dataclass(frozen=True)
class _Searched:
    """One release, open for searching.

    Attributes:
        store: its embeddings; the ranker's own, or one opened for this where the ranker has none (`owned`).
        lookup: what the index belongs to; the store may read a newer snapshot by now.
        names: categories. category: (N,) place of each item's in `names`, counted from 1; 0 without one.
    """

    loaded: Loaded
    store: ParameterStore
    owned: bool
    lookup: EmbeddingLookup
    nearest: NearestRows
    newer: NewerItems
    names: list[str]
    category: np.ndarray
    looking: threading.Lock = field(default_factory=threading.Lock)
    looked_ns: list[int] = field(default_factory=lambda: [0])  # when the last look for an unknown item began

    @classmethod
    def open(cls, loaded: Loaded, exact_rows: int, recall: float) -> _Searched:
        served, owned = loaded.served, not isinstance(loaded.rows, LocalRows)
        if isinstance(loaded.rows, LocalRows):
            store = loaded.rows.store
        else:
            store = ParameterStore(served.snapshot, table=f"{served.center}/table", window=f"{served.center}/window")
        lookup, items = store.lookup, loaded.model.items
        nearest = NearestRows.open(lookup.snapshot, exact_rows=exact_rows, recall=recall)
        newer = NewerItems(lookup.overlay, lookup.snapshot, lambda ids: _names(items, ids))
        if owned:
            store.start(every_s=FOLLOW_EVERY_S)
        return cls(loaded, store, owned, lookup, nearest, newer, *_categories(items, lookup))

    @property
    def is_old(self) -> bool:
        """Whether the store reads a newer snapshot, and it is worth an index."""
        enough = max(FEW_NEWER, NEWER_SHARE * self.lookup.snapshot.num_rows)
        return self.store.lookup is not self.lookup and self.lookup.overlay.num_rows >= enough

    def close(self) -> None:
        if self.owned:
            self.store.stop()

    def vector(self, item_id: str) -> np.ndarray:
        """(D,). Raises: RequestError as `SimilarItems.of_item`."""
        found = self.lookup.get([item_id])
        if not found.found[
            0
        ]:  # posted a moment ago? It may be folded into the table already, which followers see later
            self._look_now()
            found = self.lookup.get([item_id])
        if found.matrix[0].any():
            return np.asarray(found.matrix[0])
        if found.found[0] or self.loaded.model.items.vocabulary.encode([item_id])[0]:
            raise RequestError(
                "This item has no embedding: neither its image nor its title could be used, or it was deleted. Post it to "
                "/v1/items with one of them.",
                409,
            )
        raise RequestError("There is no item with this id. Check it, or post the item to /v1/items.", 404)

    def near(self, vector: np.ndarray, top_k: int, category: str | None) -> list[Neighbor]:
        if not self.store.follows(self.lookup) and self.lookup.behind_s > LOOK_AGAIN_S:
            with self.looking:
                if self.lookup.behind_s > LOOK_AGAIN_S:  # nobody has looked while this one waited
                    self._look()  # the index of what took its place is being built
        self.newer.refresh()
        newest, hidden = self.newer.nearest(
            vector, top_k, category
        )  # of one moment: no item in two ways, and none in neither
        allowed = None if hidden is None else ~hidden  # (N,)
        if category is not None:
            row = self.names.index(category) + 1 if category in self.names else -1
            allowed = (self.category == row) & (True if allowed is None else allowed)
        rows, cosines = self.nearest.search(vector, top_k, allowed=allowed)
        ids = self.nearest.snapshot.ids.take(pa.array(rows)).to_pylist()
        names = [self.names[row - 1] if row else None for row in self.category[rows].tolist()]
        found = list(zip(ids, cosines.tolist(), names, strict=True))
        found += newest
        found.sort(key=lambda one: -one[1])
        return [Neighbor(*one) for one in found[:top_k]]

    def _look_now(self) -> None:
        """Look at window and table: one look at a time, which serves all who asked before it began."""
        asked = time.monotonic_ns()
        with self.looking:
            if self.looked_ns[0] < asked:
                self.looked_ns[0] = time.monotonic_ns()
                self._look(now=True)

    def _look(self, *, now: bool = False) -> None:
        """Take in what came since. Where storage is away, what is known is searched."""
        try:
            self.lookup.refresh(now=now)
        except STORAGE_PROBLEMS as error:
            logger.warning("similar items are those of %.0f s ago: %s", self.lookup.behind_s, error)


def _categories(items: ItemIndex, lookup: EmbeddingLookup) -> tuple[list[str], np.ndarray]:
    """Names, and the place of each row's: the catalogue's, or what a message named before the snapshot was made."""
    names = list(items.categories)
    category = items.category[items.vocabulary.encode(lookup.snapshot.ids)]
    if lookup.named:
        place = {name: number for number, name in enumerate(names, start=1)}
        rows = lookup.snapshot.lookup(list(lookup.named))
        for row, name in zip(rows.tolist(), lookup.named.values(), strict=True):
            if row >= 0:
                category[row] = place.setdefault(name, len(place) + 1)
        names = list(place)
    return names, category


def _names(items: ItemIndex, ids: Ids) -> Sequence[str | None]:
    rows = items.category[items.vocabulary.encode(ids)]
    return [items.categories[row - 1] if row else None for row in rows.tolist()]
