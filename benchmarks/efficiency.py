"""The paper's Table 6 for a scenario: what content costs, with the representation center and without it.

    python benchmarks/efficiency.py --json efficiency.json --quick     scenario tiny, under a minute
    python benchmarks/efficiency.py --config FILE --backbone din --batch 128

Four ways to the same scores: the base model; +MIM, whose MM embeddings lie ready (the representation center); +MIM whose frozen
encoders embed the target and every behavior of every sample; and end to end, where the CTR loss also trains the encoders.
Weights and data are random: neither changes what a step costs. benchmarks/README.md says what is counted and what is not.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from efficiency_cases import MODES, PHASES, Case, flops_per_sample, peak_memory
from measuring import MEGABYTE, machine

from mim_ray.config import Scenario, load_scenario

TITLES = {
    "base": "base",
    "mim": "+MIM",
    "no_center": "+MIM without the representation center",
    "end_to_end": "+MIM end to end",
}
PAPER_GFLOPS = {"base": (0.114, 0.31), "mim": (0.182, 0.43), "no_center": (240.0, 240.0), "end_to_end": (720.0, 240.0)}
"""Table 6, train and inference, per sample."""
PAPER_MEMORY = {"mim": (0.01, 0.19)}
"""What +MIM adds to the GPU memory of base, as a part of it; the other cells cannot be read."""
GOALS = {"train": 1.59, "inference": 1.387}
"""Highest welcome FLOPs of +MIM over base: the paper's."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny", metavar="NAME|FILE", help="scenario (tiny); weights stay random")
    parser.add_argument("--backbone", default="sim", help="user behavior model (sim)")
    parser.add_argument("--batch", type=int, metavar="B", help="rows whose peak memory is measured (64; --quick 16)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a small batch")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    torch.set_num_threads(1)  # until a measurement's own process sets them: it is forked, and threads are not
    unweighted = ["encoders.vision.weights=null", "encoders.text.weights=null"]
    scenario = load_scenario(args.config, [*unweighted, *args.overrides])
    report = measure(scenario, args.backbone, args.batch or (16 if args.quick else 64), args.device, args.threads)
    print("\n".join(lines(report)))
    if args.json is not None:
        args.json.write_text(json.dumps({**report, "machine": machine(args.threads)}, indent=1) + "\n")
    return 0


def measure(scenario: Scenario, backbone: str, batch: int, device: str, threads: int) -> dict[str, Any]:
    """All cells of the table, and the ratios."""
    rows: dict[str, Any] = {}
    for mode in MODES:
        case = Case(scenario, backbone, mode, device)
        rows[mode] = {
            "gflops": {phase: flops_per_sample(case, phase) / 1e9 for phase in PHASES},
            "peak_mb": {phase: peak_memory(case, phase, batch, threads) / MEGABYTE for phase in PHASES},
        }
    ratio = {phase: rows["mim"]["gflops"][phase] / rows["base"]["gflops"][phase] for phase in PHASES}
    return {
        "scenario": scenario.name,
        "backbone": backbone,
        "num_behaviors": scenario.ciubm.max_behaviors,
        "content_width": scenario.encoders.width,
        "memory_batch": batch,
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "rows": rows,
        "mim_over_base_flops": {phase: round(value, 4) for phase, value in ratio.items()},
    }


def lines(report: dict[str, Any]) -> list[str]:
    """The table as text, the paper's figures beside ours."""
    header = f"{'':40}{'GFLOPs per sample, train':>26}{'paper':>8}{'inference':>12}{'paper':>8}"
    shown = [
        f"{report['backbone']} with {report['num_behaviors']} behaviors, MM width {report['content_width']}, scenario "
        f"{report['scenario']}, {report['device']}; peak memory of {report['memory_batch']} rows",
        header + f"{'MB, train':>14}{'paper':>8}{'inference':>12}{'paper':>8}",
    ]
    for mode in MODES:
        row = report["rows"][mode]
        text = f"{TITLES[mode]:40}"
        for phase, width, paper in zip(PHASES, (26, 12), PAPER_GFLOPS[mode], strict=True):
            text += f"{row['gflops'][phase]:>{width}.6f}{paper:>8g}"
        for phase, width, added in zip(PHASES, (14, 12), PAPER_MEMORY.get(mode, (None, None)), strict=True):
            text += f"{row['peak_mb'][phase]:>{width}.1f}{'—' if added is None else f'+{added:g}×':>8}"
        shown.append(text)
    for phase, goal in GOALS.items():
        value = report["mim_over_base_flops"][phase]
        shown.append(f"FLOPs of +MIM over base, {phase}: {value:.3f} (paper {goal:g})")
    return shown


if __name__ == "__main__":
    raise SystemExit(main())
