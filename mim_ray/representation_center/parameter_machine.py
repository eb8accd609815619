"""What one parameter machine does, without Ray: a shard of a release, follow what is new, answer, switch releases.

machine = ParameterMachine(state, (0, 2), folder, settings)
machine.ready()                                 # opened in a thread; where it is
machine.lookup(None, [("mm", offsets, text)])   # Reply
machine.prepare(serial, release); machine.activate(serial)
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mim_ray.config.scenario import ParameterMachines as Settings
from mim_ray.representation_center.direct_read import Control
from mim_ray.representation_center.local_machines import boot_id
from mim_ray.representation_center.lookup import STORAGE_PROBLEMS
from mim_ray.representation_center.machine_release import MachineRelease, read_wanted
from mim_ray.representation_center.machine_tables import (
    NOT_THERE,
    OTHER_RELEASE,
    ReleasePart,
    Reply,
)

logger = logging.getLogger(__name__)
KEEP_OLD_S = 30.0  # a release that was switched away from stays readable this long, for lookups that began with it
START_TIMEOUT_S = 600.0


class ParameterMachine:
    """One replica of one shard.

    Its tables are opened in a thread: a constructor that fails would be the end of a Ray actor, and storage may be away
    just when one is restarted.

    Args:
        state: URI of the file that names the release. shard: (s, S).
        folder: of this machine's mapped files. What a machine that died left there is removed.
    """

    def __init__(self, state: str, shard: tuple[int, int], folder: Path, settings: Settings) -> None:
        self._state, self._shard, self._folder, self._settings = state, shard, folder, settings
        self._control = Control.create(self._folder)
        self._lock_file = (self._folder / "lock").open("w")
        fcntl.flock(self._lock_file, fcntl.LOCK_EX)
        _remove_leftovers(folder.parent)
        for old in self._folder.glob("part-*"):
            shutil.rmtree(old, ignore_errors=True)
        self._parts: dict[int, ReleasePart] = {}
        self._current: ReleasePart | None = None
        self._dropping: list[tuple[float, int]] = []
        self._problem: BaseException | None = None
        self._changing = threading.RLock()
        threading.Thread(target=self._run, daemon=True, name="follow").start()

    def ready(self) -> dict[str, Any]:
        """Where this machine is, as soon as it can answer.

        Raises:
            ArtifactError: its release cannot be opened (it goes on trying).
        """
        end = time.monotonic() + START_TIMEOUT_S
        while self._current is None and time.monotonic() < end:
            if self._problem is not None:
                raise self._problem
            time.sleep(0.01)
        return self.where()

    def where(self) -> dict[str, Any]:
        """Process and kernel (boot id), the folder with its mapped files, and what it holds."""
        return {
            "pid": os.getpid(),
            "boot_id": boot_id(),
            "folder": str(self._folder),
            "shard": self._shard[0],
            "serial": None if self._current is None else self._current.serial,
            "overlay_items": {
                name: table.num_overlay_rows
                for name, table in ({} if self._current is None else self._current.tables).items()
            },
        }

    def lookup(self, serial: int | None, asked: list[tuple[str, np.ndarray, bytes]]) -> Reply:
        """
        Args:
            serial: the release to answer from; None: the current.
            asked: (table, (n + 1,) int64 offsets, UTF-8 bytes) of the keys, which are of this shard.
        """
        part = self._part(serial)
        if isinstance(part, Reply):
            return part
        if part.behind_s > self._settings.freshness_s:
            return Reply(part.serial, part.release.release_id, "it has not seen new rows for too long", None)
        vectors = []
        for table, offsets, text in asked:
            if table not in part.tables:
                return Reply(part.serial, part.release.release_id, NOT_THERE, None)
            keys = pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(text))
            vectors.append(part.lookup(table, keys))
        return Reply(part.serial, part.release.release_id, "", vectors)

    def dense(self, serial: int | None, name: str) -> Reply:
        """The safetensors bytes of that name."""
        part = self._part(serial)
        if isinstance(part, Reply):
            return part
        content = part.dense.get(name)
        return Reply(part.serial, part.release.release_id, NOT_THERE if content is None else "", content)

    def push(self, encoder_version: str, segment_id: str, rows: bytes) -> bool:
        """Take in a stored segment's rows (an Arrow stream); whether the current release has them now. Whatever fails here, the
        window brings them."""
        table = pa.ipc.open_stream(rows).read_all()
        taken = []
        for part in list(self._parts.values()):
            try:
                if part.push(encoder_version, segment_id, table):
                    taken.append(part)
            except STORAGE_PROBLEMS as error:
                logger.warning("A pushed segment was not taken in: %s", error)
        return self._current in taken

    def prepare(self, serial: int, release: dict[str, Any]) -> None:
        """Open a release beside the current one.

        Raises:
            ArtifactError: it cannot be opened.
        """
        with self._changing:
            if serial not in self._parts:
                folder = self._folder / f"part-{serial}-{time.time_ns()}"
                self._parts[serial] = ReleasePart.open(
                    serial, MachineRelease.from_json(release), shard=self._shard, folder=folder
                )

    def activate(self, serial: int) -> None:
        """Answer from a prepared release; the one before can still be asked for by its serial for a while."""
        with self._changing:
            if serial not in self._parts:  # it was restarted since
                serial, release = read_wanted(self._state)
                self.prepare(serial, release.to_json())
            before = self._current
            if before is not None and before.serial >= serial:
                return
            part = self._parts[serial]
            part.follow()
            self._current = part
            self._control.publish(part)
            if before is not None:
                self._dropping.append((time.monotonic() + KEEP_OLD_S, before.serial))

    def forget(self, serial: int) -> None:
        """Close a release that was prepared and is not wanted after all."""
        with self._changing:
            if self._current is None or self._current.serial != serial:
                part = self._parts.pop(serial, None)
                if part is not None:
                    part.close()

    def close(self) -> None:
        """Remove this machine's files; it is about to be stopped."""
        with self._changing:
            for part in self._parts.values():
                part.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _part(self, serial: int | None) -> ReleasePart | Reply:
        current = self._current
        if current is None:
            return Reply(0, "", "it is starting", None)
        part = current if serial is None else self._parts.get(serial)
        return Reply(current.serial, current.release.release_id, OTHER_RELEASE, None) if part is None else part

    def _run(self) -> None:
        wait = 0.1
        while self._current is None:
            try:
                serial, release = read_wanted(self._state)
                self.prepare(serial, release.to_json())
                self.activate(serial)
            except Exception as error:
                if str(error) != str(self._problem):
                    logger.exception("The release of %s cannot be opened; it is tried again", self._state)
                self._problem = error
                time.sleep(wait)
                wait = min(5.0, 2 * wait)
        self._problem = None
        while True:
            time.sleep(self._settings.follow_every_s)
            for part in list(self._parts.values()):
                try:
                    part.follow()
                except Exception:
                    logger.exception("New rows are not read at the moment; it is tried again")
            self._control.beat()
            now = time.monotonic()
            for _, serial in [entry for entry in self._dropping if entry[0] <= now]:
                self.forget(serial)
            self._dropping = [entry for entry in self._dropping if entry[0] > now]


def _remove_leftovers(base: Path) -> None:
    """Folders of machines that are gone for good: their lock is free."""
    for lock in base.glob("*/lock"):
        with contextlib.suppress(OSError), lock.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
