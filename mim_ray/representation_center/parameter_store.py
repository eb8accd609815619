"""CMD (paper Section 3.5): the parameter machine's face, so that compute replicas ask for rows only.

    store = ParameterStore(snapshot_uri, table=table_uri, window=window_uri)
    store.start(every_s=0.2)             # follow window and table in the background
    matrix, found, category = store.multi_get(ids)
    store.load(new_snapshot_uri)         # switch; lookups go on meanwhile
    store.take_newer()                   # switch to the newest state of the snapshot's line; `start` does so too
    store.stop()

This is the in-process form: memory maps are shared by all processes of a machine. parameter_machines.py holds tables that are
too large for one machine, or that many ask for, in actors.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa

from mim_ray.data.ids import Ids
from mim_ray.representation_center.lookup import STORAGE_PROBLEMS, EmbeddingLookup
from mim_ray.representation_center.release import check_versions
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.snapshot_line import newer_state
from mim_ray.representation_center.table import EmbeddingTable

logger = logging.getLogger(__name__)
NEWER_EVERY_S = 10.0  # how often a newer state of the snapshot's line is looked for
_NICENESS = 10  # of the thread that opens it: lookups come first


class ParameterStore:
    """The current MM embeddings of one encoder version.

    Args:
        snapshot: URI. table, window: URIs of what may hold newer rows; None: the snapshot alone.
        encoder_version: what the caller's model was trained with; None accepts any.

    Raises:
        ArtifactError: the snapshot is missing or damaged.
        VersionMismatchError: it holds another encoder version.
    """

    def __init__(
        self,
        snapshot: str,
        *,
        table: str | None = None,
        window: str | None = None,
        encoder_version: str | None = None,
    ) -> None:
        self._table = None if table is None else EmbeddingTable(table)
        self._window = window
        self._expected = encoder_version
        self._lookup = self._open(snapshot)
        self._switching = threading.Lock()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        try:
            self.take_newer()  # at once: what was purged from the log since the snapshot can be seen in a newer one alone
        except STORAGE_PROBLEMS as error:
            logger.warning("%s is read, because a newer one cannot be: %s", snapshot, error)

    def name(self, categories: Mapping[str, str]) -> None:
        """Tell the categories of items that the snapshot shows (named_categories.py). What messages named since goes before."""
        self._lookup.named = {**categories, **self._lookup.named}

    @property
    def encoder_version(self) -> str:
        return self._lookup.encoder_version

    @property
    def width(self) -> int:
        return self._lookup.snapshot.width

    @property
    def lookup(self) -> EmbeddingLookup:
        """What answers now; `load` brings another one."""
        return self._lookup

    def follows(self, lookup: EmbeddingLookup) -> bool:
        """Whether a thread keeps it up to date: not after `stop`, nor when another one has taken its place."""
        return bool(self._threads) and lookup is self._lookup

    @property
    def num_overlay_rows(self) -> int:
        """Items that came after the snapshot."""
        return self._lookup.num_overlay_rows

    def multi_get(self, ids: Ids) -> tuple[np.ndarray, np.ndarray, pa.Array]:
        """(n, D) float32 embeddings, zeros where unknown; (n,) bool found; (n,) category of items newer than the first snapshot."""
        result = self._lookup.get(ids)
        return result.matrix, result.found, result.category

    def refresh(self) -> int:
        """Take in new window messages now; the number of rows that changed something."""
        with self._switching:
            return self._lookup.refresh()

    def load(self, snapshot: str) -> None:
        """Switch to another snapshot of the same encoder version. Lookups that run keep the old one."""
        newer = self._open(snapshot)
        with self._switching:  # what the one before has seen, this one has
            self._lookup.catch_up()
            newer.catch_up()
            newer.named = _named(self._lookup)
            self._lookup = newer

    def take_newer(self) -> bool:
        """Switch to the current state of the snapshot's line where that shows later commits, so that no more is held in memory
        than what came since; whether there was one.

        Raises:
            ArtifactError, OSError: it cannot be opened. The one before goes on.
        """
        newer = None if self._table is None else newer_state(self._lookup.snapshot.uri)
        if newer is not None:
            self.load(newer)
        return newer is not None

    def start(self, every_s: float = 0.2) -> None:
        """Follow window and table, and the snapshot's line, in threads. What fails is logged and tried again."""
        if self._threads:
            return
        stop = self._stop = threading.Event()
        for name, work, often_s in (
            ("window-tail", self._follow, every_s),
            ("newer-snapshot", self._follow_line, NEWER_EVERY_S),
        ):
            self._threads.append(threading.Thread(target=work, args=(often_s, stop), daemon=True, name=name))
            self._threads[-1].start()

    def stop(self) -> None:
        self._stop.set()
        threads, self._threads = self._threads, []
        for thread in threads[:1]:  # the other may be reading a large snapshot, and ends after it
            thread.join()

    def _open(self, uri: str) -> EmbeddingLookup:
        return EmbeddingLookup(self._checked(uri), table=self._table, window=self._window)

    def _checked(self, uri: str) -> Snapshot:
        snapshot = Snapshot.open(uri)
        expected = self._expected
        if expected is not None:
            check_versions(expected, snapshot.encoder_version, expected_by="The model", found_in=f"snapshot {uri}")
        return snapshot

    def _follow(self, every_s: float, stop: threading.Event) -> None:
        _repeat(every_s, stop, self.refresh, "New items are not read at the moment: %s")

    def _follow_line(self, every_s: float, stop: threading.Event) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)  # Linux: of this thread alone
        _repeat(every_s, stop, self.take_newer, "A newer snapshot is not read at the moment: %s")


def _named(lookup: EmbeddingLookup) -> dict[str, str]:
    """Categories that messages have named until now."""
    named = dict(lookup.named)
    rows = np.arange(lookup.overlay.num_rows)
    for item, category in zip(
        lookup.overlay.keys(rows).to_pylist(), lookup.overlay.category(rows).to_pylist(), strict=True
    ):
        if category is None:
            named.pop(item, None)
        else:
            named[item] = category
    return named


def _repeat(every_s: float, stop: threading.Event, work: Callable[[], object], problem: str) -> None:
    last = ""
    while not stop.wait(every_s):
        try:
            work()
            last = ""
        except STORAGE_PROBLEMS as error:  # storage away for a moment, or something damaged: keep serving
            if str(error) != last:
                logger.warning(problem, error)
            last = str(error)
