"""mim_ray/representation_center/snapshot_line.py."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from mim_ray.errors import ArtifactError
from mim_ray.representation_center import snapshot_line
from mim_ray.representation_center.snapshot import Snapshot, write_snapshot
from mim_ray.representation_center.snapshot_line import (
    current_snapshot,
    keep_snapshot,
    list_snapshots,
    prune_snapshots,
    switch_snapshot,
)
from mim_ray.representation_center.snapshot_writer import SnapshotWriter


def add(line: Path, version: int, keep: int = 3) -> str:
    """A state whose only row holds `version`; its id."""
    matrix = np.full((1, 2), version, np.float32)
    uri = write_snapshot(str(line), ["a"], matrix, encoder_version="v1", delta_version=version, keep=keep)
    return uri.rpartition("/")[2]


def value(uri: str) -> float:
    return float(Snapshot.open(uri).gather(np.array([0]))[0, 0])


def test_states_stay_for_a_roll_back_and_open_ones_stay_mapped(tmp_path: Path) -> None:
    line = str(tmp_path / "v1")
    first = add(tmp_path / "v1", 1)
    old = Snapshot.open(line)
    names = [first, *(add(tmp_path / "v1", version) for version in range(2, 6))]
    assert value(line) == 5
    states = list_snapshots(line)
    assert [state.snapshot_id for state in states] == names[:1:-1]
    assert [state.delta_version for state in states] == [5, 4, 3]
    assert [state.current for state in states] == [True, False, False]
    assert old.gather(old.lookup(["a"])).tolist() == [[1, 1]]
    switch_snapshot(line, names[2])
    assert value(line) == 3
    assert value(states[0].uri) == 5
    assert Snapshot.open(line).line == line
    switch_snapshot(line, names[4])
    assert value(line) == 5
    with pytest.raises(ArtifactError, match=rf"cannot be switched to '{names[0]}'.*States here: {names[4]}"):
        switch_snapshot(line, names[0])
    assert value(line) == 5


def test_pruning_spares_the_current_state_and_kept_ones(tmp_path: Path) -> None:
    line = str(tmp_path / "v1")
    names = [add(tmp_path / "v1", version, keep=9) for version in range(1, 7)]
    switch_snapshot(line, names[0])
    keep_snapshot(line, names[2], owner="release")
    assert prune_snapshots(line, keep=1, kept=[names[3]]) == [names[4], names[1]]
    assert [state.snapshot_id for state in list_snapshots(line)] == [names[5], names[3], names[2], names[0]]
    assert list_snapshots(line)[2].kept_by == ("release",)
    keep_snapshot(line, names[5], owner="release")
    assert prune_snapshots(line, keep=1) == [names[3], names[2]]
    keep_snapshot(line, None, owner="release")
    assert current_snapshot(line) == names[0]
    with pytest.raises(ArtifactError):
        keep_snapshot(line, names[1], owner="release")


def _begin_and_wait(line: str, ready: object) -> None:
    writer = SnapshotWriter(
        line,
        encoder_version="v1",
        delta_version=9,
        width=2,
        dtype="float32",
        most_rows=1,
        has_times=False,
        has_contents=False,
    )
    ready.set()  # type: ignore[attr-defined]
    signal.pause()
    writer.publish()


def test_what_a_killed_builder_left_is_deleted_by_the_next_and_a_living_ones_is_not(tmp_path: Path) -> None:
    line = tmp_path / "v1"
    add(line, 1)
    context = multiprocessing.get_context("fork")
    workers = []
    for _ in range(2):
        ready = context.Event()
        worker = context.Process(target=_begin_and_wait, args=(str(line), ready))
        worker.start()
        assert ready.wait(60)
        workers.append(worker)
    try:
        assert workers[0].pid is not None
        os.kill(workers[0].pid, signal.SIGKILL)
        workers[0].join()
        assert workers[0].exitcode == -signal.SIGKILL
        assert len(list(line.glob(".building-*"))) == 2
        add(line, 2)
        assert len(list(line.glob(".building-*"))) == 1
        assert value(str(line)) == 2
    finally:
        workers[1].kill()
        workers[1].join()


def test_a_builder_that_was_overtaken_does_not_turn_the_line_back(tmp_path: Path) -> None:
    line = tmp_path / "v1"
    add(line, 1)
    with SnapshotWriter(
        str(line),
        encoder_version="v1",
        delta_version=2,
        width=2,
        dtype="float32",
        most_rows=0,
        has_times=False,
        has_contents=False,
    ) as slow:
        add(line, 5)
        uri = slow.publish()
    assert value(str(line)) == 5
    assert Snapshot.open(uri).num_rows == 0
    switch_snapshot(str(line), list_snapshots(str(line))[-1].snapshot_id)
    assert value(str(line)) == 1
    add(line, 3)  # a table that was begun anew, or a roll-back: the next build is current again
    assert value(str(line)) == 3


def test_a_reader_follows_when_the_state_it_was_told_of_is_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = str(tmp_path / "v1")
    gone = add(tmp_path / "v1", 1)
    add(tmp_path / "v1", 2, keep=1)
    answers = iter([gone])
    from mim_ray.representation_center import snapshot

    monkeypatch.setattr(snapshot, "current_snapshot", lambda uri: next(answers, snapshot_line.current_snapshot(uri)))
    assert value(line) == 2
