"""Categories of items that are newer than a CTR model: their messages name them, and a snapshot does not hold them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from mim_ray.errors import ArtifactError
from mim_ray.representation_center.current_rows import current_row_numbers
from mim_ray.representation_center.data_files import SCHEMA
from mim_ray.representation_center.snapshot_files import read_manifest
from mim_ray.representation_center.table import EmbeddingTable

_COLUMNS = ["item_id", "category", "content_at", "commit_version", "shard_id", "deleted"]


def named_since(
    table: EmbeddingTable, encoder_version: str, snapshot: str, is_wanted: Callable[[pa.Array], np.ndarray]
) -> dict[str, str]:
    """Item id -> category, by the current rows of the commits after a snapshot; none where the snapshot is not there any more.

    Args:
        snapshot: URI of one state. is_wanted: ids -> (n,) bool, those whose category is not known otherwise.
    """
    try:
        after = int(read_manifest(snapshot)["delta_version"])
    except ArtifactError:
        return {}
    parts = [pa.schema([SCHEMA.field(name) for name in _COLUMNS]).empty_table()]
    for file in table.scan(encoder_version, newer_than=after)[1] if table.exists() else ():
        for rows in file.batches(_COLUMNS):
            parts.append(rows.filter(pa.array(is_wanted(rows["item_id"].combine_chunks()))))
    rows = pa.concat_tables(parts)
    rows = rows.take(pa.array(current_row_numbers(rows)))
    names = zip(rows["item_id"].to_pylist(), rows["category"].to_pylist(), strict=True)
    return {item: category for item, category in names if category is not None}
