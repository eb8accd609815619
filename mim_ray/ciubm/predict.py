"""Predictions of a CTR model for a table of impressions, batch by batch, and the mean cosine that needs no model.

Every row gets a prediction: unknown users, items and missing content have defined embeddings.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mim_ray import artifacts
from mim_ray.ciubm.dataset import COLUMNS, Content, ImpressionEncoder, IndexedBatch
from mim_ray.ciubm.export import Ranker
from mim_ray.ciubm.interest import content_relevance
from mim_ray.data.batches import num_rows, ordered_batches
from mim_ray.data.schema import PREDICTIONS
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.runtime.progress import Progress

_BATCH_ROWS = 4_096


def predict(
    ranker: Ranker, snapshot: Snapshot | None, rows: str, label: str = "predict"
) -> Iterator[tuple[pa.Array, np.ndarray]]:
    """Impression ids (B,) and probabilities (seeds, B) of every batch of the impressions below the URI `rows`, in file order."""
    by_seed = [ranker.of_seed(index) for index in range(len(ranker.models))]
    for table, batch in _encoded(ranker, snapshot, rows, f"predict {label}"):
        prob = np.stack([one.predict(batch) for one in by_seed])
        yield table["impression_id"].combine_chunks().cast(pa.string()), prob


def mean_cosines(ranker: Ranker, snapshot: Snapshot, rows: str) -> Iterator[np.ndarray]:
    """(B,) mean_cosine of every batch of the impressions below `rows`; of the model, only what it knows of items is used."""
    for _, batch in _encoded(ranker, snapshot, rows, "mean cosine"):
        yield mean_cosine(batch).numpy()


@torch.inference_mode()
def mean_cosine(batch: IndexedBatch) -> Tensor:
    """(B,) mean cosine between the target's MM embedding and those of the behaviors that have one; 0 without any."""
    assert batch.mm is not None
    behaviors = batch.mm[batch.behaviors]
    counted = batch.behavior_mask & (behaviors != 0).any(dim=-1)
    relevance = content_relevance(batch.mm[batch.target], behaviors, counted)
    return relevance.sum(dim=1) / counted.sum(dim=1).clamp_min(1)


class PredictionsWriter:
    """Writes the predictions table of SPEC section 2 batch by batch."""

    def __init__(self, uri: str) -> None:
        filesystem, path = artifacts.filesystem(uri)
        local = artifacts.local_path(uri)
        if local is not None:
            os.makedirs(local.parent, exist_ok=True)
        self._writer = pq.ParquetWriter(path, PREDICTIONS.schema, filesystem=filesystem)
        self._batches: list[pa.Table] = []
        self._num_rows = 0

    def add(self, impression_id: pa.Array, prob: np.ndarray) -> None:
        """Rows of the table."""
        self._batches.append(pa.table([impression_id, pa.array(prob, pa.float64())], schema=PREDICTIONS.schema))
        self._num_rows += len(prob)
        if self._num_rows >= 2**18:
            self._write()

    def __enter__(self) -> PredictionsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self._write()
        self._writer.close()

    def _write(self) -> None:
        """One row group of what was collected."""
        if self._num_rows:
            self._writer.write_table(pa.concat_tables(self._batches).combine_chunks())
        self._batches, self._num_rows = [], 0


def _encoded(
    ranker: Ranker, snapshot: Snapshot | None, rows: str, label: str
) -> Iterator[tuple[pa.Table, IndexedBatch]]:
    content = None if snapshot is None else Content(snapshot, ranker.items)
    encoder = ImpressionEncoder(ranker.items, ranker.users, content, ranker.max_behaviors)
    with Progress(label, num_rows(rows), "rows", every_s=5.0) as progress:
        for table in ordered_batches(rows, ["impression_id", *COLUMNS], _BATCH_ROWS):
            yield table, encoder.encode(table)
            progress.add(len(table))
