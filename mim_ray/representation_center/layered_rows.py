"""Reading a snapshot under overlays of newer rows (lookup.py tells what fills them)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray.data.ids import Ids, hash_ids
from mim_ray.representation_center.key_index import shard_of, string_array
from mim_ray.representation_center.overlay import Overlay
from mim_ray.representation_center.snapshot import Snapshot


@dataclass(frozen=True)
class Embeddings:
    """Answer to a lookup of n ids.

    Attributes:
        matrix: (n, D) float32 (or as asked for), zeros where not found. found: (n,) bool.
        category: (n,) strings; null unless the item came after the snapshot, or is in `LayeredRows.named`, and its message named
            one.
    """

    matrix: np.ndarray
    found: np.ndarray
    category: pa.Array


class LayeredRows:
    """A snapshot under overlays that somebody else fills: the reading half of `EmbeddingLookup`.

    Args:
        overlays: one, or one of each shard of the keys (`shard_of`); None where the keys of a shard are not asked for.

    Attributes:
        named: categories, by item id, that messages named before the snapshot was made: a snapshot holds none.
    """

    def __init__(self, snapshot: Snapshot, overlays: Sequence[Overlay | None]) -> None:
        self.snapshot, self.overlays = snapshot, overlays
        self.named: Mapping[str, str] = {}

    def get(self, ids: Ids, *, dtype: type = np.float32) -> Embeddings:
        """The newest embedding of each id; see the module for unknown ones. Any number of threads may ask.

        Args:
            dtype: of the vectors; np.float16 saves a copy where the snapshot stores that.
        """
        keys = string_array(ids)
        filled = [(shard, overlay) for shard, overlay in enumerate(self.overlays) if overlay and overlay.num_items]
        if not filled:
            rows = self.snapshot.lookup(keys)
            return Embeddings(self._gather(rows, dtype), rows >= 0, self._named(keys))
        hashes = hash_ids(keys)
        shards = shard_of(hashes, len(self.overlays)) if len(self.overlays) > 1 else None
        rows = self.snapshot.lookup(keys, hashes)
        found = rows >= 0
        matrix = self._gather(rows, dtype)
        category = self._named(keys)
        for shard, overlay in filled:
            asked = np.arange(len(keys)) if shards is None else np.flatnonzero(shards == shard)
            mine = keys if shards is None else keys.take(pa.array(asked))
            rows = overlay.find(hashes[asked], mine)
            hit = np.flatnonzero(rows >= 0)
            if len(hit):
                rows, hit = rows[hit], asked[hit]
                deleted = overlay.deleted(rows)
                matrix[hit] = np.where(deleted[:, None], 0, overlay.gather(rows))
                found[hit] = ~deleted
                mask = np.zeros(len(keys), bool)
                mask[hit] = True
                category = pc.replace_with_mask(category, pa.array(mask), overlay.category(rows))
        return Embeddings(matrix, found, category)

    def _named(self, keys: pa.LargeStringArray) -> pa.Array:
        if not self.named:
            return pa.nulls(len(keys), pa.string())
        return pa.array([self.named.get(key) for key in keys.to_pylist()], pa.string())

    def _gather(self, rows: np.ndarray, dtype: type) -> np.ndarray:
        if self.snapshot.dtype == np.dtype(dtype).name:
            return self.snapshot.gather_stored(rows)
        if self.snapshot.dtype == "float16":
            return as_float32(self.snapshot.gather_stored(rows))
        return self.snapshot.gather(rows).astype(dtype, copy=False)


def as_float32(vectors: np.ndarray) -> np.ndarray:
    """The same values, in an array of the caller's own. Through torch, which is ten times as fast, where it is loaded."""
    if vectors.dtype == np.float32 or "torch" not in sys.modules:
        return vectors.astype(np.float32)
    import torch

    return torch.from_numpy(vectors if vectors.flags.writeable else vectors.copy()).float().numpy()
