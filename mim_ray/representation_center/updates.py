"""RIM (paper Section 3.5): new items as short-window messages, durable before they are acknowledged.

    segment_id = append_segment(window, rows, encoder_version="csft-…")    # returns when the file is safely stored
    tail = WindowTail(window, "csft-…"); tail.poll()                       # segments that came since the last poll
    fold(window, table)                                                    # into the Delta log, each segment once

`window` is the URI of center/window. A segment is one Arrow file center/window/<encoder_version>/<segment_id>.arrow with the
columns of `WINDOW_SCHEMA`; `segment_rows` builds its rows. Segment ids sort by the time they were written. Folding commits
the rows under their segment's id (the commit mark), then deletes the files once they are `keep_s` old, so that readers that
tail the folder have seen them. Killed in between, the next fold finds the marks in the table and only deletes.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import pyarrow as pa

from mim_ray import artifacts
from mim_ray.data.schema import TIME
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.data_files import Fragment, write_fragment
from mim_ray.representation_center.table import EmbeddingTable, PartlyCommittedError

WINDOW_SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("embedding", pa.list_(pa.float32())),
        ("category", pa.string()),
        ("content_hash", pa.string()),
        ("content_at", TIME),
        ("deleted", pa.bool_()),
    ]
)
MAX_FOLDED_SEGMENTS = 5_000  # in one commit

_last_name = 0
_name_lock = threading.Lock()


@dataclass(frozen=True)
class FoldResult:
    """What one fold did: segments and rows that entered the table, segment files deleted."""

    num_segments: int
    num_rows: int
    num_deleted: int


def segment_rows(
    item_ids: Sequence[str],
    embeddings: np.ndarray,
    *,
    content_hashes: Sequence[str],
    content_at: Sequence[datetime | None],
    categories: Sequence[str | None] | None = None,
    deleted: Sequence[bool] | None = None,
) -> pa.Table:
    """Rows of a segment.

    Args:
        item_ids: (n,) each at most once. embeddings: (n, D) float32.
        content_at: (n,) time of the content; older content never replaces newer.
    """
    num = len(item_ids)
    if len(set(item_ids)) != num:
        raise ValueError("A segment holds each item at most once; keep the newest.")
    flat = pa.array(np.ascontiguousarray(embeddings, np.float32).reshape(-1))
    offsets = pa.array(np.arange(num + 1, dtype=np.int32) * (embeddings.shape[1] if num else 0))
    columns = {
        "item_id": pa.array(item_ids, pa.string()),
        "embedding": pa.ListArray.from_arrays(offsets, flat),
        "category": pa.array([None] * num if categories is None else categories, pa.string()),
        "content_hash": pa.array(content_hashes, pa.string()),
        "content_at": pa.array(content_at, TIME),
        "deleted": pa.array([False] * num if deleted is None else deleted, pa.bool_()),
    }
    return pa.table(columns).cast(WINDOW_SCHEMA)


def append_segment(window: str, rows: pa.Table, *, encoder_version: str) -> str:
    """Store rows of `segment_rows` durably (fsync and rename locally, one object PUT elsewhere); the segment's id."""
    if not rows.num_rows:
        raise ValueError("A segment needs at least one row.")
    segment_id = _new_name()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, WINDOW_SCHEMA) as writer:
        writer.write_table(rows.select(WINDOW_SCHEMA.names))
    artifacts.write_bytes(_segment_uri(window, encoder_version, segment_id), sink.getvalue().to_pybytes())
    folder = artifacts.local_path(f"{window}/{encoder_version}")
    if folder is not None:
        artifacts.sync(folder)
    return segment_id


def list_segments(window: str, encoder_version: str) -> list[str]:
    """Ids of the segments in the folder, oldest first."""
    files = artifacts.list_files(f"{window}/{encoder_version}", ".arrow")
    return sorted(file.rpartition("/")[2].removesuffix(".arrow") for file in files)


def read_segment(window: str, encoder_version: str, segment_id: str) -> pa.Table:
    """
    Raises:
        ArtifactError: it is gone (folded and deleted) or damaged.
    """
    uri = _segment_uri(window, encoder_version, segment_id)
    content = artifacts.read_bytes(uri)
    try:
        return pa.ipc.open_file(pa.BufferReader(content)).read_all()
    except pa.ArrowInvalid as error:
        raise ArtifactError(
            f"{uri} is damaged ({error}). Move it out of the folder and send its items to the new-item encoder again."
        ) from None


