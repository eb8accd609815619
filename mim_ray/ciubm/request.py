"""A ranking request as the network's input: what all candidates share is there once (batch.py), whatever their number.

request = ranker.request("u1", behaviors, candidates)
vectors, found, names = multi_get(request.keys)
batch = request.batch(vectors, found, names)
prob = ranker.predict(batch)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mim_ray.ciubm.dataset import IndexedBatch
from mim_ray.ciubm.features import FeatureBatch, table_name


@dataclass(frozen=True)
class Request:
    """The l behaviors and C candidates of one user, as rows of the model's tables.

    Attributes:
        ids: behaviors, then candidates. keys: the same as large strings, for lookups. num_behaviors: l.
        known: (l + C,) bool: the model's catalogue has the item.
        item_row, category: (l + C,) rows of the item and category tables, 0 unknown.
        user: (1,) row of the user table.
        category_rows: by name: of items that are newer than the model, whose category comes with their embedding.
        content_width: D, None for a model without content.
        behavior_age_s: (1, L). features: of the candidates. query_mm: (1, D). None where the model has none.
    """

    ids: list[str]
    keys: pa.Array
    num_behaviors: int
    known: np.ndarray
    item_row: np.ndarray
    category: np.ndarray
    user: np.ndarray
    category_rows: Mapping[str, int]
    content_width: int | None
    behavior_age_s: np.ndarray | None = None
    features: FeatureBatch | None = None
    query_mm: np.ndarray | None = None

    @property
    def num_candidates(self) -> int:
        """C."""
        return len(self.ids) - self.num_behaviors

    @property
    def unknown(self) -> np.ndarray:
        """(C,) bool: the model has no ID embedding of its own for the candidate."""
        return np.asarray(self.item_row[self.num_behaviors :] == 0)

    def rows(self, *, with_user: bool) -> dict[str, Tensor]:
        """Rows by table name that `batch` will ask for, those of the category table apart: a new item's is not known yet."""
        rows = {"item": torch.from_numpy(self.item_row)}
        if with_user:
            rows["user"] = torch.from_numpy(self.user)
        if self.features is not None:
            rows |= {table_name(name): values.rows for name, values in self.features.values.items()}
        return rows

    def batch(
        self,
        vectors: np.ndarray | None = None,
        found: np.ndarray | None = None,
        names: Sequence[str | None] | None = None,
    ) -> IndexedBatch:
        """
        Args:
            vectors: (l + C, D) MM embeddings of `ids`. found: (l + C,) bool. None: no item has content.
            names: (l + C,) categories of items that came after the catalogue.
        """
        category = self.category
        if names is not None and not self.known.all():
            category = category.copy()
            for place in np.flatnonzero(~self.known).tolist():
                category[place] = self.category_rows.get(names[place] or "", 0)
        mm = None
        if self.content_width is not None:
            if vectors is None or found is None:
                mm = np.zeros((len(self.ids), self.content_width), np.float32)
            else:
                mm = vectors.astype(np.float32, copy=False)
                if not found.all():
                    mm = np.where(found[:, None], mm, np.float32(0.0))
        length = max(self.num_behaviors, 1)
        ages, query = self.behavior_age_s, self.query_mm
        return IndexedBatch(
            user=torch.from_numpy(self.user),
            item_row=torch.from_numpy(self.item_row),
            category=torch.from_numpy(category),
            mm=None if mm is None else torch.from_numpy(mm),
            target=torch.arange(self.num_behaviors, len(self.ids)),
            behaviors=torch.arange(length).unsqueeze(0),
            behavior_mask=torch.full((1, length), self.num_behaviors > 0),
            label=None,
            behavior_age_s=None if ages is None else torch.from_numpy(ages),
            features=self.features,
            query_mm=None if query is None else torch.from_numpy(query),
            query=None if query is None else torch.zeros(1, dtype=torch.int64),
        )
