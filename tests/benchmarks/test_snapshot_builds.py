"""benchmarks/snapshot_builds.py with tiny sizes: it compares the files of both builds, and reports both times."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_both_builds_are_timed_in_each_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    module = __import__("snapshot_builds")
    found = module.measure(module.Plan(num_items=300, width=4, rounds=2), tmp_path)
    for dtype in ("float32", "float16"):
        assert len(found[dtype]["since_s"]) == len(found[dtype]["whole_s"]) == 2
        assert found[dtype]["since_over_whole"] > 0