class WindowTail:
    """Follows one encoder version's folder. A poll that finds nothing new costs one stat locally, one listing elsewhere."""

    def __init__(self, window: str, encoder_version: str) -> None:
        self.window, self.encoder_version = window, encoder_version
        self._seen: set[str] = set()
        self._quiet_since: int | None = None

    def poll(self) -> list[tuple[str, pa.Table]]:
        """(segment id, rows) of the segments that came since the last poll, oldest first."""
        folder = artifacts.local_path(f"{self.window}/{self.encoder_version}")
        changed_at = None
        if folder is not None:
            try:
                changed_at = os.stat(folder).st_mtime_ns
            except FileNotFoundError:
                return []
            if changed_at == self._quiet_since:
                return []
        # A file that comes within the clock tick of this listing would not change the folder's time: look again later.
        settled = changed_at is not None and time.time_ns() - changed_at > 1_000_000_000
        self._quiet_since = changed_at if settled else None
        names = list_segments(self.window, self.encoder_version)
        fresh = [name for name in names if name not in self._seen]
        found = []
        for name in fresh:
            try:
                found.append((name, read_segment(self.window, self.encoder_version, name)))
            except ArtifactError:
                if artifacts.exists(_segment_uri(self.window, self.encoder_version, name)):
                    raise
        self._seen = set(names)
        return found


def fold(window: str, table: EmbeddingTable, *, keep_s: float = 60.0) -> FoldResult:
    """Bring all segments of all encoder versions into the table, each exactly once, and delete what is old enough.

    Several processes may fold at once. The table is made if there is none.

    Args:
        keep_s: a folded segment's file stays this long, for readers that tail the folder.
    """
    if not artifacts.exists(window):
        return FoldResult(0, 0, 0)
    table.create()
    versions = sorted({uri[len(window) + 1 :].partition("/")[0] for uri in artifacts.list_files(window, ".arrow")})
    results = [_fold_version(window, table, version, keep_s) for version in versions]
    return FoldResult(
        sum(result.num_segments for result in results),
        sum(result.num_rows for result in results),
        sum(result.num_deleted for result in results),
    )


def _fold_version(window: str, table: EmbeddingTable, encoder_version: str, keep_s: float) -> FoldResult:
    segments = list_segments(window, encoder_version)  # what comes during this fold waits for the next
    num_segments = num_rows = 0
    while True:
        folded = table.contains(encoder_version, segments)
        new = [segment for segment in segments if segment not in folded][:MAX_FOLDED_SEGMENTS]
        if not new:
            break
        try:
            fragment = _write(window, table.uri, encoder_version, new)
            table.commit([fragment])
        except PartlyCommittedError:
            continue  # another process folded some of them meanwhile
        except ArtifactError:
            here = set(list_segments(window, encoder_version))
            if here.issuperset(new):
                raise
            segments = [segment for segment in segments if segment in here]  # another process even deleted some
            continue
        num_segments += len(new)
        num_rows += fragment.num_rows
    oldest_kept = time.time_ns() - int(keep_s * 1e9)
    old = [segment for segment in segments if int(segment.partition("-")[0]) <= oldest_kept]
    for segment in old:
        artifacts.remove(_segment_uri(window, encoder_version, segment))
    return FoldResult(num_segments, num_rows, len(old))


def _write(window: str, table_uri: str, encoder_version: str, segments: Sequence[str]) -> Fragment:
    tables = []
    for segment in segments:
        rows = read_segment(window, encoder_version, segment)
        tables.append(rows.append_column("shard_id", pa.repeat(pa.scalar(segment), rows.num_rows)))
    return write_fragment(table_uri, pa.concat_tables(tables), encoder_version=encoder_version, origin="realtime")


def _segment_uri(window: str, encoder_version: str, segment_id: str) -> str:
    return f"{window}/{encoder_version}/{segment_id}.arrow"


def _new_name() -> str:
    """Sorts by time; unique across processes; increasing within one."""
    global _last_name
    with _name_lock:
        _last_name = max(time.time_ns(), _last_name + 1)
        return f"{_last_name:020d}-{uuid.uuid4().hex[:8]}"
