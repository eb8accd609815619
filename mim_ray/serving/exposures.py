"""What serving showed, as rows of `exposures` (SPEC section 2): clicks and revenue join them by request_id and item_id.

Written behind the rankings' back: a ranking puts its answer into a bounded queue and goes on; a thread stores what came every
EVERY_S seconds as one durable segment of the log center/exposures, which is folded into Parquet like the events'. Where
storage is slow or away the queue fills, and what does not fit is dropped and counted. A replica that Serve stops stores what waits
at its end; a process that is killed loses it, a second's worth at most while storage works.

Users are hashed, with the key in the environment variable MIM_RAY_USER_HASH_KEY where there is one: without a key, whoever
has both the log and a list of user ids can tell who is who.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
import weakref
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mim_ray.config.scenario import Serving
from mim_ray.data.schema import TIME
from mim_ray.representation_center import window_folder
from mim_ray.serving.background import repeat
from mim_ray.serving.row_log import RowLog

logger = logging.getLogger("ray.serve")
EVERY_S = 1.0
MAX_QUEUED = 20_000  # requests
MAX_SEGMENT = 2_000  # requests in one segment
SCHEMA = pa.schema(
    [
        ("request_id", pa.string()),
        ("user_hash", pa.string()),
        ("arm", pa.string()),
        ("release", pa.string()),
        ("item_id", pa.string()),
        ("position", pa.int32()),  # 1 is the top
        ("timestamp", TIME),
    ]
)


class Shown(NamedTuple):
    """One answer."""

    request_id: str
    user_hash: str
    arm: str | None
    release: str
    item_ids: list[str]  # from the top
    timestamp: int  # microseconds


class Exposures:
    """
    Args:
        log: from `exposure_log`.

    Attributes:
        num_dropped: requests that did not fit into the queue.
    """

    def __init__(self, log: RowLog, *, max_queued: int = MAX_QUEUED) -> None:
        self.num_dropped = 0
        self._log = log
        self._queue: queue.Queue[Shown] = queue.Queue(max_queued)
        self._batch: tuple[str, list[Shown]] | None = (
            None  # and the id of its segment, which stays when it is tried again
        )
        self._writing = threading.Lock()
        self._stop = threading.Event()

    @classmethod
    def open(cls, center: str, serving: Serving) -> Exposures:
        """It writes until `stop`, or until nobody holds it."""
        exposures = cls(exposure_log(center))
        repeat(exposures, exposures._stop, "write-exposures", lambda: EVERY_S, Exposures.write)
        folding = serving.fold_events_s
        repeat(
            exposures, exposures._stop, "fold-exposures", lambda: folding / 4, lambda it: it._log.fold(wait_s=folding)
        )
        weakref.finalize(exposures, _write_rest, exposures._queue, exposures._log)  # also when the process ends
        return exposures

    def add(self, shown: Shown) -> None:
        """Returns at once."""
        try:
            self._queue.put_nowait(shown)
        except queue.Full:
            self.num_dropped += 1
            if self.num_dropped & (self.num_dropped - 1) == 0:  # 1, 2, 4, …: the log must not fill up as well
                logger.warning("%d answers so far were not logged as exposures: storage is too slow", self.num_dropped)

    def write(self) -> None:
        """Store what waits.

        Raises:
            StorageError, OSError: it goes on waiting.
        """
        with self._writing:
            while True:
                if self._batch is None:
                    self._batch = (window_folder.new_segment_id(), _take(self._queue, MAX_SEGMENT))
                segment_id, answers = self._batch
                rows = rows_of(answers)
                if rows.num_rows:
                    self._log.append_as(segment_id, rows)
                self._batch = None
                if not answers:
                    return

    def stop(self) -> None:
        """Store what waits, and take no more care of what comes."""
        self._stop.set()
        self.write()

    def close(self) -> None:
        """`stop` at the end of a process: what cannot be stored now is lost, and told."""
        try:
            self.stop()
        except Exception:
            logger.exception("the last answers could not be logged as exposures")


def exposure_log(center: str) -> RowLog:
    """The log of exposures below a representation center."""
    return RowLog(f"{center}/exposures", SCHEMA)


def user_hash(user_id: str) -> str:
    """32 hexadecimal digits."""
    key = os.environ.get("MIM_RAY_USER_HASH_KEY", "").encode()
    return hashlib.blake2b(
        user_id.encode(), digest_size=16, key=hashlib.sha256(key).digest() if key else b""
    ).hexdigest()


def shown_now(
    request_id: str, user_id: str, arm: str | None, release: str, item_ids: Sequence[str], max_items: int
) -> Shown:
    """The first `max_items` of an answer that is given now."""
    now = round(datetime.now(UTC).timestamp() * 1e6)
    return Shown(request_id, user_hash(user_id), arm, release, list(item_ids[:max_items]), now)


def rows_of(answers: Sequence[Shown]) -> pa.Table:
    """Rows of SCHEMA, one for each item."""
    sizes = np.array([len(shown.item_ids) for shown in answers], np.int64)
    answer = pa.array(np.repeat(np.arange(len(answers)), sizes))
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    columns = {
        "request_id": pa.array([shown.request_id for shown in answers], pa.string()).take(answer),
        "user_hash": pa.array([shown.user_hash for shown in answers], pa.string()).take(answer),
        "arm": pa.array([shown.arm for shown in answers], pa.string()).take(answer),
        "release": pa.array([shown.release for shown in answers], pa.string()).take(answer),
        "item_id": pa.array([item for shown in answers for item in shown.item_ids], pa.string()),
        "position": pa.array(np.arange(len(starts)) - starts + 1, pa.int32()),
        "timestamp": pa.array([shown.timestamp for shown in answers], pa.int64()).take(answer).cast(TIME),
    }
    return pa.table(columns, schema=SCHEMA)


def _take(waiting: queue.Queue[Shown], most: int) -> list[Shown]:
    taken: list[Shown] = []
    while len(taken) < most:
        try:
            taken.append(waiting.get_nowait())
        except queue.Empty:
            break
    return taken


def _write_rest(waiting: queue.Queue[Shown], log: RowLog) -> None:
    rows = rows_of(_take(waiting, MAX_QUEUED))
    if rows.num_rows:
        log.append(rows)
