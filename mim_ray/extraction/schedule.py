"""Which of a fixed number of actors makes which shard next, and what the actors take of the cluster. Knows no Ray.

An actor works through a unit from its first shard on, so that the file is read as one stream; an actor that finds no new unit
takes half of what another one still has to do. Units are taken when an actor is free for them, so what is in memory here does
not depend on the table's size.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mim_ray.config.scenario import Extraction
from mim_ray.extraction.plan import Unit

_SHORT_CALL_S = 1.0  # a shard that takes less is waited for by the next one in the actor's own queue


@dataclass(frozen=True)
class Shares:
    """What the pool takes of the cluster.

    Attributes:
        decoders: decoding tasks at once for each actor, of `decoder_cpus` CPUs; 0: the actors decode themselves.
    """

    num_actors: int
    actor_cpus: float
    actor_gpus: float
    decoders: int
    decoder_cpus: float


def shares(settings: Extraction, cpus: float, gpus: float) -> Shares:
    """What the settings ask for of a cluster with so many CPUs and GPUs (0 CPUs: it still has to grow)."""
    per_actor, on_gpu = settings.cpus_per_actor, settings.gpus_per_actor > 0
    num_actors = settings.num_actors
    if num_actors is None:
        fitting = gpus / settings.gpus_per_actor if on_gpu else cpus / per_actor
        num_actors = max(1, int(fitting + 1e-6))
    decoders = settings.num_decoders
    if decoders is None:
        decoders = max(1, int((cpus - num_actors * per_actor) / num_actors)) if on_gpu else 0
    needed = num_actors * per_actor + (1.0 if decoders else 0.0)
    if cpus == 0 or needed <= cpus:
        return Shares(num_actors, per_actor, settings.gpus_per_actor, decoders, 1.0 if decoders else 0.0)
    part = cpus / 2 if decoders else cpus  # too small a machine for all at once: they share its CPUs
    decoder_cpus = min(1.0, cpus / 2 / (num_actors * decoders)) if decoders else 0.0
    return Shares(num_actors, min(per_actor, part / num_actors), settings.gpus_per_actor, decoders, decoder_cpus)


@dataclass
class Run:
    """A unit, or what is left of one, in the hands of one actor."""

    number: int
    unit: Unit
    waiting: deque[int]
    actor: int = -1
    in_flight: int = 0


@dataclass
class Call:
    """A shard in the hands of an actor. Attributes: start: its first row. handle: the actor, once it was asked."""

    run: Run
    start: int
    actor: int
    began: float
    handle: Any = None


class Schedule:
    """The calls to make, as actors become free.

    Args:
        numbers: of units given out before; each unit or part of one gets the next number.
    """

    def __init__(self, units: Iterator[Unit], parts: Shares, numbers: int) -> None:
        self._units, self._parts, self.numbers = units, parts, numbers
        self._runs: list[Run] = []  # with shards that wait or are being made
        self._calls = [0] * parts.num_actors
        self._short = False

    def waits(self) -> bool:
        """Whether there is work that no actor has; asked when no call is open."""
        if not self._runs:
            unit = next(self._units, None)
            if unit is not None:
                self._runs.append(Run(self._number(), unit, deque(unit.starts.tolist())))
        return bool(self._runs)

    def next_calls(self, able: Iterable[int]) -> Iterator[Call]:
        """Calls to make now, on the actors that are able to work."""
        depth = self._parts.decoders or (2 if self._short else 1)
        for wanted in range(1, depth + 1):  # the actor with the shortest queue first
            for actor in sorted(able):
                while self._calls[actor] < wanted:
                    run = self._run_for(actor)
                    if run is None:
                        break
                    run.in_flight += 1
                    self._calls[actor] += 1
                    yield Call(run, run.waiting.popleft(), actor, time.monotonic())

    def done(self, call: Call) -> None:
        self._short = time.monotonic() - call.began < _SHORT_CALL_S
        self._ended(call)

    def failed(self, call: Call) -> None:
        """The shard is to be made again, by whatever actor."""
        run = call.run
        self._runs.append(Run(self._number(), run.unit, deque([call.start])))
        if run.waiting:
            self._runs.append(Run(self._number(), run.unit, deque(run.waiting)))
            run.waiting.clear()
        self._ended(call)

    def _ended(self, call: Call) -> None:
        call.run.in_flight -= 1
        self._calls[call.actor] -= 1
        if not call.run.in_flight and not call.run.waiting:
            self._runs.remove(call.run)

    def _run_for(self, actor: int) -> Run | None:
        """The actor's own run, else one that nobody has, else a new unit, else a part of another actor's."""
        one_at_once = self._parts.decoders > 0  # calls run beside each other, and a run's shards must begin in order
        for run in self._runs:
            if run.actor == actor and run.waiting and not (one_at_once and run.in_flight):
                return run
        for run in self._runs:
            if run.actor < 0:
                run.actor = actor
                return run
        unit = next(self._units, None)
        if unit is not None:
            run = Run(self._number(), unit, deque(unit.starts.tolist()), actor)
            self._runs.append(run)
            return run
        return self._steal(actor, one_at_once)

    def _steal(self, actor: int, keep_one: bool) -> Run | None:
        """The second half of the longest run."""
        richest = max(self._runs, key=lambda run: len(run.waiting), default=None)
        if richest is None or len(richest.waiting) < (2 if keep_one else 1):
            return None
        half = (len(richest.waiting) + (0 if keep_one else 1)) // 2
        taken = [richest.waiting.pop() for _ in range(half)]
        run = Run(self._number(), richest.unit, deque(reversed(taken)), actor)
        self._runs.append(run)
        return run

    def _number(self) -> int:
        self.numbers += 1
        return self.numbers
