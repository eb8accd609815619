"""A fixed pool of encoder actors that make shards as schedule.py says.

A dead actor is replaced, and what it had not finished is done again by any other.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
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

from mim_ray.errors import DataError
from mim_ray.extraction.embed import Model, ShardEncoder, Work
from mim_ray.extraction.plan import Unit
from mim_ray.extraction.schedule import Call, Schedule, Shares
from mim_ray.extraction.write import ShardFile

MAX_DEATHS = 5
"""A shard during which so many processes died is not tried again."""
_PATIENCE_S = 30.0  # without a place for any actor, until that is told
_LOST = (WorkerCrashedError, OutOfMemoryError, ObjectLostError)


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
        schedule = Schedule(iter(units), self._parts, self._numbers)
        calls: dict[Any, Call] = {}
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

    def _next_events(self, calls: dict[Any, Call]) -> list[Any]:
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

    def _submit(self, call: Call, work: Work) -> Any:
        call.handle = self._actors[call.actor]
        run = call.run
        return call.handle.encode_shard.remote(work, run.number, run.unit, call.start, not run.waiting)


def _is_death(error: RayActorError | RayTaskError) -> bool:
    """Whether a process died, in contrast to code that raised."""
    if isinstance(error, RayTaskError):
        return isinstance(error, _LOST) or isinstance(error.cause, _LOST)
    return "creation task" not in str(error)


def _gives_up(call: Call) -> DataError:
    piece = call.run.unit.slice(call.start)
    return DataError(
        f"{call.run.unit.rows.source}: {MAX_DEATHS} processes died while rows {piece.start} to {piece.stop - 1} of one of its"
        " row groups were decoded or encoded. Give the machine more memory, lower extraction.batch_size or"
        " data.max_image_pixels, or take these rows out."
    )
