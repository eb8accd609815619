"""Who looks at the catalogue's rows: this process where they are few, else actors that stay alive between rounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from mim_ray.data.sources import Shard
from mim_ray.extraction.read import Decoding
from mim_ray.extraction.scan import Scanned, scan

HERE_ROWS = 10_000  # fewer are looked at in this process
MAX_SCANNERS = 64


@dataclass(frozen=True)
class Looked:
    """What is looked at of a slice: all of its rows, or those with the numbers `rows` (ascending)."""

    shard: Shard
    rows: np.ndarray | None = None

    @property
    def num_rows(self) -> int:
        return self.shard.num_rows if self.rows is None else len(self.rows)


class Scanners:
    """Actors that take no CPU of Ray's count: looking is short, and goes on beside the encoders that hold the CPUs.

    Tasks would do, but Ray ends idle workers after a second, and a new one takes longer than the work of a small round.
    """

    def __init__(self) -> None:
        self._actors: list[Any] = []

    def scan(
        self, slices: Sequence[Looked], seen: np.ndarray | None, decoding: Decoding, max_carried_rows: int
    ) -> Iterator[tuple[Shard, Scanned, Any]]:
        """Each slice with what `scan.scan` finds, in order; the content carried is in the object store, or None."""
        if sum(part.num_rows for part in slices) <= HERE_ROWS:
            for part in slices:
                scanned, carried = scan(part.shard, seen, decoding, max_carried_rows, part.rows)
                yield part.shard, scanned, None if carried is None else ray.put(carried)
            return
        self.start(len(slices))
        shared = ray.put(seen)
        waiting: deque[tuple[Shard, Any, Any]] = deque()
        for number, part in enumerate(slices):
            actor = self._actors[number % len(self._actors)]
            scanned, carried = actor.scan.remote(part.shard, shared, decoding, max_carried_rows, part.rows)
            waiting.append((part.shard, scanned, carried))
            if len(waiting) >= 2 * len(self._actors):
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())

    def start(self, most: int = MAX_SCANNERS) -> None:
        """Have an actor for each CPU, if there are not more than `most`."""
        wanted = min(max(1, int(ray.cluster_resources().get("CPU", 1))), MAX_SCANNERS, most)
        actor: Any = ray.remote(_Scanner)
        options = {"num_cpus": 0, "scheduling_strategy": "SPREAD", "max_restarts": -1, "max_task_retries": -1}
        new = [actor.options(**options).remote() for _ in range(wanted - len(self._actors))]
        ray.get([scanner.ready.remote() for scanner in new])
        self._actors += new

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors if ray.is_initialized() else ():
            ray.kill(actor)
        self._actors = []


class _Scanner:
    def ready(self) -> None:
        """Returns once the actor runs."""

    @ray.method(num_returns=2)
    def scan(self, *arguments: Any) -> Any:
        return scan(*arguments)


def _result(shard: Shard, scanned: Any, carried: Any) -> tuple[Shard, Scanned, Any]:
    found: Scanned = ray.get(scanned)
    return shard, found, carried if found.carried else None
