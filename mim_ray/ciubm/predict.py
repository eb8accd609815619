"""Predictions of a CTR model for a table of impressions, batch by batch, and the mean cosine that needs no model.

Every row gets a prediction: unknown users, items and missing content have defined embeddings.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mim_ray import artifacts
from mim_ray.ciubm.dataset import Content, ImpressionEncoder
from mim_ray.ciubm.export import Ranker
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
    content = None if snapshot is None else Content(snapshot, ranker.items)
    encoder = ImpressionEncoder(
        ranker.items, ranker.users, content, ranker.max_behaviors, ranker.features, ranker.open_queries()
    )
    with Progress(f"predict {label}", num_rows(rows), "rows", every_s=5.0) as progress:
        for table in ordered_batches(rows, ["impression_id", *encoder.columns], _BATCH_ROWS):
            batch = encoder.encode(table)
            prob = np.stack([one.predict(batch) for one in by_seed])
            yield table["impression_id"].combine_chunks().cast(pa.string()), prob
            progress.add(len(table))


def mean_cosines(snapshot: Snapshot, rows: str, max_behaviors: int) -> Iterator[np.ndarray]:
    """(B,) mean cosine of every batch of the impressions below `rows`: no model, only what the vectors know.

    It is that between the target's MM embedding and those of the newest `max_behaviors` behaviors, of the ones that have an
    embedding; 0 without any.
    """
    with Progress("mean cosine", num_rows(rows), "rows", every_s=5.0) as progress:
        for table in ordered_batches(rows, ["item_id", "behaviors"], _BATCH_ROWS):
            yield _mean_cosine(snapshot, table, max_behaviors)
            progress.add(len(table))


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


def _mean_cosine(snapshot: Snapshot, table: pa.Table, max_behaviors: int) -> np.ndarray:
    lists = table["behaviors"].combine_chunks()
    length = np.asarray(pc.fill_null(pc.list_value_length(lists), 0)).astype(np.int64)
    row = np.asarray(pc.list_parent_indices(lists)).astype(np.int64)  # of each behavior
    from_end = np.cumsum(length)[row] - np.arange(len(row))
    newest = from_end <= max_behaviors
    row, behaviors = row[newest], pc.list_flatten(lists).filter(pa.array(newest))
    targets = table["item_id"].combine_chunks()
    met = pa.concat_arrays([targets.cast(pa.large_string()), behaviors.cast(pa.large_string())]).dictionary_encode()
    vectors = snapshot.gather(snapshot.lookup(met.dictionary)).astype(np.float32)
    vectors = np.concatenate([vectors, np.zeros((1, snapshot.width), np.float32)])  # the last is for null ids
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    place = np.asarray(met.indices.fill_null(len(vectors) - 1)).astype(np.int64)
    target, behavior = place[: len(table)][row], place[len(table) :]
    cosine = np.einsum("nd,nd->n", units[target], units[behavior])
    counted = np.bincount(row, units[behavior].any(axis=1), len(table))
    return np.bincount(row, cosine, len(table)) / np.maximum(counted, 1)
