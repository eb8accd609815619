"""benchmarks/ctr_training.py with tiny sizes: its cases, its report, and that both sides train on the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    return {name: __import__(name) for name in ("ctr_training_sides", "ctr_training_cases", "ctr_training")}


@pytest.fixture
def plan(modules: dict[str, ModuleType]) -> Any:
    sizes = {"batch_size": 8, "length": 50, "small": 60, "large": 90, "lengths": (4, 30)}
    return modules["ctr_training"].Plan(torch.get_num_threads(), **sizes, budget_s=0.0, least=1, steps=3)


def test_both_sides_get_the_same_rows(modules: dict[str, ModuleType]) -> None:
    sides = modules["ctr_training_sides"]
    (raw,) = sides.raw_batches(1, 4, 3, 50)
    batch, (label, features, mask) = sides.indexed(raw, None), sides.fuxi_batch(raw)
    rows = features["item_id"].view(4, 4)
    assert torch.equal(batch.item_row[batch.behaviors], rows[:, :-1])
    assert torch.equal(batch.item_row[batch.target], rows[:, -1])
    assert torch.equal(batch.category[batch.behaviors], features["cate_id"].view(4, 4)[:, :-1])
    assert torch.equal(batch.label, label["label"])
    assert mask.all()


def test_our_step_learns(modules: dict[str, ModuleType]) -> None:
    sides = modules["ctr_training_sides"]
    (raw,) = sides.raw_batches(1, 32, 6, 500)
    batch = sides.indexed(raw, sides.mm_vectors(500))
    step = sides.OurStep("sim", 500, with_content=True)
    losses = [step(batch) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_the_cases_without_a_peer_fill_their_keys(modules: dict[str, ModuleType], plan: Any) -> None:
    cases = modules["ctr_training_cases"]
    flops = cases.mim_over_base(plan)
    assert 1.0 < flops["mim_over_base_flops"]["inference"] < flops["mim_over_base_flops"]["train"] * 2
    assert set(flops["mim_over_base_flops"]["by_dnn"]) == {"512-128-64", "500-500-500", "128-64"}
    assert flops["mim_over_base_time"]["value"] > 0
    loader = cases.loader_over_step(plan)["loader_over_step"]
    assert loader["examples_per_s_with_loader"] > 0
    assert len(cases.examples_per_s(plan)["examples_per_s"]) == 2 * 2 * 6


def test_the_peer_steps_or_says_what_to_install(modules: dict[str, ModuleType], plan: Any) -> None:
    for pair in modules["ctr_training_cases"].vs_fuxictr_100k(plan)["vs_fuxictr_100k"].values():
        assert pair["value"] > 0 if "missing" not in pair else ".[bench]" in pair["missing"]


@pytest.mark.distributed
@pytest.mark.chaos  # kills nothing, but its groups of processes take a minute to start
def test_workers_are_counted_together(modules: dict[str, ModuleType], plan: Any) -> None:
    found = modules["ctr_training_cases"].p2_over_p1(plan)["p2_over_p1"]
    assert np.isfinite(found["value"])
    assert set(found["examples_per_s"]) == {"p1", "p2"}


def test_a_report_judges_what_was_measured(modules: dict[str, ModuleType], plan: Any, tmp_path: Path) -> None:
    module = modules["ctr_training"]
    report = json.loads(json.dumps(module.measure(plan, "mim_over_base")))
    assert report["goals"]["mim_over_base_flops.train"]["value"] == report["mim_over_base_flops"]["train"]
    assert report["goals"]["p2_over_p1"] == {"at_least": 0.9, "value": None, "met": False}
    assert any(line.startswith("mim_over_base_time") for line in module.table(report))
