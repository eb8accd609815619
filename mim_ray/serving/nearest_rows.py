"""The rows of a snapshot that are nearest to a vector by cosine, with FAISS.

    nearest = NearestRows.open(snapshot, exact_rows=50_000, recall=0.95)
    rows, cosines = nearest.search(vector, 10, allowed=mask)

*Few rows* (up to `exact_rows`): exact inner products of vectors of length 1. *More*: an inverted file of 8-bit codes, a byte for
each number of a vector. A search reads the lists nearest to the query, takes four times as many rows as were asked for, and
orders them by their exact cosine in the snapshot. How many lists are read is chosen when the index is built: as few as find
`recall` of the ten nearest rows that an exact search finds, for rows drawn as queries; the measured share is kept beside the index.

An index is built once per machine, in the cache folder ($MIM_RAY_CACHE, default ~/.cache/mim_ray), and mapped: replicas share its pages.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mim_ray import artifacts
from mim_ray.errors import ConfigError
from mim_ray.local_cache import cache_folder, drop_unused, note_use
from mim_ray.representation_center.snapshot import Snapshot

logger = logging.getLogger("ray.serve")
FORMAT = 1  # of the files in the cache
KEPT_INDEXES = 2  # of a line of snapshots
FEW_ROWS = 10_000  # so many allowed ones are compared one by one
_BLOCK_ROWS = 65_536
_ROWS_PER_LIST = 64  # drawn to place the lists
_MORE = 4  # codes are coarse: this many times as many rows are compared exactly
_QUERIES, _TRUE = 64, 10  # that the recall is measured with


class NearestRows:
    """Use `NearestRows.open`. Any number of threads may search.

    Attributes:
        snapshot: whose row numbers are answered.
        recall: measured share of the true ten nearest rows that a search finds; 1 for an exact one.
        num_lists_read: of the inverted file; 0 for an exact search.
        num_bytes: of the index.
    """

    def __init__(
        self, snapshot: Snapshot, index: Any, *, recall: float, num_lists_read: int, num_bytes: int = 0
    ) -> None:
        self.snapshot, self.recall, self.num_lists_read, self.num_bytes = snapshot, recall, num_lists_read, num_bytes
        self._index = index

    @classmethod
    def open(cls, snapshot: Snapshot, *, exact_rows: int, recall: float, folder: Path | None = None) -> NearestRows:
        """Map the index of a snapshot; the first call on a machine builds it, others wait for that.

        Args:
            exact_rows: snapshots of at most so many rows are searched exactly. recall: that a larger one's index must reach.
            folder: where the index is kept. Default: nearest/ in the cache folder.

        Raises:
            ConfigError: FAISS is not installed.
        """
        faiss = _faiss()
        folder = folder or cache_folder() / "nearest"
        folder.mkdir(parents=True, exist_ok=True)
        line = artifacts.fingerprint(snapshot.line, FORMAT, faiss.__version__, exact_rows, recall)[:16]
        path = folder / f"{line}-{snapshot.snapshot_id}.faiss"
        with (folder / f"{line}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # falls with the process
            if not path.exists():
                _write(path, *_build(snapshot, exact_rows, recall))
                others = [
                    other for other in sorted(folder.glob(f"{line}-*.faiss")) if other != path
                ]  # ids sort by time
                for old in others[: 1 - KEPT_INDEXES]:
                    old.with_suffix(".json").unlink(missing_ok=True)
                    old.unlink(missing_ok=True)
                drop_unused(folder.glob("*.*"))  # of other lines
            for used in (path, path.with_suffix(".json"), Path(lock.name)):
                note_use(used)
            described = json.loads(path.with_suffix(".json").read_text())
            flag = faiss.IO_FLAG_MMAP if described["num_lists_read"] else faiss.IO_FLAG_MMAP_IFC
            index, num_bytes = faiss.read_index(str(path), flag), path.stat().st_size
        return cls(snapshot, index, num_bytes=num_bytes, **described)

    def search(self, vector: np.ndarray, k: int, *, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """
        Args:
            vector: (D,). k: rows wanted. allowed: (N,) bool, rows that may be found; None: all.

        Returns:
            rows (m,) int64 and their cosines (m,) float32, highest first; m < k where fewer rows are allowed.
        """
        query = unit(np.asarray(vector, np.float32)[None])  # (1, D)
        num_rows = self.snapshot.num_rows
        num_allowed = num_rows if allowed is None else int(allowed.sum())
        k = min(k, num_allowed)
        if k == 0:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        if self.num_lists_read and allowed is not None and num_allowed <= FEW_ROWS:
            return self._best(query, np.flatnonzero(allowed), k)
        faiss = _faiss()
        faiss.omp_set_num_threads(1)  # of this thread: requests run beside each other
        bits = None if allowed is None or num_allowed == num_rows else np.packbits(allowed, bitorder="little")
        selector = None if bits is None else faiss.IDSelectorBitmap(num_rows, faiss.swig_ptr(bits))
        if not self.num_lists_read:
            cosines, rows = self._index.search(query, k, params=faiss.SearchParameters(sel=selector))
            return rows[0], cosines[0]
        lists = min(self._index.nlist, self.num_lists_read * -(-num_rows // num_allowed))  # rare rows: look further
        parameters = faiss.SearchParametersIVF(sel=selector, nprobe=lists)
        rows = self._index.search(query, _MORE * k, params=parameters)[1][0]
        return self._best(query, rows[rows >= 0], k)

    def _best(self, query: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        cosines = unit(self.snapshot.gather(rows)) @ query[0]
        best = np.argsort(-cosines, kind="stable")[:k]
        return rows[best].astype(np.int64), cosines[best]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1; rows of zeros stay zeros. (n, D) -> (n, D) float32."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32, copy=False)


def _build(snapshot: Snapshot, exact_rows: int, wanted: float) -> tuple[Any, dict[str, Any]]:
    """The index, and what `NearestRows` is told of it. Memory: D + 8 bytes a row, beside the rows drawn to place the lists."""
    faiss = _faiss()
    num_rows = snapshot.num_rows
    if num_rows <= exact_rows:
        index = faiss.IndexFlatIP(snapshot.width)
        for block in _blocks(snapshot):
            index.add(block)
        return index, {"recall": 1.0, "num_lists_read": 0}
    num_lists = max(1, int(2 * num_rows**0.5))
    index = faiss.index_factory(snapshot.width, f"IVF{num_lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # silent on snapshots hardly larger than exact_rows
    rng = np.random.default_rng(0)
    drawn = np.sort(rng.choice(num_rows, min(num_rows, _ROWS_PER_LIST * num_lists), replace=False))
    index.train(unit(snapshot.gather(drawn)))
    for block in _blocks(snapshot):
        index.add(block)
    queries = np.sort(rng.choice(num_rows, min(num_rows, _QUERIES), replace=False))
    truth = _exact(snapshot, queries)
    nearest = NearestRows(snapshot, index, recall=1.0, num_lists_read=1)
    while True:
        found = [
            nearest.search(vector, _TRUE + 1)[0][:, None] == true[None]  # (11, 11): itself is in both
            for vector, true in zip(snapshot.gather(queries), truth, strict=True)
        ]
        recall = float(np.mean([(same.any(axis=0).sum() - 1) / (same.shape[1] - 1) for same in found]))
        if recall >= wanted or nearest.num_lists_read >= num_lists:
            break
        nearest.num_lists_read = min(num_lists, 2 * nearest.num_lists_read)
    logger.info("nearest items: %d lists of %d read, recall %.3f", nearest.num_lists_read, num_lists, recall)
    return index, {"recall": recall, "num_lists_read": nearest.num_lists_read}


def _exact(snapshot: Snapshot, queries: np.ndarray) -> np.ndarray:
    """(q, 11) rows nearest to each of the rows `queries`, themselves included."""
    wanted = unit(snapshot.gather(queries))
    best = np.full((len(queries), _TRUE + 1), -np.inf, np.float32)
    rows = np.zeros(best.shape, np.int64)
    first = 0
    for block in _blocks(snapshot):
        cosines = np.concatenate([best, wanted @ block.T], axis=1)
        numbers = np.concatenate(
            [rows, np.broadcast_to(np.arange(first, first + len(block)), (len(queries), len(block)))], axis=1
        )
        top = np.argpartition(-cosines, _TRUE, axis=1)[:, : _TRUE + 1]
        best, rows = np.take_along_axis(cosines, top, 1), np.take_along_axis(numbers, top, 1)
        first += len(block)
    return rows


def _blocks(snapshot: Snapshot) -> Iterator[np.ndarray]:
    for first in range(0, snapshot.num_rows, _BLOCK_ROWS):
        yield unit(snapshot.gather(np.arange(first, min(first + _BLOCK_ROWS, snapshot.num_rows))))


def _write(path: Path, index: Any, described: dict[str, Any]) -> None:
    """Complete or not there."""
    path.with_suffix(".json").write_text(json.dumps(described))
    temporary = path.with_suffix(".tmp")
    _faiss().write_index(index, str(temporary))
    os.replace(temporary, path)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ConfigError(
            "Similar items and image search need FAISS, which is not installed. Install it with pip install "
            '"mim_ray[search]" (or pip install faiss-cpu), or switch them off with serving.similar_items=false.'
        ) from None
    return faiss
