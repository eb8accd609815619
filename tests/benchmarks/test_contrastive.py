"""The benchmark's arithmetic, with tiny sizes, and that what its README tells can be typed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The benchmark's files by name, imported as its command does: their folder comes first on the path."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = (
        "measuring",
        "contrastive_cases",
        "contrastive_workers",
        "contrastive_peers",
        "contrastive_retrieval",
        "contrastive",
    )
    return {name: __import__(name) for name in names}


def test_every_goal_of_one_process_is_measured_at_a_small_size(modules: dict[str, ModuleType]) -> None:
    cases = modules["contrastive_cases"]
    found = cases.against_dense(num_queries=8, num_past_batches=2, width=8, budget_s=0.0)
    assert set(found) == {"time_vs_dense", "time_vs_split_dense", "loss_memory_vs_dense"}
    assert all(detail["value"] > 0 for detail in found.values())
    assert found["time_vs_dense"]["negatives"] == 47
    assert found["time_vs_dense"]["pairs"] == 3
    paper = cases.paper_size_memory(num_queries=2, width=2, workers=1)
    assert paper["negatives"] == 22_527
    assert paper["value"] > 0


def test_gradient_error_is_small_and_an_error_is_seen(modules: dict[str, ModuleType]) -> None:
    cases = modules["contrastive_cases"]
    found = cases.gradient_error(num_queries=6, num_past_batches=2, width=8)
    assert len(found["by_case"]) == 9
    assert found["value"] <= 1e-5
    assert cases.relative_error(torch.tensor([1.0, 2.1]), torch.tensor([1.0, 2.0])) == pytest.approx(0.05)


def test_the_dense_losses_are_the_tiled_one(modules: dict[str, ModuleType]) -> None:
    cases = modules["contrastive_cases"]
    batch = cases.Batch.random(num_queries=4, num_fresh=8, num_past=12, width=6, seed=0)
    values = [float(loss(batch).detach()) for loss in (cases.tiled_loss, cases.dense_loss, cases.split_dense_loss)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_a_ratio_is_the_median_over_pairs(modules: dict[str, ModuleType]) -> None:
    found = modules["measuring"].ratio([1.0, 9.0, 3.0], [2.0, 9.0, 4.0])
    assert found["value"] == 0.75
    assert found["quartiles"] == [0.625, 0.875]
    assert (found["mim_ray_ms"], found["other_ms"], found["pairs"]) == (3_000.0, 4_000.0, 3)


def test_steps_take_turns_and_the_order_is_turned_round(modules: dict[str, ModuleType]) -> None:
    seen: list[str] = []
    steps = [lambda: seen.append("a"), lambda: seen.append("b")]
    seconds = modules["measuring"].seconds_in_turn(*steps, budget_s=0.0, least=2)
    assert "".join(seen) == "ab" + "abba"
    assert [len(times) for times in seconds] == [2, 2]


def test_peak_memory_counts_what_was_there_at_once(modules: dict[str, ModuleType]) -> None:
    def step() -> None:
        for _ in range(3):
            torch.zeros(1_000, 256)  # 1,024,000 bytes, released each time

    assert 1_024_000 <= modules["measuring"].peak_bytes(step, ()) < 2_000_000


def test_intervals_over_seeds(modules: dict[str, ModuleType]) -> None:
    found = modules["contrastive_retrieval"]._mean_interval([0.1, 0.2, 0.3])
    assert found["mean"] == 0.2
    assert found["high"] - 0.2 == pytest.approx(4.303 * 0.1 / 3**0.5, abs=1e-4)


def test_report_has_every_key_and_its_table_tells_a_missed_goal(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = modules["contrastive"]
    side = {"quartiles": [1.0, 3.0], "pairs": 3, "mim_ray_ms": 1.0, "other_ms": 2.0}
    workers = {
        "two_workers": {"value": 1e-7},
        "time_vs_open_clip": {"value": 2.0, **side},
        "memory_vs_open_clip": {"value": 0.1, "mim_ray_mb": 1.0, "other_mb": 10.0},
    }
    monkeypatch.setattr(main, "_open_clip", lambda plan: workers)
    small = main.Plan(
        queries=4, width=4, past_batches=1, paper_workers=1, paper_queries=2, budget_s=0.0, peers_until_s=0.0,
        threads=torch.get_num_threads(), quick=True,
    )  # fmt: skip
    monkeypatch.setattr(main.Plan, "quickly", classmethod(lambda cls, threads: small))
    assert (
        main.main(["--quick", "--check", "--json", str(tmp_path / "new" / "report.json")]) == 1
    )  # open_clip was faster
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert set(main.GOALS) <= set(report)
    assert report["time_vs_open_clip"] == 2.0
    assert report["goals"]["time_vs_open_clip"] == {"at_most": 1.0, "met": False}
    assert report["goals"]["grad_max_rel_err"]["met"]
    assert report["pytorch_metric_learning"] is None
    assert "retrieval" not in report
    assert {"cpu", "cpus", "threads", "versions", "command", "measured_at", "git_commit"} <= set(report["machine"])
    table = capsys.readouterr().out
    assert re.search(r"time_vs_open_clip +2 +<= 1 +NO", table)
    assert "not measured" in table


def test_a_missing_peer_tells_how_to_install_it(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pytorch_metric_learning.losses", "sentence_transformers.sentence_transformer.losses"):
        monkeypatch.setitem(sys.modules, name, None)
    found = modules["contrastive"]._peers(modules["contrastive"].Plan(), float("inf"))
    assert found["pytorch_metric_learning"] is None
    assert found["sentence_transformers"] is None
    assert all("pip install -e '.[bench]'" in reason for reason in found["missing"].values())


def test_help_teaches_and_the_documented_commands_exist() -> None:
    commands = re.findall(r"(?m)^ *python (benchmarks/\w+\.py)((?: --\w+)*)", (FOLDER / "README.md").read_text())
    assert commands
    out = subprocess.run(
        [sys.executable, str(ROOT / commands[0][0]), "--help"], capture_output=True, text=True, check=True
    )
    for script, options in commands:
        source = (ROOT / script).read_text()
        assert all(f'"{option}"' in source for option in options.split()), script
        assert script != commands[0][0] or all(option in out.stdout for option in options.split())
