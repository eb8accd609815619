"""From the train rows to what a CTR model knows by id: items, categories, users, and the share of positives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray import artifacts
from mim_ray.ciubm.feature_learning import learn_features
from mim_ray.ciubm.features import Features
from mim_ray.ciubm.vocabulary import HashedVocabulary, ItemIndex, Vocabulary
from mim_ray.config.scenario import Feature, FeatureTransform
from mim_ray.data.batches import ordered_batches
from mim_ray.data.catalogue import Catalogue
from mim_ray.errors import DataError

_COLUMNS = ("impression_id", "user_id", "item_id", "label")
_SUMMARY = "train.json"


@dataclass(frozen=True)
class Vocabularies:
    """
    Attributes:
        features: the declared ones, and the behaviors' ages.
        positive_ratio: share of train's rows with label 1.
    """

    items: ItemIndex
    users: Vocabulary
    features: Features
    positive_ratio: float

    def save(self, uri: str) -> None:
        """Write items.arrow, categories.json, users.arrow, what Features.save does and, last, train.json below `uri`."""
        self.items.save(uri)
        self.users.save(f"{uri}/users.arrow")
        self.features.save(uri)
        artifacts.write_json(f"{uri}/{_SUMMARY}", {"positive_ratio": self.positive_ratio})

    @classmethod
    def load(cls, uri: str) -> Vocabularies | None:
        """What `save` wrote, None where it did not come to its end.

        Raises:
            ArtifactError: damaged.
        """
        if not artifacts.exists(f"{uri}/{_SUMMARY}"):
            return None
        summary = artifacts.read_json(f"{uri}/{_SUMMARY}")
        users, features = Vocabulary.load(f"{uri}/users.arrow"), Features.load(uri)
        return cls(ItemIndex.load(uri), users, features, summary["positive_ratio"])


def build_vocabularies(
    samples: str,
    *,
    min_item_count: int,
    hash_rows: int | None = None,
    declared: Sequence[Feature] = (),
    transforms: Mapping[str, FeatureTransform] | None = None,
    earlier: Vocabularies | None = None,
) -> Vocabularies:
    """Items of the catalogue, users of train, and the features.

    Args:
        min_item_count: how often an item must be a target in train to get a row of its own.
        hash_rows: rows that all ids share, of items and of users; None: explicit vocabularies.
        earlier: whose items, users, categories and values of features keep their rows, and whose normalisation stays; it says
            whether vocabularies are hashed.
        declared, transforms: the features, and the settings of those of them that differ from the defaults.

    Raises:
        DataError: train has labels other than 0 and 1.
    """
    catalogue = Catalogue.open(f"{samples}/catalogue")
    codes, names = catalogue.category_codes
    hashed = earlier.items.hashed is not None if earlier is not None else hash_rows is not None
    counts = np.zeros(catalogue.num_items + 1, np.int64)  # the last is of ids that are not in the catalogue
    met_users: list[pa.Array] = []
    labels = _Labels(f"{samples}/impressions/train")
    for table in ordered_batches(labels.source, _COLUMNS, 65_536):
        labels.add(table)
        if hashed:
            continue
        met = table["item_id"].value_counts()
        np.add.at(counts, catalogue.rows(met.field("values")), met.field("counts").to_numpy())
        met_users.append(table["user_id"].unique())
        if len(met_users) == 64:
            met_users = [pa.chunked_array(met_users).unique()]
    distinct = pa.chunked_array(met_users or [pa.array([], pa.string())]).unique().drop_null()
    distinct = distinct.take(pc.sort_indices(distinct))
    found = (catalogue.ids, codes, names, counts[:-1], min_item_count)
    ratio = labels.positive_ratio()
    features = learn_features(labels.source, declared, transforms or {})
    if earlier is not None:
        features = earlier.features.grow(features)
        return Vocabularies(earlier.items.grow(*found), earlier.users.grow(distinct), features, ratio)
    users = Vocabulary(distinct) if hash_rows is None else HashedVocabulary(hash_rows)
    return Vocabularies(ItemIndex.build(*found, hash_rows=hash_rows), users, features, ratio)


class _Labels:
    """Counts train's labels."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._num_rows = self._num_positives = self._num_bad = 0
        self._first_bad: Any = None

    def add(self, rows: pa.Table) -> None:
        label = np.asarray(pc.fill_null(rows["label"], -1))
        bad = np.flatnonzero(~np.isin(label, (0, 1)))
        if len(bad) and not self._num_bad:
            self._first_bad = rows["impression_id"][int(bad[0])].as_py(), rows["label"][int(bad[0])].as_py()
        self._num_bad += len(bad)
        self._num_rows += len(rows)
        self._num_positives += int((label == 1).sum())

    def positive_ratio(self) -> float:
        """
        Raises:
            DataError: a label is not 0 or 1.
        """
        if self._num_bad:
            name, label = self._first_bad
            raise DataError(
                f"{self._num_bad:,} of {self._num_rows:,} rows of {self.source} have a label that is not 0 or 1 (impression "
                f"{name} has {label}). jobs/build_samples.py rejects such rows of train: build the samples with it, or leave "
                "these rows out."
            )
        return self._num_positives / max(1, self._num_rows)
