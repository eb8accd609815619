"""After 100,000 window messages nothing has become slow: the same work with few and with many messages, in and after the
folder. Prints times; asserts on the work that is done, never on time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from mim_ray.representation_center import window_folder
from mim_ray.representation_center.compaction import compact
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import WindowTail, append_segment, fold, segment_rows

START = datetime(2025, 1, 1, tzinfo=UTC)
PER_FOLD = 20


class Soak:
    """Messages of one row whose ids tell of 20 a second, up to now."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.window, self.table = f"{root}/window", EmbeddingTable(f"{root}/table").create()
        self.num = 0
        self._rng = np.random.default_rng(0)
        self._at = time.time_ns() - int(seconds * 1e9)
        monkeypatch.setattr(window_folder, "new_segment_id", self._new_id)
        self.listed: list[int] = []
        list_folder = window_folder._segment_files

        def counted(folder: Path) -> list[str]:
            names = list_folder(folder)
            self.listed.append(len(names))
            return names

        monkeypatch.setattr(window_folder, "_segment_files", counted)
        self.tail = WindowTail(self.window, "v1")

    def _new_id(self) -> str:
        self._at += 50_000_000
        return f"{self._at:020d}-{self._rng.integers(2**32):08x}"

    def append(self, num: int = 1) -> None:
        for _ in range(num):
            self.num += 1
            rows = segment_rows(
                [f"item-{self.num % 60_000}"],
                self._rng.normal(size=(1, 128)).astype(np.float32),
                content_hashes=["0" * 32],
                content_at=[START + timedelta(seconds=self.num)],
            )
            append_segment(self.window, rows, encoder_version="v1")

    def now(self) -> None:
        """Ids go on from the present."""
        self._at = max(self._at, time.time_ns() - 10**10)

    def measure(self) -> dict[str, float]:
        """Milliseconds of one append, of a poll that finds one message, and files listed by such a poll."""
        self.now()
        for folder in Path(self.window, "v1").iterdir():  # as old as their names say
            os.utime(folder, (int(folder.name) * 10, int(folder.name) * 10))
        self.tail.poll()
        append = median(self.append, 50)
        assert len(self.tail.poll()) == 50
        polls, files = [], []
        for _ in range(50):
            self.append()
            self.listed.clear()
            start = time.perf_counter()
            assert len(self.tail.poll()) == 1
            polls.append(time.perf_counter() - start)
            files.append(sum(self.listed))
        return {"append": append, "poll": 1e3 * float(np.median(polls)), "listed": float(np.median(files))}

    def fold_some(self) -> None:
        assert fold(self.window, self.table, keep_s=0).num_segments == PER_FOLD


def median(work: Callable[[], object], times: int) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds))


def waiting(root: Path, monkeypatch: pytest.MonkeyPatch, num: int) -> dict[str, float]:
    """`num` messages wait in the folder; then they are folded."""
    with monkeypatch.context() as patch:
        soak = Soak(root, patch, num / PER_FOLD)
        with monkeypatch.context() as fast:
            fast.setattr(os, "fsync", lambda handle: None)
            soak.append(num)
        found = soak.measure()
        start = time.perf_counter()
        folded = fold(soak.window, soak.table, keep_s=0)
        found["fold"] = 1e3 * (time.perf_counter() - start) / folded.num_segments
        assert folded.num_segments == soak.num
        assert len(soak.table.scan("v1")[1]) <= 1 + num // 5_000
    return found


def folded(root: Path, monkeypatch: pytest.MonkeyPatch, num: int) -> dict[str, float]:
    """`num` messages went through the folder, 20 at a time, with a compaction every 60 folds (ten minutes)."""
    with monkeypatch.context() as patch:
        soak = Soak(root, patch, num / PER_FOLD)
        seconds, compacting = [], 0.0
        for number in range(num // PER_FOLD):
            with monkeypatch.context() as fast:
                fast.setattr(os, "fsync", lambda handle: None)
                soak.append(PER_FOLD)
            start = time.perf_counter()
            soak.fold_some()
            seconds.append(time.perf_counter() - start)
            if number % 60 == 59:
                start = time.perf_counter()
                compact(soak.table, "v1")
                compacting += time.perf_counter() - start
        files = len(soak.table.scan("v1")[1])
        assert files < 120
        found = soak.measure()
        table = soak.table
        found["version"] = median(lambda: table.version, 20)
        found["contains"] = median(lambda: table.contains("v1", [f"{time.time_ns():020d}-00000000"]), 20)
        found["open"] = median(lambda: EmbeddingTable(table.uri).version, 10)
        found["fold"] = 1e3 * float(np.median(seconds[-20:])) / PER_FOLD
        found["compact"] = 1e3 * compacting / num
        found["files"] = files
        assert table.current_rows("v1").num_rows == min(num, 60_000)
    return found


@pytest.mark.chaos
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("scene", [waiting, folded])
def test_nothing_becomes_slow_with_many_messages(
    scene: Callable[[Path, pytest.MonkeyPatch, int], dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MESSAGES (default 100,000) against 1,000."""
    many = int(os.environ.get("MESSAGES", "100000"))
    few = scene(tmp_path / "few", monkeypatch, 1_000)
    lots = scene(tmp_path / "many", monkeypatch, many)
    print(f"\n{scene.__name__}: milliseconds with 1,000 and with {many:,} messages")
    for name in few:
        print(f"  {name:<10} {few[name]:8.3f} {lots[name]:8.3f}   {lots[name] / max(few[name], 1e-9):6.2f}")
    assert lots["listed"] <= 300  # a poll lists the folders of the last seconds, not all


def test_a_poll_lists_only_what_is_recent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = waiting(tmp_path, monkeypatch, 600)
    assert found["listed"] <= 300
