"""RIM (paper Section 3.5): new items as short-window messages, durable before they are acknowledged.

    segment_id = append_segment(window, rows, encoder_version="csft-…")    # returns when the file is safely stored
    tail = WindowTail(window, "csft-…"); tail.poll()                       # segments that came since the last poll
    fold(window, table)                                                    # into the Delta log, each segment once

`window` is the URI of center/window. A segment is one Arrow file below it (window_folder.py says where) with the columns of
`WINDOW_SCHEMA`; `segment_rows` builds its rows. Segment ids sort by the time they were written. Folding commits the rows
under their segment's id (the commit mark), then deletes the files once they are `keep_s` old, so that readers that tail the
folder have seen them. Killed in between, the next fold finds the marks in the table and only deletes.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice

import numpy as np
import pyarrow as pa

from mim_ray import artifacts
from mim_ray.data.schema import TIME
from mim_ray.errors import ArtifactError
from mim_ray.representation_center import window_folder
from mim_ray.representation_center.data_files import Fragment, segment_time, write_fragment
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
MAX_FOLDED_BYTES = 64 * 2**20
READ_AT_ONCE = 64  # between two looks at MAX_FOLDED_BYTES


@dataclass(frozen=True)
class FoldResult:
    """What one fold did: segments and rows that entered the table, segment files deleted."""

    num_segments: int = 0
    num_rows: int = 0
    num_deleted: int = 0

    def __add__(self, other: FoldResult) -> FoldResult:
        return FoldResult(
            self.num_segments + other.num_segments,
            self.num_rows + other.num_rows,
            self.num_deleted + other.num_deleted,
        )


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
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, WINDOW_SCHEMA) as writer:
        writer.write_table(rows.select(WINDOW_SCHEMA.names))
    content = sink.getvalue().to_pybytes()
    segment_id = window_folder.new_segment_id()
    try:
        window_folder.write_segment(window, encoder_version, segment_id, content)
    except FileNotFoundError:  # this process slept so long that its empty folder was deleted
        segment_id = window_folder.new_segment_id()
        window_folder.write_segment(window, encoder_version, segment_id, content)
    return segment_id


def list_segments(window: str, encoder_version: str) -> list[str]:
    """Ids of the segments in the folder, oldest first."""
    return list(window_folder.find_segments(window, encoder_version))


class WindowTail:
    """Follows one encoder version's folder. A poll lists only the ten-second folders that changed; where nothing is new it
    costs a stat for each of them locally, one listing elsewhere."""

    def __init__(self, window: str, encoder_version: str) -> None:
        self.window, self.encoder_version = window, encoder_version
        self._listing = window_folder.WindowListing(window, encoder_version)
        self._waiting: dict[str, str] = {}

    def poll(self, known: Collection[str] = ()) -> list[tuple[str, pa.Table]]:
        """(segment id, rows) of the segments that came since the last poll, oldest first.

        Args:
            known: segments that the caller has already; they are left out, unread.

        Raises:
            ArtifactError: a segment is damaged, and nothing else is new. Later polls go on with those that come.
        """
        self._waiting |= {name: uri for name, uri in self._listing.new().items() if name not in known}
        found, damaged, _ = _read_all(self._waiting)
        self._waiting = {name: self._waiting[name] for name in damaged}
        if damaged and not found:
            raise next(iter(damaged.values()))
        return list(found.items())


def fold(window: str, table: EmbeddingTable, *, keep_s: float = 60.0) -> FoldResult:
    """Bring all segments of all encoder versions into the table, each exactly once, and delete what is old enough.

    Several processes may fold at once. The table is made if there is none.

    Args:
        keep_s: a folded segment's file stays this long, for readers that tail the folder.

    Raises:
        ArtifactError: a segment is damaged; all others are folded.
    """
    if not artifacts.exists(window):
        return FoldResult()
    table.create()
    done = FoldResult()
    damaged: dict[str, ArtifactError] = {}
    for version in window_folder.encoder_versions(window):
        done += _fold_version(window, table, version, keep_s, damaged)
    if damaged:
        raise next(iter(damaged.values()))
    return done


def _fold_version(
    window: str, table: EmbeddingTable, encoder_version: str, keep_s: float, damaged: dict[str, ArtifactError]
) -> FoldResult:
    segments = window_folder.find_segments(window, encoder_version)  # what comes during this fold waits for the next
    folded = table.contains(encoder_version, segments)
    waiting = {name: uri for name, uri in segments.items() if name not in folded}
    num_segments = num_rows = 0
    while waiting:
        found, bad, num_read = _read_all(waiting, MAX_FOLDED_SEGMENTS, MAX_FOLDED_BYTES)
        damaged |= bad
        if found:
            fragment = _write(table.uri, encoder_version, found)
            try:
                table.commit([fragment])
            except PartlyCommittedError:  # another process folded some of them meanwhile
                there = table.contains(encoder_version, waiting)
                waiting = {name: uri for name, uri in waiting.items() if name not in there}
                folded |= there
                continue
            num_segments += len(found)
            num_rows += fragment.num_rows
            folded |= found.keys()
        waiting = dict(islice(waiting.items(), num_read, None))
    oldest_kept = time.time_ns() - int(keep_s * 1e9)
    old = [uri for name, uri in segments.items() if name in folded and segment_time(name) <= oldest_kept]
    artifacts.for_each(artifacts.remove, old)
    window_folder.remove_empty_folders(window, encoder_version)
    return FoldResult(num_segments, num_rows, len(old))


def _write(table_uri: str, encoder_version: str, segments: Mapping[str, pa.Table]) -> Fragment:
    rows = [
        table.append_column("shard_id", pa.repeat(pa.scalar(name), table.num_rows)) for name, table in segments.items()
    ]
    return write_fragment(table_uri, pa.concat_tables(rows), encoder_version=encoder_version, origin="realtime")


def _read_all(
    uris: Mapping[str, str], max_segments: int | None = None, max_bytes: float = float("inf")
) -> tuple[dict[str, pa.Table], dict[str, ArtifactError], int]:
    """The first segments, in order: (rows by id, errors of damaged ones by id, number of segments looked at).

    What is gone by now (folded and deleted by another process) is in neither.
    """
    found: dict[str, pa.Table] = {}
    damaged: dict[str, ArtifactError] = {}
    num = num_bytes = 0
    wanted = list(islice(uris.items(), max_segments))
    while num < len(wanted) and num_bytes < max_bytes:
        names, some = zip(*wanted[num : num + READ_AT_ONCE], strict=True)
        for name, result in zip(names, artifacts.for_each(_read_or_error, some), strict=True):
            if isinstance(result, pa.Table):
                found[name] = result
                num_bytes += result.nbytes
            elif result is not None:
                damaged[name] = result
        num += len(names)
    return found, damaged, num


def _read_or_error(uri: str) -> pa.Table | ArtifactError | None:
    """The rows; what is wrong with them; None where the file is gone."""
    try:
        return _read(uri)
    except ArtifactError as error:
        return error if artifacts.exists(uri) else None


def _read(uri: str) -> pa.Table:
    content = artifacts.read_bytes(uri)
    try:
        return pa.ipc.open_file(pa.BufferReader(content)).read_all()
    except pa.ArrowInvalid as error:
        raise ArtifactError(
            f"{uri} is damaged ({error}). Move it out of the folder and send its items to the new-item encoder again."
        ) from None
