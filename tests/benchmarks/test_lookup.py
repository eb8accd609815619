"""benchmarks/lookup.py with tiny sizes: its arithmetic, its report, and that both sides answer alike."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The benchmark's files by name, imported as its command does: their folder comes first on the path."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("measuring", "lookup_cases", "lookup_redis", "lookup_build", "lookup_dtypes", "lookup")
    return {name: __import__(name) for name in names}


def small(modules: dict[str, ModuleType], work: Path, **changes: Any) -> Any:
    sizes = {"rows": 3_000, "many_rows": None, "width": 8, "keys": 40, "client_keys": 20, "budget_s": 0.0}
    return modules["lookup"].Plan(work, **(sizes | {"build_rows": (300,), "build_width": 4} | changes))


def test_the_gather_case_fills_its_keys_and_both_sides_agree(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    cases = modules["lookup_cases"]
    found = cases.against_raw_gather(small(modules, tmp_path, many_rows=5_000))
    assert set(found) == {"vs_raw_gather", "string_keys_vs_raw_gather", "bytes_per_item", "many_rows"}
    speeds = [case["value"] for dtype in ("float16", "float32") for case in found["vs_raw_gather"][dtype].values()]
    assert found["vs_raw_gather"]["value"] == min(speeds)
    assert 16 + 12 + 20 < found["bytes_per_item"]["value"] < 16 + 12 + 26  # row, id, hash + offset + time, table
    snapshot, _ = cases.make_snapshot(tmp_path / "again", 500, 8, "float16")
    numbers = np.arange(0, 500, 7)
    rows = snapshot.lookup(cases.item_ids(numbers))
    assert snapshot.ids.take(rows).to_pylist() == [f"item-{number:07d}" for number in numbers]
    np.testing.assert_array_equal(cases.raw_gather(snapshot.matrix, rows, True), snapshot.gather(rows))
    np.testing.assert_array_equal(cases.raw_gather(snapshot.matrix, rows, False), snapshot.gather_stored(rows))


def test_a_speed_is_the_others_time_over_ours(modules: dict[str, ModuleType]) -> None:
    found = modules["lookup_cases"].speed([2.0, 9.0, 4.0], [1.0, 9.0, 3.0])
    assert (found["value"], found["quartiles"], found["pairs"]) == (0.75, [0.625, 0.875], 3)
    assert (found["mim_ray_ms"], found["other_ms"]) == (4_000.0, 3_000.0)


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_redis_answers_the_same_and_its_server_is_ended(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    redis = pytest.importorskip("redis", reason="the client of Redis is not installed: pip install -e '.[bench]'")
    found = modules["lookup_redis"].against_redis(small(modules, tmp_path))  # compares both answers
    assert found["vs_redis_mget"]["pairs"] == 3
    assert found["vs_redis_mget"]["value"] > 0
    assert found["vs_redis_mget_unix_socket"]["value"] > 0
    with modules["lookup_redis"].redis_server(str(tmp_path)) as (port, _):
        client = redis.Redis(port=port)
        client.set("a", np.ones(2, np.float16).tobytes())
        assert modules["lookup_redis"].mget(client, ["b", "a"], 2).tolist() == [[0, 0], [1, 1]]
    with pytest.raises(redis.exceptions.ConnectionError):
        client.ping()


def test_the_builders_memory_is_that_of_its_own_process(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    found = modules["lookup_build"].builder_memory(small(modules, tmp_path), memory_bytes=2**20)["build"]
    assert found["300x4"]["peak_mb"] < 400
    assert found["peak_last_over_first"] == 1.0


def test_neighbours_and_ranks(modules: dict[str, ModuleType]) -> None:
    dtypes = modules["lookup_dtypes"]
    expected = np.array([[1, 2, 3], [0, 2, 3]])
    assert dtypes.shared(expected, np.array([[2, 1, 9], [7, 8, 0]]), 2) == pytest.approx((1 + 0) / 2)
    items = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]], dtype=torch.float64)
    assert dtypes._nearest(items, 2).tolist() == [[1, 2], [0, 2], [1, 0]]
    queries = torch.tensor([[1.0, 0.1], [1.0, 0.1], [0.1, 1.0]])
    assert dtypes._ranks(queries, items, np.array([1, 1, 0]), np.array([-1, 0, -1])).tolist() == [2, 1, 3]


def test_the_report_tells_what_was_missed_and_what_was_not_measured(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = modules["lookup"]
    side = {"quartiles": [1.0, 3.0], "pairs": 3, "mim_ray_ms": 1.0, "other_ms": 2.0}
    gather = {"vs_raw_gather": {"value": 0.5, "float16": {"float32_out": {"value": 0.5, **side}}}}
    monkeypatch.setitem(main.CASES, "gather", lambda plan: gather)
    monkeypatch.setitem(main.CASES, "redis", lambda plan: {"vs_redis_mget": {"value": 9.0, **side}})
    monkeypatch.setitem(main.CASES, "remote", lambda plan: {"redis_remote": {"missing": "no server"}})
    path = tmp_path / "new" / "report.json"
    assert main.main(["--quick", "--check", "--json", str(path), "--work", str(tmp_path)]) == 1
    report = json.loads(path.read_text())
    assert report["cases"] == ["gather", "redis", "remote"]
    assert report["goals"]["vs_raw_gather"] == {"at_least": 0.8, "met": False}
    assert report["goals"]["vs_redis_mget"]["met"]
    assert report["bytes_per_item"] is None
    assert {"cpu", "load_average", "command", "git_commit"} <= set(report["machine"])
    table = capsys.readouterr().out
    assert re.search(r"vs_raw_gather +0\.5 +>= 0\.8 +NO", table)
    assert re.search(r"bytes_per_item +none +<= 300 +NO", table)
    assert "float32_out: 0.5 [1, 3] of 3 pairs; 1 / 2 ms" in table
    assert not list(tmp_path.glob("mim-ray-lookup-*"))


def test_a_case_that_lacks_something_says_so(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "make demo" in modules["lookup_dtypes"].cost_of_dtypes(small(modules, tmp_path))["dtypes"]["missing"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    missing = modules["lookup_redis"].against_redis(small(modules, tmp_path))["redis"]["missing"]
    assert "apt-get install" in missing or "pip install" in missing  # the server, or already its client


def test_every_key_is_explained(modules: dict[str, ModuleType]) -> None:
    text = (FOLDER / "README.md").read_text()
    assert all(f"`{key}`" in text for key in modules["lookup"].GOALS)
