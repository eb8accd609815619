"""The one rule for an item's current row, in SQL and in NumPy.

An item's current row is the last by (content_at, commit_version, shard_id); none if that row is `deleted`. Rows without
content_at are the oldest.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray.representation_center.snapshot import NO_TIME

CURRENT_ROWS_SQL = """
SELECT item_id, embedding, content_hash, encoder_version, content_at, origin, shard_id, category, commit_version
FROM (
    SELECT *, row_number() OVER (
        PARTITION BY encoder_version, item_id
        ORDER BY content_at DESC NULLS LAST, commit_version DESC, shard_id DESC
    ) AS place
    FROM item_embeddings
    WHERE commit_version IS NOT NULL
) AS ranked
WHERE place = 1 AND NOT deleted
"""
"""For any SQL engine that reads Delta. A reader that takes partition values from the files' paths instead of the log (Polars
without use_pyarrow=True) has no commit_version: it gets no rows, rather than wrong ones."""


def current_row_numbers(rows: pa.Table, *, deleted: bool = False) -> np.ndarray:
    """The rule of this module: (m,) int64 ascending numbers of the current rows among `rows`.

    Args:
        rows: columns item_id, content_at, commit_version, shard_id, deleted of one encoder version.
        deleted: keep items whose last row is a deletion, too.
    """
    if not rows.num_rows:
        return np.empty(0, np.int64)
    items = _codes(rows["item_id"])
    order = np.lexsort((_ranks(rows["shard_id"]), rows["commit_version"].to_numpy(), times(rows["content_at"]), items))
    ordered = items[order]
    last = np.append(ordered[1:] != ordered[:-1], True)
    winners = np.sort(order[last])
    return winners if deleted else winners[~rows["deleted"].to_numpy()[winners]]


def times(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) int64 microseconds of a time column; NO_TIME for null."""
    return pc.fill_null(pc.cast(column, pa.int64()), NO_TIME).to_numpy()


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    return _dictionary(column).indices.to_numpy()


def _ranks(column: pa.ChunkedArray) -> np.ndarray:
    encoded = _dictionary(column)
    ranks = np.empty(len(encoded.dictionary), np.int64)
    ranks[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(ranks))
    return ranks[encoded.indices.to_numpy()]


def _dictionary(column: pa.ChunkedArray) -> pa.DictionaryArray:
    return pc.dictionary_encode(pa.concat_arrays([chunk.cast(pa.large_string()) for chunk in column.chunks]))
