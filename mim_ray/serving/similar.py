"""Nearest items in MM space: a snapshot's index (nearest_rows.py), and the items that came since, compared one by one.

    similar = SimilarItems(store, model.items, exact_rows=50_000, recall=0.95)
    similar.start()                                  # builds the index in a thread; until then: UnavailableError
    similar.of_item("i3", top_k=10)                  # -> [Neighbor(item_id, similarity, category), …]
    similar.of_vector(vector, top_k=10, category="mugs")

Items that were replaced or deleted since the snapshot are left out of the index's answers.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from mim_ray.ciubm.vocabulary import ItemIndex
from mim_ray.config.scenario import Serving
from mim_ray.data.ids import Ids
from mim_ray.errors import ConfigError, RequestError, UnavailableError
from mim_ray.representation_center.lookup import EmbeddingLookup
from mim_ray.representation_center.parameter_store import ParameterStore
from mim_ray.serving.nearest_rows import NearestRows
from mim_ray.serving.newer_items import NewerItems
from mim_ray.serving.served import Served

logger = logging.getLogger("ray.serve")
FOLLOW_EVERY_S = 1.0  # how often new items are looked for
_LOOK_EVERY_S = 1.0  # whether the store shows another snapshot
_NICENESS = 10  # of the thread that builds: requests come first


@dataclass(frozen=True)
class Neighbor:
    """An item near another: cosine in [-1, 1], and its category where that is known."""

    item_id: str
    similarity: float
    category: str | None


@dataclass(frozen=True)
class _Searched:
    """What one snapshot needs to be searched. category: (N,) int64, the catalogue's row of each item's category, 0 without one."""

    lookup: EmbeddingLookup
    nearest: NearestRows
    newer: NewerItems
    category: np.ndarray
    catalogue: ItemIndex


class SimilarItems:
    """Searches what `store` shows now.

    Args:
        catalogue: the items that the CTR model knows, with their categories.
        exact_rows, recall: as of `NearestRows.open`.
    """

    def __init__(self, store: ParameterStore, catalogue: ItemIndex, *, exact_rows: int, recall: float) -> None:
        self.store = store
        self._snapshot = store.lookup.snapshot.uri
        self._catalogue = catalogue
        self._exact_rows, self._recall = exact_rows, recall
        self._searched: _Searched | None = None
        self._cannot: ConfigError | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def open(cls, served: Served, serving: Serving, catalogue: ItemIndex) -> SimilarItems:
        """Of what is served, followed in the background; the index is built meanwhile.

        Raises:
            ArtifactError: the snapshot is missing or damaged.
        """
        store = ParameterStore(served.snapshot, table=f"{served.center}/table", window=f"{served.center}/window")
        store.start(every_s=FOLLOW_EVERY_S)
        similar = cls(store, catalogue, exact_rows=serving.exact_search_rows, recall=serving.search_recall)
        similar.start()
        return similar

    def recall(self) -> float:
        """Share of the true nearest items that is found, measured when the index was built; 0 until it is there."""
        searched = self._searched
        return 0.0 if searched is None else searched.nearest.recall

    def show(self, snapshot: str, catalogue: ItemIndex) -> None:
        """Search another snapshot, of this or another encoder version, as soon as its index is there."""
        if snapshot != self._snapshot:
            self._catalogue = catalogue
            self.store.load(snapshot)
            self._snapshot = snapshot

    def start(self) -> None:
        """Build the index in a thread, and again when the store shows another snapshot."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, daemon=True, name="similar-items")
        self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        self.store.stop()

    def refresh(self) -> None:
        """Build, or map, the index of what the store shows, if that is another snapshot than before.

        Raises:
            ConfigError: FAISS is not installed.
        """
        lookup, catalogue = self.store.lookup, self._catalogue
        if self._searched is None or self._searched.lookup is not lookup:
            nearest = NearestRows.open(lookup.snapshot, exact_rows=self._exact_rows, recall=self._recall)
            newer = NewerItems(lookup.overlay, lookup.snapshot, partial(_categories, catalogue))
            rows = _category_rows(catalogue, lookup.snapshot.ids)
            self._searched = _Searched(lookup, nearest, newer, rows, catalogue)

    def of_item(self, item_id: str, top_k: int, *, category: str | None = None) -> list[Neighbor]:
        """The nearest other items, highest cosine first.

        Raises:
            RequestError: (404) an unknown item; (409) one without content.
            UnavailableError: the index is being built. ConfigError: FAISS is not installed.
        """
        searched = self._now()
        found = searched.lookup.get([item_id])
        if not found.matrix[0].any():
            if found.found[0] or searched.catalogue.vocabulary.encode([item_id])[0]:
                raise RequestError(
                    "This item has no embedding: neither its image nor its title could be used, or it was deleted. Post "
                    "it to /v1/items with one of them.",
                    409,
                )
            raise RequestError("There is no item with this id. Check it, or post the item to /v1/items.", 404)
        near = self._near(searched, found.matrix[0], top_k + 1, category)
        return [one for one in near if one.item_id != item_id][:top_k]

    def of_vector(self, vector: np.ndarray, top_k: int, *, category: str | None = None) -> list[Neighbor]:
        """The items nearest to a (D,) vector, highest cosine first.

        Raises:
            UnavailableError: the index is being built. ConfigError: FAISS is not installed.
        """
        return self._near(self._now(), vector, top_k, category)

    def _now(self) -> _Searched:
        searched = self._searched
        if searched is not None:
            return searched
        if self._cannot is not None:
            raise self._cannot
        raise UnavailableError("The index of similar items is being built. Try again in a few seconds.")

    def _near(self, searched: _Searched, vector: np.ndarray, top_k: int, category: str | None) -> list[Neighbor]:
        searched.newer.refresh()
        hidden = searched.newer.hidden
        allowed = None if hidden is None else ~hidden  # (N,)
        if category is not None:
            names = list(searched.catalogue.categories)
            row = names.index(category) + 1 if category in names else -1
            allowed = (searched.category == row) & (True if allowed is None else allowed)
        rows, cosines = searched.nearest.search(vector, top_k, allowed=allowed)
        ids = searched.nearest.snapshot.ids.take(pa.array(rows)).to_pylist()
        found = list(zip(ids, cosines.tolist(), _names(searched.catalogue, searched.category[rows]), strict=True))
        found += searched.newer.nearest(vector, top_k, category)
        found.sort(key=lambda one: -one[1])
        return [Neighbor(*one) for one in found[:top_k]]

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


def _category_rows(catalogue: ItemIndex, ids: Ids) -> np.ndarray:
    return catalogue.category[catalogue.vocabulary.encode(ids)]


def _names(catalogue: ItemIndex, rows: np.ndarray) -> list[str | None]:
    return [catalogue.categories[row - 1] if row else None for row in rows.tolist()]


def _categories(catalogue: ItemIndex, ids: Sequence[str]) -> list[str | None]:
    return _names(catalogue, _category_rows(catalogue, ids))
