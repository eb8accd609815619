"""CMD (paper Section 3.5): the parameter machine's face, so that compute replicas ask for rows only.

    store = ParameterStore(snapshot_uri, table=table_uri, window=window_uri)
    store.start(every_s=0.2)             # follow window and table in the background
    matrix, found, category = store.multi_get(ids)
    store.load(new_snapshot_uri)         # switch; lookups go on meanwhile
    store.stop()

This is the in-process form: memory maps are shared by all processes of a machine. parameter_machines.py holds tables that are
too large for one machine, or that many ask for, in actors.
"""

from __future__ import annotations

import logging
import threading

import numpy as np
import pyarrow as pa

from mim_ray.data.ids import Ids
from mim_ray.representation_center.lookup import STORAGE_PROBLEMS, EmbeddingLookup
from mim_ray.representation_center.release import check_versions
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.table import EmbeddingTable

logger = logging.getLogger(__name__)


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
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

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

    @property
    def num_overlay_rows(self) -> int:
        """Items that came after the snapshot."""
        return self._lookup.num_overlay_rows

    def multi_get(self, ids: Ids) -> tuple[np.ndarray, np.ndarray, pa.Array]:
        """(n, D) float32 embeddings, zeros where unknown; (n,) bool found; (n,) category of items newer than the snapshot."""
        result = self._lookup.get(ids)
        return result.matrix, result.found, result.category

    def refresh(self) -> int:
        """Take in new window messages now; the number of rows that changed something."""
        return self._lookup.refresh()

    def load(self, snapshot: str) -> None:
        """Switch to another snapshot of the same encoder version. Lookups that run keep the old one."""
        self._lookup = self._open(snapshot)

    def start(self, every_s: float = 0.2) -> None:
        """Follow window and table in a thread. A poll that fails is logged and tried again."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._follow, args=(every_s,), daemon=True, name="window-tail")
            self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def _open(self, uri: str) -> EmbeddingLookup:
        snapshot = Snapshot.open(uri)
        expected = self._expected
        if expected is not None:
            check_versions(expected, snapshot.encoder_version, expected_by="The model", found_in=f"snapshot {uri}")
        return EmbeddingLookup(snapshot, table=self._table, window=self._window)

    def _follow(self, every_s: float) -> None:
        last = ""
        while not self._stop.wait(every_s):
            try:
                self.refresh()
                last = ""
            except STORAGE_PROBLEMS as error:  # storage away for a moment, or a damaged segment: keep serving
                if str(error) != last:
                    logger.warning("New items are not read at the moment: %s", error)
                last = str(error)
