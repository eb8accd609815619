"""From the Delta log to a snapshot: the current rows of an encoder version, in bounded memory whatever the log's size.

A line's next state is made from the state before and the log's rows since, the first one from the whole log (snapshot_merge.py
tells why both give the same files). What is read of the log is read once, file by file. Where its rows do not fit into memory
they are spilled to disk by the range of their ids' hashes, so that all rows of an item come together; then range by range the
current rows are chosen, sorted and written.

*When the state before cannot serve* (it is damaged, of another dtype, or shows what a purge has taken out of the log since) the
whole log is read. A purge rewrites the log from its beginning: each state notes the log's first file, and where that is not there any
more, the state does not serve. A merge that takes in the first file has the same effect, and has rewritten most of the log itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from mim_ray.errors import ArtifactError
from mim_ray.representation_center.data_files import DataFile
from mim_ray.representation_center.deletions import Deletions
from mim_ray.representation_center.log_rows import RowRanges, read_rows, row_bytes, width_of
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.snapshot_files import read_manifest
from mim_ray.representation_center.snapshot_line import current_snapshot
from mim_ray.representation_center.snapshot_merge import Target, merged_rows
from mim_ray.representation_center.snapshot_writer import SnapshotWriter
from mim_ray.representation_center.table import EmbeddingTable

MEMORY_BYTES = 2**28


def build_snapshot(
    table: EmbeddingTable,
    encoder_version: str,
    line: str,
    *,
    dtype: str = "float32",
    keep: int = 3,
    memory_bytes: int = MEMORY_BYTES,
    whole_log: bool = False,
) -> Snapshot:
    """Bring the current rows of `encoder_version` into a new state of `line`, switch to it, and open it.

    Killed, or without room on the disk, the state that was current stays current. `base` and `whole_log_because` of the result
    say what it was made from.

    Args:
        line: URI of the line, center/snapshots/<encoder_version>.
        keep: how many states stay for a roll-back, the new one included.
        memory_bytes: what the rows in memory may take (the process takes about twice that, and no more for a larger log);
            when there are more, rows are spilled to disk, beside the line or, where that is remote, in $TMPDIR.
        whole_log: read all of it, even if the state before can serve.

    Raises:
        ArtifactError: the table has no rows of this encoder version, or rows of several widths; no room on the disk.
    """
    delta_version, files = table.scan(encoder_version)
    if not any(file.num_rows for file in files):
        known = ", ".join(table.encoder_versions()) or "none"
        raise ArtifactError(
            f"{table.uri} has no embeddings of encoder version {encoder_version} (it has: {known}). Run the extraction."
        )
    base, because = None, "it was asked for" if whole_log else None
    if not whole_log:
        base, because = _base(line, encoder_version, dtype, delta_version, files)
    shown = -1 if base is None else base.delta_version
    since = [file for file in files if file.commit_version > shown]
    num_rows = sum(file.num_rows for file in since)
    width = next(width_of(file) for file in files if file.num_rows) if base is None else base.width
    num_ranges = max(1, -(-num_rows * row_bytes(width) // memory_bytes))
    batch_rows = int(np.clip(memory_bytes // (8 * row_bytes(width)), 256, 65_536))
    deletions = cache(lambda: Deletions([file for file in files if file.commit_version <= shown]))
    with SnapshotWriter(
        line,
        encoder_version=encoder_version,
        delta_version=delta_version,
        width=width,
        dtype=dtype,
        most_rows=num_rows + (0 if base is None else base.num_rows),
        has_times=True,
        has_contents=True,
        memory_bytes=memory_bytes // 2,
        origin={
            "base": None if base is None else base.snapshot_id,
            "whole_log_because": because,
            "first_file": _first_file(files),
        },
    ) as writer:
        ranges = RowRanges(writer.folder, num_ranges, memory_bytes // 4)
        for file in since:
            for rows in read_rows(file, width, batch_rows, table.uri):
                ranges.add(rows)
        target = Target(width, dtype, f"Snapshot {line}")
        for part in range(num_ranges):
            for piece in merged_rows(base, ranges.pop(part, memory_bytes), (part, num_ranges), target, deletions):
                writer.write(piece)
        uri = writer.publish(keep=keep)
    return Snapshot.open(uri, verify=False)


def _base(
    line: str, encoder_version: str, dtype: str, delta_version: int, files: Sequence[DataFile]
) -> tuple[Snapshot | None, str | None]:
    """The line's current state, verified; None, and why, where it cannot serve."""
    state = current_snapshot(line)
    if state is None:
        return None, "the line has no state yet"
    try:
        manifest = read_manifest(f"{line}/{state}")
        reason = _unfit(manifest, encoder_version, dtype, delta_version, files)
        if reason is None:
            return Snapshot.open(f"{line}/{state}"), None
    except (ArtifactError, FileNotFoundError) as error:
        reason = str(error)
    return None, reason


def _unfit(
    manifest: dict[str, Any], encoder_version: str, dtype: str, delta_version: int, files: Sequence[DataFile]
) -> str | None:
    name = f"state {manifest['snapshot_id']}"
    if (manifest["encoder_version"], manifest["dtype"]) != (encoder_version, dtype):
        return f"{name} is {manifest['dtype']} of encoder version {manifest['encoder_version']}"
    if "first_file" not in manifest or not manifest["rows"]:
        return f"{name} has no rows of the log"
    if manifest["delta_version"] > delta_version:
        return f"{name} shows Delta version {manifest['delta_version']}, the table is at {delta_version}"
    if not any(file.path == manifest["first_file"] for file in files):
        return f"since {name} the log was rewritten from its beginning"
    return None


def _first_file(files: Sequence[DataFile]) -> str:
    """The file that every purge replaces."""
    return min(files, key=lambda file: (file.commit_version, file.path)).path
