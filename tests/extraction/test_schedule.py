"""mim_ray/extraction/schedule.py: who makes which shard, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mim_ray.config.scenario import Extraction
from mim_ray.extraction.plan import Unit
from mim_ray.extraction.schedule import Schedule, Shares, shares


def unit(name: str, num_shards: int) -> Unit:
    rows: Any = None
    return Unit(rows, name, 10, np.arange(num_shards, dtype=np.int64) * 10, np.empty(0, np.int64))


def play(
    schedule: Schedule, num_actors: int, fails: Callable[[Any], bool] = lambda call: False
) -> list[tuple[str, int, int]]:
    """(unit, first row, actor) of all calls; each round the oldest call ends."""
    made, open_calls = [], []
    while True:
        open_calls += schedule.next_calls(range(num_actors))
        if not open_calls:
            assert not schedule.waits()
            return made
        call = open_calls.pop(0)
        if fails(call):
            schedule.failed(call)
        else:
            made.append((call.run.unit.content, call.start, call.actor))
            schedule.done(call)


@pytest.mark.parametrize("decoders", [0, 1, 3])
@pytest.mark.parametrize("sizes", [[40], [1, 1, 1], [7, 2, 9], []])
def test_every_shard_is_made_once_by_all_actors(sizes: list[int], decoders: int) -> None:
    units = [unit(f"u{number}", size) for number, size in enumerate(sizes)]
    made = play(Schedule(iter(units), Shares(3, 1, 0, decoders, 1.0 if decoders else 0.0), 0), 3)
    wanted = [(f"u{number}", 10 * row) for number, size in enumerate(sizes) for row in range(size)]
    assert sorted((name, start) for name, start, _ in made) == wanted
    if sum(sizes) > 6:
        assert {actor for _, _, actor in made} == {0, 1, 2}  # also where there is one unit only


def test_what_a_dead_actor_had_is_made_once_by_others() -> None:
    died: list[tuple[str, int]] = []

    def fails(call: Any) -> bool:
        shard = (call.run.unit.content, call.start)
        if call.start % 30 == 0 and died.count(shard) < 2:
            died.append(shard)
            return True
        return False

    made = play(Schedule(iter([unit("a", 11), unit("b", 5)]), Shares(2, 1, 0, 0, 0.0), 0), 2, fails)
    wanted = [("a", 10 * row) for row in range(11)] + [("b", 10 * row) for row in range(5)]
    assert sorted((name, start) for name, start, _ in made) == wanted
    assert len(died) == 2 * 6


def test_units_are_taken_when_an_actor_is_free_for_them() -> None:
    taken = []

    def units() -> Any:
        for number in range(1_000):
            taken.append(number)
            yield unit(f"u{number}", 2)

    schedule = Schedule(units(), Shares(2, 1, 0, 0, 0.0), 0)
    assert list(schedule.next_calls([])) == []
    assert taken == []
    list(schedule.next_calls([0, 1]))
    assert len(taken) == 2


def test_actors_and_decoders_fit_the_machine() -> None:
    assert shares(Extraction(), 4, 0) == Shares(4, 1.0, 0.0, 0, 0.0)
    assert shares(Extraction(num_actors=2), 4, 0) == Shares(2, 1.0, 0.0, 0, 0.0)
    assert shares(Extraction(gpus_per_actor=1.0), 16, 2) == Shares(2, 1.0, 1.0, 7, 1.0)
    assert shares(Extraction(num_actors=3), 0, 0) == Shares(3, 1.0, 0.0, 0, 0.0)  # a cluster that still has to grow
    for settings in (Extraction(num_actors=8), Extraction(num_actors=2, num_decoders=2), Extraction(cpus_per_actor=3)):
        small = shares(settings, 2, 0)
        used = small.num_actors * (small.actor_cpus + (small.decoder_cpus if small.decoders else 0))
        assert used <= 2  # otherwise an actor or a task would wait for ever
        assert small.num_actors == (settings.num_actors or 1)
