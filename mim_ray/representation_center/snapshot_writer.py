"""Writes a snapshot state beside the current one of its line and switches the line to it (layout: snapshot.py).

    write_snapshot(line, ids, matrix, encoder_version="csft-…")          # what is in memory, or comes in batches
    with SnapshotWriter(line, …) as writer:                             # what comes sorted, in pieces of any size
        writer.append(hashes, ids, matrix, …)
        writer.publish()

Killed at any moment, or without room on the disk, the state that was current stays current.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from mim_ray import artifacts
from mim_ray.data.ids import Ids, hash_ids
from mim_ray.errors import ArtifactError, MimRayError
from mim_ray.representation_center import snapshot_files
from mim_ray.representation_center.buckets import BucketFile
from mim_ray.representation_center.content_hashes import ContentIndexWriter, content_digests
from mim_ray.representation_center.key_index import (
    KEY_PADDING,
    concatenated,
    sorted_order,
    string_array,
    wrap_rows,
)
from mim_ray.representation_center.snapshot_files import FORMAT, BlockWriter, upload, write_manifest
from mim_ray.representation_center.snapshot_line import (
    POINTER,
    BuildingFolder,
    current_snapshot,
    new_snapshot_id,
    prune_snapshots,
    snapshot_ids,
    switch_snapshot,
)

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "int8": np.int8}
NO_TIME = np.iinfo(np.int64).min  # content_at of a row whose content has no time: older than everything
MEMORY_BYTES = 2**28
_PIECE_ROWS = 2**15


def write_snapshot(
    line: str,
    ids: Ids,
    matrix: np.ndarray | Iterable[np.ndarray],
    *,
    encoder_version: str,
    delta_version: int = -1,
    width: int | None = None,
    dtype: str = "float32",
    content_at: np.ndarray | None = None,
    content_hashes: Ids | None = None,
    keep: int = 3,
) -> str:
    """Write a state of the line and switch to it; the state's URI.

    Args:
        line: URI of the line.
        ids: (N,) item ids, each once, in any order.
        matrix: (N, D) in the order of the ids, whole or as batches of rows that follow each other (so that the rows
            need not be in memory together; `width` is needed then).
        encoder_version: the encoder that made the vectors; "none" for tables that are no embeddings.
        delta_version: the table's version shown, -1 if no table.
        dtype: "float32", "float16", or "int8" with a scale for each row.
        content_at: (N,) int64 microseconds; `NO_TIME` for unknown.
        content_hashes: (N,) 32 hex digits each, null where unknown.
        keep: how many states stay for a roll-back, this one included (`prune_snapshots`).

    Raises:
        ArtifactError: an id null or there twice, rows of another number or width, or a value that is not finite.
    """
    keys = string_array(ids)
    try:
        hashes = hash_ids(keys)
        order = sorted_order(keys, hashes)
    except ValueError as error:
        raise ArtifactError(f"Snapshot {line}: {error}. Each item needs one row.") from None
    if width is None:
        if not isinstance(matrix, np.ndarray):
            raise ArtifactError(f"Snapshot {line}: `width` is missing, which batches of rows need.")
        width = matrix.shape[1]
    digests = None if content_hashes is None else content_digests(content_hashes)[0]
    with SnapshotWriter(
        line,
        encoder_version=encoder_version,
        delta_version=delta_version,
        width=width,
        dtype=dtype,
        most_rows=len(keys),
        has_times=content_at is not None,
        has_contents=digests is not None,
    ) as writer:
        rows = matrix if isinstance(matrix, np.ndarray) else writer.stored(matrix, len(keys))
        if rows.shape != (len(keys), width):
            raise ArtifactError(f"Snapshot {line}: rows of shape {rows.shape} for {len(keys)} ids of width {width}.")
        for start in range(0, len(keys), _PIECE_ROWS):
            piece = order[start : start + _PIECE_ROWS]
            writer.append(
                hashes[piece],
                keys.take(pa.array(piece)),
                rows[piece],
                content_at=None if content_at is None else np.asarray(content_at, np.int64)[piece],
                digests=None if digests is None else digests[piece],
            )
        return writer.publish(keep=keep)


class SnapshotWriter:
    """Writes rows that come in the order of their hashes. Leaving the block without `publish` leaves nothing behind.

    Args:
        most_rows: upper bound of the number of rows, for the memory that sorting the contents takes.
        has_times, has_contents: whether `append` is given content_at and digests.
    """

    def __init__(
        self,
        line: str,
        *,
        encoder_version: str,
        delta_version: int,
        width: int,
        dtype: str,
        most_rows: int,
        has_times: bool,
        has_contents: bool,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        if dtype not in DTYPES:
            raise ArtifactError(f"Snapshot {line}: dtype {dtype!r} is none of {', '.join(DTYPES)}.")
        self.line = line.rstrip("/")
        self.snapshot_id = new_snapshot_id()
        self._width, self._dtype = width, dtype
        self._facts = {"encoder_version": encoder_version, "delta_version": int(delta_version)}
        self._local = artifacts.local_path(self.line)
        self._before = current_snapshot(self.line)
        self._states_before = snapshot_ids(self.line)
        self._building = BuildingFolder(self._local, self.snapshot_id)
        self.folder = self._building.path
        self._stack = ExitStack()
        names = ["hashes.bin", "offsets.bin", "keys.bin", "matrix.bin"]
        names += ["scales.bin"] * (dtype == "int8") + ["content_at.bin"] * has_times + ["content.bin"] * has_contents
        self._files: dict[str, BlockWriter] = {}
        for name in names:
            self._open(name)
        self._contents = ContentIndexWriter(self.folder, most_rows, memory_bytes) if has_contents else None
        self._num_rows = 0
        self._num_key_bytes = self._last_start = 0
        self._wraps: list[int] = []
        self._block_hashes: list[str] = []

    def __enter__(self) -> SnapshotWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stack.close()
        except OSError as late:  # what was buffered found no room
            error = error or late
        finally:
            self._building.close()
        if isinstance(error, OSError) and not isinstance(error, MimRayError):
            text = f"it could not be written ({error}). What was current stays current; make room or mend the storage."
            raise ArtifactError(f"Snapshot {self.line}: {text}") from error

    def append(
        self,
        hashes: np.ndarray,
        ids: pa.LargeStringArray,
        matrix: np.ndarray,
        *,
        content_at: np.ndarray | None = None,
        digests: np.ndarray | None = None,
    ) -> None:
        """Add rows behind those that are there.

        Args:
            hashes: (n,) uint64 ascending, of the (n,) ids. matrix: (n, D) float32. content_at: (n,) int64.
            digests: (n, 16) uint8 content hashes.

        Raises:
            ArtifactError: a value that is not finite, or cannot be said in the dtype.
        """
        per_block = snapshot_files.BLOCK_BYTES // 8
        firsts = range(-self._num_rows % per_block, len(hashes), per_block)
        self._block_hashes += [f"{int(hashes[row]):016x}" for row in firsts]
        key_bytes, lengths = concatenated(ids)
        starts = self._num_key_bytes + np.cumsum(lengths) - lengths
        self._note_wraps(starts)
        self._files["hashes.bin"].write(hashes)
        self._files["offsets.bin"].write(starts.astype(np.uint32))
        self._files["keys.bin"].write(key_bytes)
        for start in range(0, len(matrix), _PIECE_ROWS):
            self._write_rows(matrix[start : start + _PIECE_ROWS])
        if content_at is not None:
            self._files["content_at.bin"].write(np.asarray(content_at, np.int64))
        if digests is not None and self._contents is not None:
            self._files["content.bin"].write(digests)
            self._contents.append(digests, self._num_rows)
        self._num_rows += len(hashes)
        self._num_key_bytes += len(key_bytes)

    def stored(self, batches: Iterable[np.ndarray], num_rows: int) -> np.ndarray:
        """The joined batches as one (num_rows, D) float32 array in a file of the folder."""
        if not num_rows:
            return np.empty((0, self._width), np.float32)
        path = self.folder / "rows-in-order"
        out = np.memmap(path, np.float32, mode="w+", shape=(num_rows, self._width))
        path.unlink()  # it lives as long as the mapping
        done = 0
        for batch in batches:
            if batch.ndim != 2 or batch.shape[1] != self._width or done + len(batch) > num_rows:
                text = f"rows of shape {batch.shape} at row {done}; expected {num_rows} rows of width {self._width}."
                raise ArtifactError(f"Snapshot {self.line}: {text}")
            out[done : done + len(batch)] = batch
            done += len(batch)
        if done != num_rows:
            raise ArtifactError(f"Snapshot {self.line}: {done} rows for {num_rows} ids.")
        return np.asarray(out)

    def publish(self, *, keep: int = 3) -> str:
        """Complete the state, make it current, and delete states beyond the newest `keep`; the state's URI.

        Where another builder made the line current at a newer Delta version meanwhile, that stays current.
        """
        end = np.array([self._num_key_bytes], np.int64)
        self._note_wraps(end)
        self._files["offsets.bin"].write(end.astype(np.uint32))
        self._files["keys.bin"].write(np.zeros(KEY_PADDING, np.uint8))
        if self._contents is not None:
            self._contents.write(self._open("content_keys.bin"), self._open("content_rows.bin"))
        self._files["hashes.bin"].flush()
        table = BucketFile(self.folder / "hashes.bin", self._num_rows)
        table.write(self._open("groups.bin"), self._open("steps.bin"))
        files = {name: file.entry for name, file in sorted(self._files.items())}
        self._stack.close()
        manifest = {
            "format": FORMAT,
            "snapshot_id": self.snapshot_id,
            **self._facts,
            "rows": self._num_rows,
            "width": self._width,
            "dtype": self._dtype,
            "created_at": artifacts.now(),
            "block_bytes": snapshot_files.BLOCK_BYTES,
            "block_hashes": self._block_hashes,
            "buckets": {"bits": table.bits, "groups": table.groups.name, "steps": table.steps.name},
            "key_wraps": self._wraps,
            "files": files,
        }
        write_manifest(self.folder, manifest)
        uri = f"{self.line}/{self.snapshot_id}"
        if self._local is not None:
            self._building.publish(self._local / self.snapshot_id)
        else:
            self._upload(uri)
        if not self._overtaken():
            switch_snapshot(self.line, self.snapshot_id)
        # What came meanwhile is another builder's, who may be about to switch to it.
        prune_snapshots(self.line, keep=keep, kept=set(snapshot_ids(self.line)) - set(self._states_before))
        return uri

    def _note_wraps(self, starts: np.ndarray) -> None:
        if len(starts):
            self._wraps += wrap_rows(starts, self._num_rows, self._last_start)
            self._last_start = int(starts[-1])

    def _write_rows(self, matrix: np.ndarray) -> None:
        if self._dtype == "int8":
            scales = np.abs(matrix).max(axis=1, initial=0.0).astype(np.float32) / np.float32(127)
            rows = np.rint(matrix / np.where(scales > 0, scales, 1)[:, None])
            finite = np.isfinite(scales).all()
            self._files["scales.bin"].write(scales)
        else:
            with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, which is refused below
                rows = matrix.astype(DTYPES[self._dtype])
            finite = np.isfinite(rows).all()
        if not finite:
            text = f"an embedding near row {self._num_rows} is not finite in {self._dtype}. Embed the items again."
            raise ArtifactError(f"Snapshot {self.line}: {text}")
        self._files["matrix.bin"].write(rows.astype(DTYPES[self._dtype], copy=False))

    def _open(self, name: str) -> BlockWriter:
        self._files[name] = self._stack.enter_context(BlockWriter(self.folder / name))
        return self._files[name]

    def _upload(self, uri: str) -> None:
        try:
            upload(self.folder, uri)
        except BaseException:
            with suppress(MimRayError, OSError):
                artifacts.remove(uri)
            raise

    def _overtaken(self) -> bool:
        """Whether the line was switched to a newer Delta version while this state was built."""
        uri = f"{self.line}/{POINTER}"
        if not artifacts.exists(uri):
            return False
        pointer = artifacts.read_json(uri)
        changed = pointer["snapshot"] != self._before
        return changed and pointer["delta_version"] > self._facts["delta_version"]
