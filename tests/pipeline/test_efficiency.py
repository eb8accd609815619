"""Table 6: FLOPs against sums by hand, and the table that benchmarks/efficiency.py prints."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mim_ray.config import load_scenario
from mim_ray.pipeline.efficiency import MODES, Case, _convolution_backward, flops_per_sample

FOLDER = Path(__file__).parents[2] / "benchmarks"
SMALL = (
    "ciubm.similarity_histogram=false",
    "ciubm.similarity_summary=false",
    "ciubm.hidden=[8]",
    "ciubm.max_behaviors=5",
    "ciubm.id_dim=3",
    "encoders.width=4",
)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return __import__("efficiency")


def test_content_costs_its_products_and_the_wider_first_layer() -> None:
    scenario = load_scenario("tiny", SMALL)
    base, mim = (flops_per_sample(Case(scenario, "average", mode, "cpu"), "inference") for mode in ("base", "mim"))
    length, width, id_width, hidden = 5, 4, 6, 8
    similarities = 2 * length * width
    sums = 2 * length * (width + id_width)
    first_layer = 2 * (width + id_width) * hidden
    assert mim - base == similarities + sums + first_layer


def test_the_backward_pass_of_a_depthwise_convolution_costs_twice_its_forward_pass() -> None:
    known = {torch.ops.aten.convolution_backward: _convolution_backward}
    layer = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    pixels = torch.zeros(2, 6, 8, 8, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=known) as forward:
        answer = layer(pixels)
    with FlopCounterMode(display=False, custom_mapping=known) as backward:
        answer.sum().backward()
    assert forward.get_total_flops() == 2 * 2 * 6 * 9 * 64
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_the_table_has_the_papers_figures_beside_ours_and_a_dash_for_what_cannot_be_read(
    benchmark: ModuleType,
) -> None:
    cells = {phase: 1.5 for phase in ("train", "inference")}
    report = {
        "scenario": "tiny",
        "backbone": "sim",
        "num_behaviors": 50,
        "content_width": 32,
        "memory_batch": 16,
        "device": "cpu",
        "rows": {mode: {"gflops": cells, "peak_mb": cells} for mode in MODES},
        "mim_over_base_flops": {"train": 1.2, "inference": 1.3},
    }
    text = benchmark.lines(report)
    by_title = {line[:40].strip(): line[40:].split() for line in text[2:6]}
    assert by_title["base"] == ["1.500000", "0.114", "1.500000", "0.31", "1.5", "—", "1.5", "—"]
    assert by_title["+MIM"][-3:] == ["+0.01×", "1.5", "+0.19×"]
    assert by_title["+MIM end to end"][1::2] == ["720", "240", "—", "—"]
    assert "1.200 (paper 1.59)" in text[6]
