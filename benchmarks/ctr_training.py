"""Training speed of the CTR models, beside FuxiCTR on the same batches.

    python benchmarks/ctr_training.py --json ctr_training.json --quick        under a minute: the goals
    python benchmarks/ctr_training.py --json ctr_training.json                adds every model, L 50, 200 and 1,000, 100 k and 4 M items
    python benchmarks/ctr_training.py --only vs_fuxictr_100k                  one case

Batch 1,024, item and category embeddings of width 16 each, histories full. A ratio is the median over pairs of steps made in turn,
with quartiles. benchmarks/README.md says what each key means.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not spin: the loader shares their cores
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOALS: dict[str, tuple[str, float]] = {
    **{f"vs_fuxictr_100k.{name}": ("at_least", 2.0) for name in ("din", "sim", "twin")},
    **{f"vs_fuxictr_4m.{name}": ("at_least", 8.0) for name in ("din", "sim", "twin")},
    "mim_over_base_flops.train": ("at_most", 1.59),
    "mim_over_base_flops.inference": ("at_most", 1.387),
    "mim_over_base_time": ("at_most", 1.4),
    "loader_over_step": ("at_most", 1.1),
    "p2_over_p1": ("at_least", 0.9),
}


@dataclass(frozen=True)
class Plan:
    """Sizes of a run and seconds for each pair of sides. The defaults are the goals' sizes."""

    threads: int
    quick: bool = False
    batch_size: int = 1_024
    length: int = 50
    small: int = 100_000
    large: int = 4_000_000
    lengths: tuple[int, ...] = (50, 200, 1_000)
    budget_s: float = 8.0
    least: int = 5
    steps: int = 40
    loader_steps: int = 160  # the loader's start is one of them, and not what training is made of


Case = Callable[[Plan], dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the report goes")
    parser.add_argument("--quick", action="store_true", help="fewer pairs, and only what has a goal")
    parser.add_argument("--check", action="store_true", help="leave with 1 when a goal is missed")
    parser.add_argument("--threads", type=int, default=2, help="of torch, on both sides (2)")
    parser.add_argument("--only", metavar="CASE", help="one case: " + ", ".join(_cases(quick=False)))
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error("--threads must be 1 or more.")
    if args.only is not None and args.only not in _cases(quick=False):
        parser.error(f"--only {args.only}: choose one of {', '.join(_cases(quick=False))}.")
    plan = (
        Plan(args.threads, quick=True, budget_s=0.8, least=3, steps=16, loader_steps=48)
        if args.quick
        else Plan(args.threads)
    )
    report = measure(plan, args.only)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(table(report)))
    return int(args.check and not all(goal["met"] for goal in report["goals"].values()))


def measure(plan: Plan, only: str | None = None) -> dict[str, Any]:
    """A figure per key, `details` behind it, goals, machine."""
    import torch
    from measuring import machine

    torch.set_num_threads(plan.threads)
    start = time.monotonic()
    report: dict[str, Any] = {"benchmark": "ctr_training", "quick": plan.quick}
    details: dict[str, Any] = {}
    for name, case in _cases(plan.quick).items():
        if only in (None, name):
            print(f"{name} ({time.monotonic() - start:.0f} s so far)", file=sys.stderr, flush=True)
            details |= case(plan)
    report |= {key: _figure(found) for key, found in details.items()}
    return report | {
        "details": details,
        "goals": {key: _judged(report, key) for key in GOALS},
        "optimizers": {
            "mim_ray": "lazy Adam on the met rows of the tables (as torch.optim.SparseAdam), fused Adam on the network",
            "fuxictr": "torch.optim.Adam on everything, the norm of all gradients, whole tables included, clipped at 10",
        },
        "machine": machine(plan.threads),
        "seconds": round(time.monotonic() - start, 1),
    }


def _cases(quick: bool) -> dict[str, Case]:
    import ctr_training_cases as cases

    goals: dict[str, Case] = {
        "vs_fuxictr_100k": cases.vs_fuxictr_100k,
        "mim_over_base": cases.mim_over_base,
        "vs_fuxictr_4m": cases.vs_fuxictr_4m,
        "loader_over_step": cases.loader_over_step,
        "p2_over_p1": cases.p2_over_p1,
    }
    return goals if quick else {**goals, "examples_per_s": cases.examples_per_s}


def _figure(found: Any) -> Any:
    """What stands behind a key, each part with a `value` cut down to it."""
    if not isinstance(found, dict):
        return found
    return found["value"] if "value" in found else {key: _figure(part) for key, part in found.items()}


def _judged(report: dict[str, Any], key: str) -> dict[str, Any]:
    """The figure of a goal by its dotted key; None, and not met, where it was not measured."""
    side, bound = GOALS[key]
    value: Any = report
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    met = value is not None and (value >= bound if side == "at_least" else value <= bound)
    return {side: bound, "value": value, "met": met}


def table(report: dict[str, Any]) -> list[str]:
    """The report for a person."""
    facts = report["machine"]
    lines = [
        "",
        f"{facts['cpu']}, {facts['cpus_allowed']} of {facts['cpus']} cpus (load {facts['load_average'][0]}), "
        f"{facts['threads']} threads, torch {facts['versions']['torch']}",
        f"{facts['command']}   {facts['measured_at']}   commit {facts['git_commit']}",
        *(f"{side}: {text}" for side, text in report["optimizers"].items()),
        "",
        f"{'figure':<32} {'value':>8} {'goal':>9}  met",
    ]
    for key, goal in report["goals"].items():
        value = "none" if goal["value"] is None else f"{goal['value']:.3g}"
        bound = f">= {goal['at_least']:g}" if "at_least" in goal else f"<= {goal['at_most']:g}"
        lines.append(f"{key:<32} {value:>8} {bound:>9}  {'yes' if goal['met'] else 'NO'}")
    for key in ("vs_fuxictr_100k", "vs_fuxictr_4m"):
        for name, pair in report["details"].get(key, {}).items():
            text = pair.get("missing") or (
                f"{pair['value']:.2f} {pair['quartiles']}  {pair['mim_ray']:,} to {pair['fuxictr']:,} examples/s "
                f"({pair['pairs']} pairs); behavior model of equal widths: {pair['equal_widths'] or '-'}"
            )
            lines.append(f"  {key}.{name}: {text}")
    for dnn, found in report["details"].get("mim_over_base_flops", {}).get("by_dnn", {}).items():
        lines.append(f"  mim_over_base_flops of SIM, DNN {dnn}: train {found['train']}, inference {found['inference']}")
    for row in report.get("examples_per_s", []):
        lines.append("  " + "  ".join(f"{name} {value:,}" if name != "model" else value for name, value in row.items()))
    return [*lines, "", f"measured in {report['seconds']:.0f} s"]


if __name__ == "__main__":
    sys.exit(main())
