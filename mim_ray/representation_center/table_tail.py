"""Follows the Delta log: which data files of an encoder version came since the last look."""

from __future__ import annotations

import os
import time

from mim_ray import artifacts
from mim_ray.representation_center.data_files import DataFile
from mim_ray.representation_center.table import EmbeddingTable


class TableTail:
    """
    Args:
        newer_than: Delta version that the reader knows already.
    """

    def __init__(self, table: EmbeddingTable, encoder_version: str, newer_than: int) -> None:
        self._table, self._encoder_version = table, encoder_version
        self._known = newer_than
        self._quiet_since: int | None = None
        self._pending: tuple[int, int | None] = (newer_than, None)

    def poll(self) -> list[DataFile]:
        """Files with rows of later commits than the last poll saw, oldest commit first.

        A compacted file may bring older rows again. Where nothing was committed it costs one stat locally, and reading
        the log elsewhere.
        """
        log = artifacts.local_path(f"{self._table.uri}/_delta_log")
        changed_at = None
        if log is not None:
            try:
                changed_at = os.stat(log).st_mtime_ns
            except FileNotFoundError:
                return []
            if changed_at == self._quiet_since:
                return []
        # A commit within the clock tick of this look would not change the folder's time: look again later.
        settled = changed_at is not None and time.time_ns() - changed_at > 1_000_000_000
        if changed_at is None and not self._table.exists():
            return []
        version, files = self._table.scan(self._encoder_version, newer_than=self._known)
        self._pending = (version, changed_at if settled else None)
        return sorted(files, key=lambda file: (file.commit_version, file.path))

    def done(self) -> None:
        """The files of the last poll are taken in: do not give them again."""
        self._known, self._quiet_since = self._pending
