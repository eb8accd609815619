"""benchmarks/freshness.py: what it makes of what its processes wrote down."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def freshness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("freshness", FOLDER / "freshness.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "freshness", module)
    spec.loader.exec_module(module)
    return module


def write(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")


def test_an_item_counts_when_the_slowest_way_has_answered(freshness: ModuleType, tmp_path: Path) -> None:
    items = [f"pushed-{number}" for number in range(4)]
    write(tmp_path / "posts", [{"item": name, "at": 10.0, "how": "pushed"} for name in [*items, "pushed-lost"]])
    acks = [{"item": name, "at": 10.2, "status": 200} for name in items]
    write(tmp_path / "acks", [*acks, {"item": "pushed-lost", "at": 10.1, "status": 503}])
    write(tmp_path / "seen-called", [{"item": name, "at": 10.5, "shard": 0} for name in items])
    write(tmp_path / "seen-read", [{"item": name, "at": 10.1 + row, "shard": 0} for row, name in enumerate(items[:3])])
    found = freshness.summary(tmp_path, "pushed")
    assert (found["items"], found["refused"], found["answered"]) == (5, 1, 3)
    assert found["answered_after_post"] == {"p50_s": 1.1, "p99_s": pytest.approx(2.08), "max_s": 2.1}
    assert found["answered_after_acknowledgement"]["max_s"] == pytest.approx(1.9)
    assert found["called_after_post"]["p99_s"] == 0.5
    assert found["shard_1_after_post"] == {}
    assert freshness.summary(tmp_path, "followed")["items"] == 0
