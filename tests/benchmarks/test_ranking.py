"""benchmarks/ranking.py with tiny sizes: uvicorn and the load as real processes, the arithmetic, the report. No Ray."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

psutil = pytest.importorskip("psutil", reason="it comes with the environment of make setup")
FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The benchmark's files by name, imported as its command does: their folder comes first on the path."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = (
        "measuring",
        "ranking_load",
        "ranking_figures",
        "ranking_run",
        "ranking_servers",
        "ranking_cases",
        "ranking",
    )
    return {name: __import__(name) for name in names}


def test_both_models_are_ranked_through_uvicorn_and_the_processes_end(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIM_RAY_CACHE", str(tmp_path / "cache"))
    cases, servers = modules["ranking_cases"], modules["ranking_servers"]
    started = []
    uvicorn = servers.Server.uvicorn.__func__
    monkeypatch.setattr(
        servers.Server, "uvicorn", lambda *args: started.append(uvicorn(servers.Server, *args)) or started[-1]
    )
    plan = modules["ranking"].Plan(
        size=(20, 5),
        large=(30, 6),
        num_items=300,
        num_users=10,
        connections=(1, 2),
        rounds=1,
        seconds=0.2,
        open_s=0.5,
        encoding_s=0.0,
        serve=False,
        default_proxy=False,
    )
    found = cases.measure_all(plan, tmp_path)
    assert found["mim_vs_base_p50"]["value"] > 0
    assert found["vs_uvicorn"]["missing"] == "left out"
    assert found["vs_uvicorn"]["uvicorn_per_s"] > 0
    assert "value" not in found["p99_vs_uvicorn"], "one side is no comparison"
    assert found["p99_vs_uvicorn"]["requests"] > 0
    assert found["large"]["candidates"] == 30
    assert found["vs_live_encoding"]["value"] > 1
    processes = [child for server in started for child in server._children]
    assert len(processes) == 2
    assert all(process.poll() is not None for process in processes)
    with modules["ranking_load"].Load("") as load:
        outcomes = load.closed(started[0].url, tmp_path / "log", connections=1, seconds=0.01)
    with pytest.raises(RuntimeError, match=r"no request was ranked.*'0'"):
        modules["ranking_figures"].latencies_ms(outcomes)


def test_the_same_seed_asks_for_the_same_at_the_same_times(modules: dict[str, ModuleType]) -> None:
    load, run = modules["ranking_load"], modules["ranking_run"]
    at = load.arrivals([(200.0, 5.0), (800.0, 5.0)], seed=3)
    np.testing.assert_array_equal(at, load.arrivals([(200.0, 5.0), (800.0, 5.0)], seed=3))
    assert (np.diff(at) >= 0).all()
    assert at[-1] < 10
    assert (at < 5).sum() == pytest.approx(1_000, abs=4 * 1_000**0.5)
    assert (at >= 5).sum() == pytest.approx(4_000, abs=4 * 4_000**0.5)
    gaps = np.diff(at[at < 5])
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.15), "as exponential gaps are"
    sizes = {"num": 3, "candidates": 4, "length": 50}
    logs = [run.log_of_requests(run.Shop(), seed=seed, **sizes) for seed in (1, 1, 2)]
    assert logs[0] == logs[1] != logs[2]
    replay = load._Replay(load.Order("http://127.0.0.1:1/v1/rank", "", 1), logs[0])
    first, second = (json.loads(replay._next(due)) for due in (0.0, 0.25))
    assert (first["timestamp"], second["timestamp"]) == (
        "2026-01-01T00:00:00+00:00",
        "2026-01-01T00:00:00.250000+00:00",
    )
    assert len(set(first["candidates"])) == 4


def outcomes(modules: dict[str, ModuleType], rows: list[tuple[float, float, int, bool]]) -> Any:
    found = modules["ranking_load"].Outcomes(elapsed_s=2.0)
    for due, latency, status, told in rows:
        found.add(due, 0.001, latency, (status, told))
    return found


def test_figures_of_an_overload(modules: dict[str, ModuleType]) -> None:
    rows = [(0.5, 0.01, 200, False), (1.1, 0.03, 200, False), (1.2, 0.002, 503, True), (1.3, 0.004, 503, False)]
    rows += [(1.4, 15.0, 0, False), (2.1, 0.01, 503, True), (2.6, 0.05, 200, False), (3.1, 0.01, 200, False)]
    figures = modules["ranking_figures"]
    found = figures.overload(outcomes(modules, rows), [(10, 1.0), (60, 1.0), (10, 2.0)], normal_p99_ms=20.0)
    assert found["overload_p99_ratio"]["value"] == 1.5
    assert found["overload_p99_ratio"]["other"] == {"0": 1}
    assert found["overload_503_p50_ms"]["value"] == 3.0
    assert found["overload_retry_after_ratio"]["value"] == 0.5
    assert found["recovery_s"]["value"] == 1.0, "refused in the first half second, slow in the second"
    usual = [(0.1, 0.01, 200, False), (0.2, 0.01, 503, True), *rows]
    found = figures.overload(outcomes(modules, usual), [(10, 1.0), (60, 1.0), (10, 2.0)], normal_p99_ms=20.0)
    assert found["recovery_s"] == {"value": 0.0, "refused_before": 0.3333}, "as many are refused as before"
    never = figures.overload(outcomes(modules, rows[:-1]), [(10, 1.0), (60, 1.0), (10, 2.0)], normal_p99_ms=20.0)
    assert never["recovery_s"]["value"] is None
    assert figures.failed(outcomes(modules, rows)) == 1
    assert figures.rate(outcomes(modules, rows)) == 2.0


def test_a_server_that_does_not_start_is_missing_with_its_reason(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    servers = modules["ranking_servers"]
    reason = r"uvicorn-din-mim did not start: .*shop\.json"  # there is no run
    with servers.Server.uvicorn(tmp_path, "din-mim", 1) as server:
        server.open()
        with pytest.raises(servers.NotStartedError, match=reason):
            server.wait()


def test_a_server_is_ended_with_all_that_it_has_started(modules: dict[str, ModuleType], tmp_path: Path) -> None:

    line = "import subprocess, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", line], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    grandchild = psutil.Process(int(child.stdout.readline()))
    servers = modules["ranking_servers"]
    servers.END_S, before = 0.1, servers.END_S
    try:
        servers.Server("deaf", 1, [child], tmp_path / "log").stop()
    finally:
        servers.END_S = before
    assert child.returncode == -9
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE


def test_the_report_tells_what_was_missed_and_what_was_not_measured(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    details = {
        "vs_uvicorn": {"value": 0.5, "pairs": 2},
        "recovery_s": {"value": 0.5},
        "overhead_p50_ms": {"missing": "no proxy"},
    }
    monkeypatch.setattr(modules["ranking_cases"], "measure_all", lambda plan, folder: details)
    monkeypatch.delenv("MIM_RAY_CACHE", raising=False)
    main, path = modules["ranking"], tmp_path / "new" / "report.json"
    assert main.main(["--quick", "--check", "--json", str(path), "--work", str(tmp_path)]) == 1
    report = json.loads(path.read_text())
    assert report["goals"]["vs_uvicorn"] == {"at_least": 0.8, "met": False}
    assert report["goals"]["recovery_s"]["met"]
    assert report["overhead_p50_ms"] is None
    assert report["plan"]["size"] == [200, 50]
    assert {"cpu", "load_average", "load_average_before", "command", "git_commit"} <= set(report["machine"])
    printed = capsys.readouterr().out
    assert re.search(r"vs_uvicorn +0\.5 +>= 0\.8 +NO", printed)
    assert re.search(r"overhead_p50_ms +none +<= 3 +NO", printed)
    assert "missing no proxy" in printed
    assert not list(tmp_path.glob("mim-ray-ranking-*"))


def test_every_key_is_explained(modules: dict[str, ModuleType]) -> None:
    text = (FOLDER / "README.md").read_text()
    main = modules["ranking"]
    assert all(f"`{key}`" in text for key in (*main.GOALS, *main.REPORTED))
