"""MFM's reading side (paper Section 3.5): the current embeddings as an immutable memory-mapped matrix with its keys.

    write_snapshot(line, ids, matrix, encoder_version="csft-…", delta_version=7)
    snapshot = Snapshot.open(line)       # the current state of the line; or the URI of one state
    rows = snapshot.lookup(ids)          # (n,) int64, -1 unknown; hash once, reuse the row numbers
    vectors = snapshot.gather(rows)      # rows.shape + (D,) float32, zeros for -1

Layout of a state (snapshot_line.py tells how states make a line), rows in the order of their ids' hashes:

    manifest.json   what is shown (encoder version, Delta version, rows, width, dtype), files, sizes, checksums
    hashes.bin      (N,) uint64 ascending        groups.bin, steps.bin  where hashes that begin alike stand (buckets.py)
    offsets.bin     (N + 1,) uint32              keys.bin     ids in UTF-8, then zeros
    matrix.bin      (N, D) float32, float16 or int8      scales.bin  (N,) float32, int8 only: a value is scale · integer
    content_at.bin  (N,) int64, microseconds     content.bin  (N, 16) uint8 content hashes, zeros where unknown
    content_keys.bin, content_rows.bin           first 8 bytes of the known content hashes ascending, and their rows

The last four are there when the rows came from the table; the last three are opened only when they are used.

*Unknown ids*: `lookup` answers -1 for an id that is not in the snapshot (never encoded, deleted, or null), and `gather`
answers zeros for -1, which makes every cosine 0.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pyarrow as pa

from mim_ray import artifacts
from mim_ray.data.ids import Ids
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.buckets import GROUP_BITS, Buckets
from mim_ray.representation_center.content_hashes import ContentIndex, content_hash_strings
from mim_ray.representation_center.key_index import KEY_PADDING, KeyIndex, shard_start
from mim_ray.representation_center.snapshot_files import MANIFEST, SnapshotFiles, read_manifest
from mim_ray.representation_center.snapshot_from_rows import write_snapshot
from mim_ray.representation_center.snapshot_line import POINTER, current_snapshot
from mim_ray.representation_center.stored_rows import DTYPES, NO_TIME, StoredRows

__all__ = ["DTYPES", "NO_TIME", "Snapshot", "write_snapshot"]


class Snapshot:
    """An open snapshot. All arrays are memory mapped: opening is cheap, processes of one machine share the pages.

    Attributes:
        uri: of exactly this state. snapshot_id: its name in the line.
        num_rows: that are mapped; total_rows: of the whole snapshot.
        shard: (s, S) where only shard s of S is mapped, else None; row numbers count from its first row.
    """

    def __init__(self, uri: str, manifest: dict[str, Any], files: SnapshotFiles, shard: tuple[int, int] | None) -> None:
        """Use `Snapshot.open`."""
        self.uri = uri
        self.snapshot_id: str = manifest["snapshot_id"]
        self.encoder_version: str = manifest["encoder_version"]
        self.delta_version: int = manifest["delta_version"]
        self.width: int = manifest["width"]
        self.dtype: str = manifest["dtype"]
        self.total_rows: int = manifest["rows"]
        self.base: str | None = manifest.get("base")
        """Id of the state from which this one was made with the log's rows since; None: from the whole log."""
        self.whole_log_because: str | None = manifest.get("whole_log_because")
        """Why it was made from the whole log."""
        self.shard = shard
        self._files = files
        first, end = (0, self.total_rows) if shard is None else _row_range(files, manifest, shard)
        self.first_row = first
        self.num_rows = end - first
        self._index = _key_index(files, manifest, first, end)
        self.matrix = _array(files, "matrix.bin", DTYPES[self.dtype], first, end, self.width)
        """(N, D) memory-mapped rows in the stored dtype."""
        self.scales = _array(files, "scales.bin", np.float32, first, end)[:, 0] if self.dtype == "int8" else None
        """(N,) float32: a row is its scale times its integers; None unless dtype is int8."""
        self.content_at: np.ndarray | None = (
            _array(files, "content_at.bin", np.int64, first, end)[:, 0] if "content_at.bin" in files else None
        )
        """(N,) int64 microseconds of each row's content, or None where the snapshot was written without."""
        self.num_mapped_bytes = files.num_mapped_bytes
        """Bytes mapped for lookups: index, matrix and times."""
        self._content: ContentIndex | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(cls, uri: str, *, verify: bool = True, shard: tuple[int, int] | None = None) -> Snapshot:
        """Map the snapshot at `uri` (of a remote one what is mapped is downloaded to a local cache first).

        Args:
            uri: of a line, which opens its current state, or of one state.
            verify: compare checksums, which reads every byte once; sizes are always compared.
            shard: (s, S): only the rows whose hash `shard_of` puts into shard s of S.

        Raises:
            ArtifactError: missing, incomplete or damaged.
        """
        uri = uri.rstrip("/")
        if shard is not None and not 0 <= shard[0] < shard[1] < 2**32:
            raise ArtifactError(f"Shard {shard[0]} of {shard[1]} is none: shards are numbered from 0.")
        state = current_snapshot(uri)
        if state is None:
            return cls._open(uri, verify, shard)
        while True:
            try:
                return cls._open(f"{uri}/{state}", verify, shard)
            except (ArtifactError, FileNotFoundError):
                newer = current_snapshot(uri)
                if newer is None or newer == state:
                    raise
                state = newer  # it was replaced, and deleted, between the two reads

    @classmethod
    def _open(cls, uri: str, verify: bool, shard: tuple[int, int] | None) -> Snapshot:
        if not artifacts.exists(f"{uri}/{MANIFEST}"):
            raise ArtifactError(
                f"{uri} holds no snapshot ({POINTER} or {MANIFEST} is not there). Run the stage that makes it first."
            )
        manifest = read_manifest(uri)
        if manifest["snapshot_id"] != uri.rpartition("/")[2]:
            raise ArtifactError(
                f"{uri}/{MANIFEST} belongs to snapshot {manifest['snapshot_id']}. Build the snapshot again from the table."
            )
        files = SnapshotFiles(uri, manifest, verify=verify)
        snapshot = cls(uri, manifest, files, shard)
        files.tidy_cache()
        return snapshot

    @property
    def line(self) -> str:
        """URI of the line that this state belongs to."""
        return self.uri.rpartition("/")[0]

    @property
    def ids(self) -> pa.LargeStringArray:
        """(N,) item ids in row order."""
        return self._index.ids

    @property
    def hashes(self) -> np.ndarray:
        """(N,) uint64 `hash_ids` of the ids, ascending."""
        return self._index.hashes

    def lookup(self, ids: Ids, hashes: np.ndarray | None = None) -> np.ndarray:
        """(n,) int64 row of each id, -1 where unknown or null. Exact: the ids are compared, not only their hashes.

        Args:
            hashes: (n,) uint64 `hash_ids` of the ids, where the caller has them.
        """
        return self._index.find(ids, hashes)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of row numbers of any shape: rows.shape + (D,) float32; zeros where the row is -1."""
        flat = np.asarray(rows, np.int64).ravel()
        if self.num_rows == 0:
            result = np.zeros((len(flat), self.width), np.float32)
        else:
            result = self._float32(flat)
            if len(flat) and flat.min() < 0:
                result[flat < 0] = 0.0
        return result.reshape((*np.shape(rows), self.width))

    def gather_stored(self, rows: np.ndarray) -> np.ndarray:
        """As `gather`, in the stored dtype; of int8 the integers, to be multiplied by `scales`."""
        flat = np.asarray(rows, np.int64).ravel()
        if self.num_rows == 0:
            result = np.zeros((len(flat), self.width), self.matrix.dtype)
        else:
            result = self.matrix.take(flat, axis=0)  # of -1 the last row, for now
            if len(flat) and flat.min() < 0:
                result[flat < 0] = 0
        return result.reshape((*np.shape(rows), self.width))

    def stored_rows(self, first: int, end: int) -> StoredRows:
        """Rows [first, end) as they are mapped."""
        return StoredRows(
            self.hashes[first:end],
            self._index.ids_between(first, end),
            self.matrix[first:end],
            None if self.scales is None else self.scales[first:end],
            None if self.content_at is None else self.content_at[first:end],
            self._contents().digests[first:end] if "content.bin" in self._files else None,
        )

    def content_hashes(self, rows: np.ndarray) -> pa.StringArray:
        """(n,) content hash of each row, 32 hex digits; null where unknown and where the row is -1."""
        flat = np.asarray(rows, np.int64).ravel()
        if "content.bin" not in self._files or self.num_rows == 0:
            return pa.nulls(len(flat), pa.string())
        digests = self._contents().digests.take(flat, axis=0)
        return content_hash_strings(digests, known=flat >= 0)

    def find_content(self, hashes: Ids) -> np.ndarray:
        """(n,) int64: a row whose content has this hash (32 hex digits), -1 where there is none.

        Raises:
            ArtifactError: only a shard is mapped; contents are found in whole snapshots.
        """
        if self.shard is not None:
            raise ArtifactError(
                f"Snapshot {self.uri}: shard {self.shard} cannot be searched by content. Open the whole."
            )
        if "content.bin" not in self._files:
            return np.full(len(hashes), -1, np.int64)
        return self._contents().find(hashes)

    def _float32(self, rows: np.ndarray) -> np.ndarray:
        """Rows as float32; the last one for row -1."""
        taken = self.matrix.take(rows, axis=0)
        if self.dtype == "float32":
            return taken
        import torch  # ten times as fast as NumPy at this, and loaded only where it is needed

        result = torch.from_numpy(taken).float()
        if self.scales is not None:
            result *= torch.from_numpy(self.scales.take(rows))[:, None]
        return result.numpy()

    def _contents(self) -> ContentIndex:
        with self._lock:
            if self._content is None:
                end = self.first_row + self.num_rows
                digests = _array(self._files, "content.bin", np.uint8, self.first_row, end, 16)
                if self.shard is not None:
                    nothing = np.empty(0, np.int64)
                    self._content = ContentIndex(digests, nothing.view(np.uint64), nothing)
                else:
                    keys = self._files.map("content_keys.bin").view(np.uint64)
                    self._content = ContentIndex(digests, keys, self._files.map("content_rows.bin").view(np.int64))
            return self._content


def _array(files: SnapshotFiles, name: str, dtype: Any, first: int, end: int, width: int = 1) -> np.ndarray:
    size = np.dtype(dtype).itemsize * width
    return files.map(name, first * size, end * size).view(dtype).reshape(end - first, width)


def _row_range(files: SnapshotFiles, manifest: dict[str, Any], shard: tuple[int, int]) -> tuple[int, int]:
    """First row of a shard and of the next one."""
    bounds = [_first_row(files, manifest, shard_start(number, shard[1])) for number in (shard[0], shard[0] + 1)]
    return bounds[0], bounds[1]


def _first_row(files: SnapshotFiles, manifest: dict[str, Any], bound: int) -> int:
    """First row whose hash is not less than `bound`. Reads one block of the hashes at most."""
    starts = [int(start, 16) for start in manifest["block_hashes"]]
    block = sum(start < bound for start in starts) - 1
    if block < 0:
        return 0
    if bound >= 2**64:
        return int(manifest["rows"])
    per_block = manifest["block_bytes"] // 8
    first, end = block * per_block, min((block + 1) * per_block, manifest["rows"])
    hashes = files.map("hashes.bin", first * 8, end * 8).view(np.uint64)
    files.num_mapped_bytes -= hashes.nbytes
    return first + int(np.searchsorted(hashes, np.uint64(bound)))


def _key_index(files: SnapshotFiles, manifest: dict[str, Any], first: int, end: int) -> KeyIndex:
    hashes = _array(files, "hashes.bin", np.uint64, first, end)[:, 0]
    offsets = _array(files, "offsets.bin", np.uint32, first, end + 1)[:, 0]
    wraps = manifest["key_wraps"]
    ends = [int(offsets[at - first]) + (sum(wrap <= at for wrap in wraps) << 32) for at in (first, end)]
    first_byte = ends[0] // 8 * 8  # so that words are aligned
    keys = files.map("keys.bin", first_byte, ends[1] + KEY_PADDING)
    buckets = manifest["buckets"]
    num_groups = 2 ** (buckets["bits"] - GROUP_BITS)
    groups = range(num_groups)
    if end - first < manifest["rows"] and len(hashes):
        shift = np.uint64(64 - buckets["bits"] + GROUP_BITS)
        groups = range(int(hashes[0] >> shift), int(hashes[-1] >> shift) + 1)
    table = Buckets(
        buckets["bits"],
        _array(files, "groups.bin", buckets["groups"], groups.start, groups.stop)[:, 0],
        _array(files, "steps.bin", buckets["steps"], groups.start << GROUP_BITS, groups.stop << GROUP_BITS)[:, 0],
        groups.start,
    )
    return KeyIndex(hashes, offsets, keys, table, first_row=first, first_byte=first_byte, wraps=wraps)
