"""The test rows as numbers on a scratch disk: who, which target, which label, and one column for each score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mim_ray import artifacts
from mim_ray.data.batches import ordered_batches
from mim_ray.data.catalogue import Catalogue
from mim_ray.data.ids import hash_ids
from mim_ray.data.sources import iter_shards
from mim_ray.errors import DataError
from mim_ray.evaluation.rows import Columns, Parts


class TestRows:
    """Columns user (hash), impression (hash), item (row of the catalogue; its length for an unknown target) and label.

    Attributes:
        columns: of all rows, in file order; the label is -1 where the user's own table gives none.
        item_rows: (items + 1,) judged rows of each target. num_rows, num_positives: judged ones.
        num_unjudged: rows without a label.
    """

    __test__ = False  # for pytest: the name is no test's

    def __init__(self, uri: str, catalogue: Catalogue, folder: Path) -> None:
        """
        Raises:
            DataError: there are no rows.
        """
        self.uri, self.catalogue, self._folder = uri, catalogue, folder
        self.columns = Columns(folder)
        self.item_rows = np.zeros(catalogue.num_items + 1, np.int64)
        self.num_rows = self.num_positives = self.num_unjudged = 0
        for table in ordered_batches(uri, ["impression_id", "user_id", "item_id", "label"], 65_536):
            label = np.asarray(pc.fill_null(table["label"], -1)).astype(np.int8)
            item = catalogue.rows(table["item_id"])
            item[item < 0] = catalogue.num_items
            judged = label >= 0
            self.columns.append("user", hash_ids(table["user_id"]))
            self.columns.append("impression", hash_ids(table["impression_id"]))
            self.columns.append("item", item.astype(np.int32))
            self.columns.append("label", label)
            self.item_rows += np.bincount(item[judged], minlength=len(self.item_rows))
            self.num_rows += int(judged.sum())
            self.num_positives += int((label == 1).sum())
            self.num_unjudged += int((~judged).sum())
        if not self.columns.num_rows("label"):
            raise DataError(
                f"{uri} has no rows to judge models on. Raise samples.test_ratio, or mark rows as test in the split column."
            )

    def by_item(self, name: str, values: np.ndarray) -> None:
        """Add a score that depends on the target only; `values` (items + 1,)."""
        for (item,) in self.columns.chunks("item"):
            self.columns.append(name, values[item])

    def join(self, name: str, uri: str) -> None:
        """Add a score from a table (impression_id, prob), Parquet or Delta, whatever the order of its rows.

        Rows of other impressions are left out. Impressions are told apart by 64-bit hashes.

        Raises:
            DataError: the table lacks test impressions, has one twice, or a prob that is no number in [0, 1].
        """
        num_rows = self.columns.num_rows("label")
        left = Parts(self._folder / f"{name}-left", [("impression", "u8"), ("row", "i8")], num_rows)
        right = Parts(self._folder / f"{name}-right", [("impression", "u8"), ("prob", "f8")], num_rows)
        start = 0
        for (impression,) in self.columns.chunks("impression"):
            left.add(impression, impression=impression, row=np.arange(start, start + len(impression)))
            start += len(impression)
        for shard in iter_shards(uri, "predictions"):
            for table in shard.batches(["impression_id", "prob"]):
                hashes = hash_ids(table["impression_id"])
                right.add(hashes, impression=hashes, prob=np.asarray(pc.fill_null(table["prob"], np.nan)))
        scores = self.columns.create(name, num_rows, np.dtype(np.float64))
        lacking = twice = wrong = 0
        for wanted, given in zip(left.read(), right.read(), strict=True):
            given = given[np.isin(given["impression"], wanted["impression"])]
            given.sort(order="impression")
            twice += len(given) - len(np.unique(given["impression"]))
            wrong += int((~((given["prob"] >= 0) & (given["prob"] <= 1))).sum())
            place = np.searchsorted(given["impression"], wanted["impression"])
            place = np.minimum(place, max(0, len(given) - 1))
            found = given["impression"][place] == wanted["impression"] if len(given) else np.zeros(len(wanted), bool)
            lacking += int((~found).sum())
            scores[wanted["row"][found]] = given["prob"][place[found]]
        problems = [
            f"{count:,} {text}"
            for count, text in (
                (lacking, "test impressions are not in it"),
                (twice, "test impressions are in it more than once"),
                (wrong, "values of prob are no numbers from 0 to 1"),
            )
            if count
        ]
        if problems:
            raise DataError(
                f"{uri} cannot be judged: {'; '.join(problems)}. It needs one prob for each of the {num_rows:,} impressions "
                f"of {self.uri}."
            )

    def train_positives(self, samples: str) -> tuple[np.ndarray, np.ndarray]:
        """(items + 1,) time (microseconds) of each target's first positive in train, -1 without one, and their number."""
        table = pq.read_table(artifacts.local_copy(f"{samples}/first_positive.parquet"))
        rows = self.catalogue.rows(table["item_id"])
        time, count = np.full(len(self.item_rows), -1, np.int64), np.zeros(len(self.item_rows))
        time[rows] = np.asarray(table["first_positive_at"].cast(pa.int64()))
        count[rows] = np.asarray(table["num_train_positives"])
        time[-1], count[-1] = -1, 0  # an item that is not in the catalogue
        return time, count

    def created_at(self) -> np.ndarray:
        """(items + 1,) microseconds; -1 where unknown."""
        unknown = np.iinfo(np.int64).max
        created = np.append(self.catalogue.created_at, unknown)
        return np.where(created == unknown, -1, np.maximum(created, 0))
