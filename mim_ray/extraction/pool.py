"""A fixed pool of encoder actors, and which of them makes which shard.

An actor works through a unit from its first shard on, so that the file is read as one stream; an actor that finds no new unit
takes half of what another one still has to do. A dead actor is replaced, and what it had not finished is done again by any
other. What is in memory here does not depend on the table's size: units are taken when an actor is free for them.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import (
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from mim_ray.config.scenario import Extraction
from mim_ray.errors import DataError
from mim_ray.extraction.embed import Model, ShardEncoder, Work
from mim_ray.extraction.plan import Unit
from mim_ray.extraction.write import ShardFile

MAX_DEATHS = 5
"""A shard during which so many processes died is not tried again."""
_SHORT_CALL_S = 1.0  # a shard that takes less is waited for by the next one in the actor's own queue
_PATIENCE_S = 30.0  # without a place for any actor, until that is told
_LOST = (WorkerCrashedError, OutOfMemoryError, ObjectLostError)


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


class EncoderPool:
    """Actors that hold the encoder, for one job or for many (`run` may be called again).

        with EncoderPool(model, shares(settings, …)) as pool:
            for file in pool.run(units, work):
                …

    Attributes:
        deaths: actors that were replaced.
    """

    def __init__(self, model: Model, parts: Shares) -> None:
        self._model, self._parts = model, parts
        self._actors: dict[int, Any] = {}
        self._loading: dict[Any, int] = {}  # what tells that an actor has loaded the encoder -> its number
        self._failed_starts = 0
        self._numbers = 0
        self.deaths = 0

    def __enter__(self) -> EncoderPool:
        for number in range(self._parts.num_actors):
            self._start(number)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors, self._loading = {}, {}

    def wait(self) -> None:
        """Until every actor has loaded the encoder; `run` itself begins with the first one that has."""
        ray.get(list(self._loading))

    def run(self, units: Iterable[Unit], work: Work) -> Iterator[ShardFile]:
        """Make all shards of the units; each once it is written, in any order.

        Raises:
            MimRayError: as the encoder and the files give, inside what Ray wraps it in (runtime.cluster.user_error).
            DataError: processes died again and again over the same shard.
        """
        schedule = _Schedule(iter(units), self._parts, self._numbers)
        calls: dict[Any, _Call] = {}
        deaths: Counter[tuple[str, int]] = Counter()
        warn_at = time.monotonic() + _PATIENCE_S
        while True:
            able = set(range(self._parts.num_actors)) - set(self._loading.values())
            for call in schedule.next_calls(able):
                calls[self._submit(call, work)] = call
            if not calls and not schedule.waits():
                break
            ready = self._next_events(calls)
            if not ready and not able and time.monotonic() > warn_at:
                warn_at = time.monotonic() + _PATIENCE_S
                self._tell_waiting()
            gone: set[int] = set()
            for ref in ready:
                if ref in self._loading:
                    number = self._loading.pop(ref)
                    if not self._loaded(ref):
                        gone.add(number)
                    continue
                call = calls.pop(ref)
                try:
                    file = ray.get(ref)
                except (RayActorError, RayTaskError) as error:
                    if not _is_death(error):
                        raise
                    if isinstance(error, RayActorError) and self._actors[call.actor] is call.handle:
                        gone.add(call.actor)
                    deaths[call.run.unit.content, call.start] += 1
                    if deaths[call.run.unit.content, call.start] >= MAX_DEATHS:
                        raise _gives_up(call) from error
                    schedule.failed(call)
                    continue
                schedule.done(call)
                yield file
            for number in gone:
                self.deaths += 1
                self._start(number)
        self._numbers = schedule.numbers

    def _next_events(self, calls: dict[Any, _Call]) -> list[Any]:
        """References of calls and starting actors that have ended, after waiting for at least one."""
        pending = [*calls, *self._loading]
        ray.wait(pending, num_returns=1, timeout=_PATIENCE_S)
        return ray.wait(pending, num_returns=len(pending), timeout=0)[0]

    def _loaded(self, ref: Any) -> bool:
        """Whether an actor has loaded its encoder; False if it died meanwhile.

        Raises:
            what its constructor raised; and the same after several deaths in a row.
        """
        try:
            ray.get(ref)
        except RayActorError as error:
            self._failed_starts += 1
            if not _is_death(error) or self._failed_starts > MAX_DEATHS:
                raise
            return False
        self._failed_starts = 0
        return True

    def _tell_waiting(self) -> None:
        parts, there = self._parts, ray.cluster_resources()
        print(
            f"extraction waits for a place for its encoder: {parts.num_actors} actors of {parts.actor_cpus:g} CPUs and"
            f" {parts.actor_gpus:g} GPUs; Ray has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs",
            file=sys.stderr,
            flush=True,
        )

    def _start(self, number: int) -> None:
        actor: Any = (
            ray.remote(ShardEncoder)
            .options(
                num_cpus=self._parts.actor_cpus,
                num_gpus=self._parts.actor_gpus,
                max_restarts=0,
                max_concurrency=max(1, self._parts.decoders),
            )
            .remote(self._model, self._parts.decoder_cpus)
        )
        self._actors[number] = actor
        self._loading[actor.ready.remote()] = number

    def _submit(self, call: _Call, work: Work) -> Any:
        call.handle = self._actors[call.actor]
        run = call.run
        return call.handle.encode_shard.remote(work, run.number, run.unit, call.start, not run.waiting)


@dataclass
class _Run:
    """A unit, or what is left of one, in the hands of one actor."""

    number: int
    unit: Unit
    waiting: deque[int]
    actor: int = -1
    in_flight: int = 0


@dataclass
class _Call:
    run: _Run
    start: int
    actor: int
    began: float
    handle: Any = None


class _Schedule:
    """Which actor makes which shard next. Knows no Ray."""

    def __init__(self, units: Iterator[Unit], parts: Shares, numbers: int) -> None:
        self._units, self._parts, self.numbers = units, parts, numbers
        self._runs: list[_Run] = []  # with shards that wait or are being made
        self._calls = [0] * parts.num_actors
        self._short = False

    def waits(self) -> bool:
        """Whether there is work that no actor has; asked when no call is open."""
        if not self._runs:
            unit = next(self._units, None)
            if unit is not None:
                self._runs.append(_Run(self._number(), unit, deque(unit.starts.tolist())))
        return bool(self._runs)

    def next_calls(self, able: Iterable[int]) -> Iterator[_Call]:
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
                    yield _Call(run, run.waiting.popleft(), actor, time.monotonic())

    def done(self, call: _Call) -> None:
        self._short = time.monotonic() - call.began < _SHORT_CALL_S
        self._ended(call)

    def failed(self, call: _Call) -> None:
        """The shard is to be made again, by whatever actor."""
        run = call.run
        self._runs.append(_Run(self._number(), run.unit, deque([call.start])))
        if run.waiting:
            self._runs.append(_Run(self._number(), run.unit, deque(run.waiting)))
            run.waiting.clear()
        self._ended(call)

    def _ended(self, call: _Call) -> None:
        call.run.in_flight -= 1
        self._calls[call.actor] -= 1
        if not call.run.in_flight and not call.run.waiting:
            self._runs.remove(call.run)

    def _run_for(self, actor: int) -> _Run | None:
        """The actor's own run, else one that nobody has, else a new unit, else a part of another actor's."""
        one_at_once = (
            self._parts.decoders > 0
        )  # a run's shards must begin in order, and here calls run beside each other
        for run in self._runs:
            if run.actor == actor and run.waiting and not (one_at_once and run.in_flight):
                return run
        for run in self._runs:
            if run.actor < 0:
                run.actor = actor
                return run
        unit = next(self._units, None)
        if unit is not None:
            run = _Run(self._number(), unit, deque(unit.starts.tolist()), actor)
            self._runs.append(run)
            return run
        return self._steal(actor, one_at_once)

    def _steal(self, actor: int, keep_one: bool) -> _Run | None:
        """The second half of the longest run."""
        richest = max(self._runs, key=lambda run: len(run.waiting), default=None)
        if richest is None or len(richest.waiting) < (2 if keep_one else 1):
            return None
        half = (len(richest.waiting) + (0 if keep_one else 1)) // 2
        taken = [richest.waiting.pop() for _ in range(half)]
        run = _Run(self._number(), richest.unit, deque(reversed(taken)), actor)
        self._runs.append(run)
        return run

    def _number(self) -> int:
        self.numbers += 1
        return self.numbers


def _is_death(error: RayActorError | RayTaskError) -> bool:
    """Whether a process died, in contrast to code that raised."""
    if isinstance(error, RayTaskError):
        return isinstance(error, _LOST) or isinstance(error.cause, _LOST)
    return "creation task" not in str(error)


def _gives_up(call: _Call) -> DataError:
    piece = call.run.unit.slice(call.start)
    return DataError(
        f"{call.run.unit.rows.source}: {MAX_DEATHS} processes died while rows {piece.start} to {piece.stop - 1} of one of its"
        " row groups were decoded or encoded. Give the machine more memory, lower extraction.batch_size or"
        " data.max_image_pixels, or take these rows out."
    )
