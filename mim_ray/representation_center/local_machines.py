"""The parameter machines on this node, as a client finds them: where their files are, and a view of what they published."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from mim_ray.errors import ArtifactError
from mim_ray.representation_center.direct_read import Control, View

DISCOVER_EVERY_S = 5.0
REOPEN_EVERY_S = 0.3
FORGET_AFTER_S = 30.0  # a machine without a heartbeat for that long may be on another node now


class LocalMachines:
    """
    Args:
        num_shards: S. silent_s: a machine without a heartbeat for longer is left for another replica on this node.
    """

    def __init__(self, num_shards: int, silent_s: float) -> None:
        self._num_shards, self._silent_s = num_shards, silent_s
        self._lock = threading.Lock()
        self._controls: dict[tuple[int, int], Control] = {}
        self._asked: dict[Any, tuple[int, int]] = {}
        self._discover_at = self._reopen_at = 0.0
        self._view: View | None = None

    def view(self, actors: Mapping[tuple[int, int], Any]) -> View | None:
        """What can be read here now; None if nothing.

        Args:
            actors: handles of the machines by (shard, replica).
        """
        view, now = self._view, time.monotonic()
        if view is not None and not view.outdated and now < self._discover_at and not self._silent(view):
            return view
        with self._lock:
            if now >= self._discover_at:
                self._discover(actors, first=self._discover_at == 0.0)
                self._discover_at = now + DISCOVER_EVERY_S
            view = self._view
            broken = view is None or view.outdated
            if broken or (now >= self._reopen_at and view is not None and self._silent(view)):
                self._reopen_at = now + REOPEN_EVERY_S
                self._view = View.open([self._best(shard) for shard in range(self._num_shards)])
            return self._view

    def _discover(self, actors: Mapping[tuple[int, int], Any], first: bool) -> None:
        """Ask machines of which no files are known where they are; later calls take answers that came meanwhile."""
        oldest = time.monotonic_ns() - int(FORGET_AFTER_S * 1e9)
        self._controls = {place: control for place, control in self._controls.items() if control.last_beat_ns > oldest}
        waiting = set(self._asked.values())
        for place, actor in actors.items():
            if place not in waiting and place not in self._controls:
                self._asked[actor.where.remote()] = place
        if not self._asked:
            return
        ready, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0.5 if first else 0.0)
        for call in ready:
            place = self._asked.pop(call)
            try:
                where = ray.get(call)
                if where["boot_id"] == boot_id():
                    self._controls[place] = Control.open(Path(where["folder"]))
            except (RayError, ArtifactError):
                continue  # it is away, or this process may not read its files

    def _best(self, shard: int) -> Control | None:
        """Of the replicas on this node the one that was alive last."""
        controls = [control for (place, _), control in self._controls.items() if place == shard]
        return max(controls, key=lambda control: control.last_beat_ns, default=None)

    def _silent(self, view: View) -> bool:
        oldest = time.monotonic_ns() - int(self._silent_s * 1e9)
        if len(view.generations) < len({shard for shard, _ in self._controls}):
            return True
        return any(control.last_beat_ns < oldest for control, _ in view.generations)


def boot_id() -> str:
    """Names the running kernel: processes with the same one share clocks and, where they see the same files, mappings."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
