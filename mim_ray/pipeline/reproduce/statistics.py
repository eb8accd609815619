"""Table 1: how many rows, queries, users and items the samples hold, overall and in the largest categories."""

from __future__ import annotations

import numpy as np

from mim_ray import artifacts
from mim_ray.data.batches import num_rows, ordered_batches
from mim_ray.data.catalogue import Catalogue
from mim_ray.data.ids import hash_ids
from mim_ray.pipeline.reproduce.tables import Table

_SHOWN = 7


def data_table(samples: str) -> Table:
    """Counts over train, validation and test; a category's users and items are those of its impressions."""
    catalogue = Catalogue.open(f"{samples}/catalogue")
    codes, names = catalogue.category_codes
    codes = np.append(codes, -1)
    of_category = np.zeros(len(names) + 1, np.int64)
    users, items = _Distinct(), _Distinct()
    for split in ("train", "validation", "test"):
        if not artifacts.list_files(f"{samples}/impressions/{split}", ".parquet"):
            continue
        for table in ordered_batches(f"{samples}/impressions/{split}", ["user_id", "item_id"], 65_536):
            row = catalogue.rows(table["item_id"])
            category = codes[row]
            of_category += np.bincount(np.where(category < 0, len(names), category), minlength=len(names) + 1)
            users.add(category, hash_ids(table["user_id"]))
            items.add(category, row.astype(np.uint64))
    queries = _queries(samples)
    largest = [int(code) for code in np.argsort(-of_category[:-1], kind="stable")[:_SHOWN] if of_category[code]]
    rows = [
        ["data (impressions)", f"{of_category.sum():,}", *(f"{of_category[code]:,}" for code in largest)],
        ["queries (interest pairs)", f"{queries:,}", *("" for _ in largest)],
        ["users", f"{users.total():,}", *(f"{users.of(code):,}" for code in largest)],
        ["items", f"{items.total():,}", *(f"{items.of(code):,}" for code in largest)],
    ]
    note = f"All splits, and the {len(largest)} categories with most impressions. The paper: 1.83 B data, 0.12 B users, 16.16 M items."
    return Table("Table 1: the data", note, ["", "all", *(names[code] for code in largest)], rows)


class _Distinct:
    """Distinct (category, id) pairs, merged whenever as many new ones came as there are."""

    def __init__(self) -> None:
        self._kept = np.zeros((0, 2), np.uint64)
        self._new: list[np.ndarray] = []
        self._num_new = 0

    def add(self, category: np.ndarray, ids: np.ndarray) -> None:
        pairs = np.stack([category.astype(np.int64).view(np.uint64), ids], axis=1)
        self._new.append(np.unique(pairs, axis=0))
        self._num_new += len(self._new[-1])
        if self._num_new > len(self._kept):
            self._merge()

    def of(self, code: int) -> int:
        self._merge()
        return int((self._kept[:, 0] == np.uint64(code)).sum())

    def total(self) -> int:
        self._merge()
        return len(np.unique(self._kept[:, 1]))

    def _merge(self) -> None:
        self._kept = np.unique(np.concatenate([self._kept, *self._new]), axis=0)
        self._new, self._num_new = [], 0


def _queries(samples: str) -> int:
    pairs = f"{samples}/interest_pairs"
    return num_rows(pairs) if artifacts.list_files(pairs, ".parquet") else 0
