"""Rows as the files of a snapshot state hold them: in the order of their ids' hashes, vectors in the state's dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mim_ray.errors import ArtifactError

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "int8": np.int8}
PIECE_ROWS = 2**15  # rows that are made and written at once
NO_TIME = np.iinfo(np.int64).min  # content_at of a row whose content has no time: older than everything


@dataclass(frozen=True)
class StoredRows:
    """n rows, to be read only.

    Attributes:
        hashes: (n,) uint64 ascending, of the (n,) ids.
        matrix: (n, D) in the stored dtype. scales: (n,) float32 of int8, else None.
        content_at: (n,) int64 microseconds. digests: (n, 16) uint8 content hashes. None: the state has none.
    """

    hashes: np.ndarray
    ids: pa.LargeStringArray
    matrix: np.ndarray
    scales: np.ndarray | None = None
    content_at: np.ndarray | None = None
    digests: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.hashes)

    @classmethod
    def encoded(
        cls,
        hashes: np.ndarray,
        ids: pa.LargeStringArray,
        matrix: np.ndarray,
        *,
        dtype: str,
        source: str,
        content_at: np.ndarray | None = None,
        digests: np.ndarray | None = None,
    ) -> StoredRows:
        """Rows of (n, D) float32 vectors.

        Raises:
            ArtifactError: a value that is not finite, or cannot be said in the dtype; `source` says where.
        """
        scales = None
        if dtype == "int8":
            scales = np.abs(matrix).max(axis=1, initial=0.0).astype(np.float32) / np.float32(127)
            with np.errstate(invalid="ignore"):  # what is not finite is refused below
                stored = np.rint(matrix / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8)
        else:
            with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, which is refused below
                stored = matrix.astype(DTYPES[dtype], copy=False)
        finite = np.isfinite(stored if scales is None else scales)
        if not finite.all():
            first = ids[int(np.argmin(finite.reshape(len(ids), -1).all(axis=1)))].as_py()
            text = f"the embedding of item {first!r} is not finite in {dtype}. Embed the item again."
            raise ArtifactError(f"{source}: {text}")
        at = None if content_at is None else np.asarray(content_at, np.int64)
        return cls(hashes, ids, stored, scales, at, digests)

    def mixed(self, other: StoredRows, source: np.ndarray) -> StoredRows:
        """(m,) rows of both: `source` names rows of this one, and rows of `other` from len(self) on."""
        theirs = np.flatnonzero(source >= len(self))
        rows = source[theirs] - len(self)

        def mix(mine: np.ndarray, more: np.ndarray) -> np.ndarray:
            found = (
                mine.take(source, axis=0, mode="clip")
                if len(mine)
                else np.empty_like(more, shape=(len(source), *more.shape[1:]))
            )
            found[theirs] = more.take(rows, axis=0)
            return found

        def mix_some(mine: np.ndarray | None, more: np.ndarray | None) -> np.ndarray | None:
            return None if mine is None or more is None else mix(mine, more)

        return StoredRows(
            mix(self.hashes, other.hashes),
            pa.concat_arrays([self.ids, other.ids]).take(pa.array(source)),
            mix(self.matrix, other.matrix),
            mix_some(self.scales, other.scales),
            mix_some(self.content_at, other.content_at),
            mix_some(self.digests, other.digests),
        )
