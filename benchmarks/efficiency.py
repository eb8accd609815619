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
from measuring import machine

from mim_ray.config import load_scenario
from mim_ray.pipeline.efficiency import MODES, PHASES, TITLES, measure
from mim_ray.pipeline.reproduce import paper

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
        for phase, width, theirs in zip(PHASES, (26, 12), paper.TABLE_6_GFLOPS[mode], strict=True):
            text += f"{row['gflops'][phase]:>{width}.6f}{theirs:>8g}"
        for phase, width, added in zip(PHASES, (14, 12), paper.TABLE_6_MEMORY.get(mode, (None, None)), strict=True):
            text += f"{row['peak_mb'][phase]:>{width}.1f}{'—' if added is None else f'+{added:g}×':>8}"
        shown.append(text)
    for phase, goal in GOALS.items():
        value = report["mim_over_base_flops"][phase]
        shown.append(f"FLOPs of +MIM over base, {phase}: {value:.3f} (paper {goal:g})")
    return shown


if __name__ == "__main__":
    raise SystemExit(main())
