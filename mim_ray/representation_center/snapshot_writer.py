"""Writes a snapshot state beside the current one of its line and switches the line to it (layout: snapshot.py).

    with SnapshotWriter(line, …) as writer:                             # rows come sorted, in pieces of any size
        writer.append(hashes, ids, matrix, …)                           # or writer.write(StoredRows(…))
        writer.publish()

Killed at any moment, or without room on the disk, the state that was current stays current.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from types import TracebackType

import numpy as np
import pyarrow as pa

from mim_ray import artifacts
from mim_ray.errors import ArtifactError, MimRayError
from mim_ray.representation_center import snapshot_files
from mim_ray.representation_center.buckets import BucketFile
from mim_ray.representation_center.content_hashes import ContentIndexWriter
from mim_ray.representation_center.key_index import (
    KEY_PADDING,
    concatenated,
    wrap_rows,
)
from mim_ray.representation_center.snapshot_files import FORMAT, BlockWriter, sync_folder, upload, write_manifest
from mim_ray.representation_center.snapshot_line import (
    POINTER,
    BuildingFolder,
    current_snapshot,
    new_snapshot_id,
    prune_snapshots,
    snapshot_ids,
    switch_snapshot,
)
from mim_ray.representation_center.stored_rows import DTYPES, PIECE_ROWS, StoredRows

MEMORY_BYTES = 2**28


class SnapshotWriter:
    """Writes rows that come in the order of their hashes. Leaving the block without `publish` leaves nothing behind.

    Args:
        most_rows: upper bound of the number of rows, for the memory that sorting the contents takes.
        has_times, has_contents: whether the rows have content_at and digests.
        origin: more entries of the manifest, which say what the rows were made from.
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
        origin: Mapping[str, str | None] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ArtifactError(f"Snapshot {line}: dtype {dtype!r} is none of {', '.join(DTYPES)}.")
        self.line = line.rstrip("/")
        self.snapshot_id = new_snapshot_id()
        self._width, self._dtype = width, dtype
        self._facts = {"encoder_version": encoder_version, "delta_version": int(delta_version), **(origin or {})}
        self._local = artifacts.local_path(self.line)
        self._before = current_snapshot(self.line)
        self._states_before = snapshot_ids(self.line)
        self._building = BuildingFolder(self._local, self.snapshot_id)
        self.folder = self._building.path
        self._stack = ExitStack()
        self._hashing = self._stack.enter_context(ThreadPoolExecutor(1))
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
        for start in range(0, len(hashes), PIECE_ROWS):
            piece = slice(start, start + PIECE_ROWS)
            rows = StoredRows.encoded(
                hashes[piece],
                ids[piece],
                matrix[piece],
                dtype=self._dtype,
                source=f"Snapshot {self.line}",
                content_at=None if content_at is None else content_at[piece],
                digests=None if digests is None else digests[piece],
            )
            self.write(rows)

    def write(self, rows: StoredRows) -> None:
        """Add rows behind those that are there. Their arrays must stay as they are until the state is published."""
        per_block = snapshot_files.BLOCK_BYTES // 8
        firsts = range(-self._num_rows % per_block, len(rows), per_block)
        self._block_hashes += [f"{int(rows.hashes[row]):016x}" for row in firsts]
        key_bytes, lengths = concatenated(rows.ids)
        starts = self._num_key_bytes + np.cumsum(lengths) - lengths
        self._note_wraps(starts)
        self._files["hashes.bin"].write(rows.hashes)
        self._files["offsets.bin"].write(starts.astype(np.uint32))
        self._files["keys.bin"].write(key_bytes)
        self._files["matrix.bin"].write(rows.matrix)
        if rows.scales is not None:
            self._files["scales.bin"].write(rows.scales)
        if rows.content_at is not None:
            self._files["content_at.bin"].write(rows.content_at)
        if rows.digests is not None and self._contents is not None:
            self._files["content.bin"].write(rows.digests)
            self._contents.append(rows.digests, self._num_rows)
        self._num_rows += len(rows)
        self._num_key_bytes += len(key_bytes)

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
            sync_folder(self.folder)
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

    def _open(self, name: str) -> BlockWriter:
        self._files[name] = self._stack.enter_context(BlockWriter(self.folder / name, self._hashing))
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
