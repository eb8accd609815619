"""A durable log of rows that many processes append to at once: behind POST /v1/events and the exposures.

    log = RowLog(f"{center}/events", SCHEMA)
    log.append(rows)                        # returns when they are safely stored: fsync locally, one object PUT elsewhere
    for segment_id, rows in log.follow().poll(): ...
    log.fold()                              # old segments become Parquet files, so that small files do not pile up
    log.read(since=yesterday)               # all rows that were appended since, each once, oldest first

    <uri>/segments/<ten seconds>/<segment id>.arrow        as the window's segments (representation_center/window_folder.py)
    <uri>/folded/<hour, UTC>/<first segment>-<hash>.parquet

A segment is deleted only after a Parquet file with its rows is durable, and that file names its segments in its metadata. So
a fold that is killed between any two steps, or beside another fold, loses nothing; the next one finds what is done already
and deletes only. Two folds at once may write a segment into two files: `read` takes each segment from one of them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa

from mim_ray import artifacts
from mim_ray.errors import ArtifactError
from mim_ray.representation_center import window_folder
from mim_ray.representation_center.data_files import segment_time
from mim_ray.serving.row_log_files import (
    SEGMENT,
    only_segments,
    read_folded,
    read_in_pieces,
    read_segments,
    segments_of,
    with_segment,
    write_folded,
)

logger = logging.getLogger("ray.serve")
KEEP_S = 60.0  # a segment's file stays this long, for those who follow the log
HOUR_NS = 3_600 * 10**9
_SEGMENTS = "segments"


@dataclass(frozen=True)
class FoldedRows:
    """What one fold did: segments and rows that came into Parquet files, segment files deleted."""

    num_segments: int = 0
    num_rows: int = 0
    num_deleted: int = 0


class RowLog:
    """
    Args:
        uri: folder of this log alone. schema: of its rows.
    """

    def __init__(self, uri: str, schema: pa.Schema) -> None:
        self.uri, self.schema = uri, schema
        self._waiting: list[tuple[pa.Table, Future[str]]] = []
        self._lock = threading.Lock()
        self._writing = threading.Lock()

    def append(self, rows: pa.Table) -> str:
        """Store rows durably; the id of their segment. What comes while another segment is written shares the next one, so
        that a busy replica writes few and larger files.

        Raises:
            StorageError, OSError: nothing is promised about these rows: they may be stored or not.
        """
        if not rows.num_rows:
            raise ValueError("A segment needs at least one row.")
        mine: Future[str] = Future()
        with self._lock:
            self._waiting.append((rows.select(self.schema.names).cast(self.schema), mine))
        with self._writing:
            if not mine.done():
                with self._lock:
                    batch, self._waiting = self._waiting, []
                self._write([part for part, _ in batch], [done for _, done in batch])
        return mine.result()

    def append_as(self, segment_id: str, rows: pa.Table) -> None:
        """Store rows durably as the segment of this id (window_folder.new_segment_id). Again with the same id and rows it
        changes nothing: for who cannot know whether a first try succeeded.

        Raises:
            StorageError, OSError: they may be stored or not.
        """
        window_folder.write_segment(self.uri, _SEGMENTS, segment_id, self._encoded([rows]))

    def follow(self) -> LogTail:
        """What comes from now on, and the segments that are not folded yet."""
        return LogTail(self)

    def read(self, since: datetime | None = None, until: datetime | None = None) -> pa.Table:
        """All rows that were appended from `since` to before `until`, in the order of their segments, with the column
        `segment_id`. Appending and folding may go on meanwhile.

        Raises:
            ArtifactError: a file is damaged.
        """
        parts = list(self.read_newest_first(since, until))
        whole = pa.concat_tables(parts) if parts else self.schema.append(pa.field(SEGMENT, pa.string())).empty_table()
        return whole.sort_by(SEGMENT)  # stable: rows of a segment keep their order

    def read_newest_first(
        self, since: datetime | None = None, until: datetime | None = None, *, skip_damaged: bool = False
    ) -> Iterator[pa.Table]:
        """The rows of `read` in pieces: what is not folded yet, then hour by hour back in time.

        Args:
            skip_damaged: tell of damaged files in the process' log, and leave them out.

        Raises:
            ArtifactError: a file is damaged.
        """
        first, last = _ns(since, 0), _ns(until, 2**63 - 1)
        # Segments before folded files: one that is folded and deleted meanwhile is in a file by then.
        waiting = {name: uri for name, uri in self._segments().items() if first <= segment_time(name) < last}
        taken: set[str] = set()
        for found, damaged in read_in_pieces(waiting):
            for error in damaged.values():
                _raise_or_log(error, skip_damaged)
            if found:
                yield pa.concat_tables([with_segment(rows, name) for name, rows in found.items()])
            taken |= found.keys()
        for uri in reversed(artifacts.list_files(f"{self.uri}/folded", ".parquet")):
            hour = _hour_ns(uri)
            if first - HOUR_NS < hour < last:
                try:
                    rows, names = read_folded(uri)
                except ArtifactError as error:
                    _raise_or_log(error, skip_damaged)
                    continue
                wanted = {name for name in names - taken if first <= segment_time(name) < last}
                if wanted:
                    yield only_segments(rows, names, wanted)
                taken |= wanted

    def first_hour(self) -> datetime | None:
        """Begin of the hour of the oldest rows; None where there are none."""
        hours = [_hour_ns(uri) for uri in artifacts.list_files(f"{self.uri}/folded", ".parquet")[:1]]
        hours += [segment_time(name) // HOUR_NS * HOUR_NS for name in list(self._segments())[:1]]
        return datetime.fromtimestamp(min(hours) / 1e9, UTC) if hours else None

    def fold(self, keep_s: float = KEEP_S, wait_s: float = 0.0) -> FoldedRows:
        """Bring the segments that are older than `keep_s` into Parquet files, then delete them. Several processes may do so.

        Args:
            wait_s: do nothing until the oldest segment is that old: so there are few files, however many processes fold.

        Raises:
            ArtifactError: a segment is damaged; all others are folded.
        """
        segments_now = self._segments()
        oldest_kept = time.time_ns() - int(keep_s * 1e9)
        if not segments_now or segment_time(next(iter(segments_now))) > time.time_ns() - int(wait_s * 1e9):
            return FoldedRows()
        by_hour: dict[str, dict[str, str]] = {}
        for name, uri in segments_now.items():
            if segment_time(name) <= oldest_kept:
                by_hour.setdefault(_hour(segment_time(name)), {})[name] = uri
        num_segments = num_rows = num_deleted = 0
        all_damaged: dict[str, ArtifactError] = {}
        for hour, segments in by_hour.items():
            folded: set[str] = set()
            try:
                for uri in artifacts.list_files(f"{self.uri}/folded/{hour}", ".parquet"):
                    folded |= segments_of(uri)
            except ArtifactError as error:  # which segments it holds is not known: this hour waits, the others do not
                all_damaged[hour] = error
                continue
            waiting = {name: uri for name, uri in segments.items() if name not in folded}
            for found, damaged in read_in_pieces(waiting):
                all_damaged |= damaged
                if found:
                    num_rows += write_folded(f"{self.uri}/folded/{hour}", found)
                    num_segments += len(found)
                    folded |= found.keys()
            done = [uri for name, uri in segments.items() if name in folded]
            artifacts.for_each(artifacts.remove, done)
            num_deleted += len(done)
        window_folder.remove_empty_folders(self.uri, _SEGMENTS)
        if all_damaged:
            raise next(iter(all_damaged.values()))
        return FoldedRows(num_segments, num_rows, num_deleted)

    def _write(self, parts: Sequence[pa.Table], done: Sequence[Future[str]]) -> None:
        try:
            content = self._encoded(parts)
            segment_id = window_folder.new_segment_id()
            try:
                window_folder.write_segment(self.uri, _SEGMENTS, segment_id, content)
            except FileNotFoundError:  # this process slept so long that its empty folder was deleted
                segment_id = window_folder.new_segment_id()
                window_folder.write_segment(self.uri, _SEGMENTS, segment_id, content)
        except BaseException as error:  # noqa: BLE001 - each of those who wait raises it
            for future in done:
                future.set_exception(error)
            return
        for future in done:
            future.set_result(segment_id)

    def _encoded(self, parts: Sequence[pa.Table]) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, self.schema) as writer:
            writer.write_table(pa.concat_tables(parts).combine_chunks())
        return bytes(sink.getvalue().to_pybytes())

    def _segments(self) -> dict[str, str]:
        return window_folder.find_segments(self.uri, _SEGMENTS)


class LogTail:
    """Follows a log. Where nothing is new, a poll costs some stats locally, one listing elsewhere."""

    def __init__(self, log: RowLog) -> None:
        self._log = log
        self._listing = window_folder.WindowListing(log.uri, _SEGMENTS)
        self._waiting: dict[str, str] = {}
        self._polled_at = time.time()

    def poll(self) -> list[pa.Table]:
        """Rows of the segments that came since the last poll, oldest first. After a long pause some may come twice.

        A damaged segment is told once in the log and left out.

        Raises:
            StorageError: the next poll brings what this one should have brought.
        """
        started, late = time.time(), []
        if started - self._polled_at > KEEP_S / 2:  # what came meanwhile may be folded and deleted by now
            since = datetime.fromtimestamp(self._polled_at - KEEP_S / 2, UTC)
            late = [rows.drop([SEGMENT]) for rows in self._log.read_newest_first(since, skip_damaged=True)][::-1]
        self._waiting |= self._listing.new()
        found, damaged = read_segments(self._waiting)
        self._waiting, self._polled_at = {}, started
        for error in damaged.values():
            logger.error("%s", error)
        return late + list(found.values())


def _raise_or_log(error: ArtifactError, skip: bool) -> None:
    if not skip:
        raise error
    logger.error("%s", error)


def _hour(time_ns: int) -> str:
    return time.strftime("%Y-%m-%dT%H", time.gmtime(time_ns // 10**9))


def _hour_ns(uri: str) -> int:
    """Begin of the hour that a folded file's folder names."""
    name = uri.rpartition("/")[0].rpartition("/")[2]
    return int(datetime.strptime(name, "%Y-%m-%dT%H").replace(tzinfo=UTC).timestamp()) * 10**9


def _ns(at: datetime | None, default: int) -> int:
    return default if at is None else int(at.timestamp() * 1e9)
