"""How fast rows of a snapshot are found and gathered, beside a raw NumPy gather and Redis, and what they weigh.

    python benchmarks/lookup.py --json lookup.json --quick                    under a minute, 1 M rows of 128
    python benchmarks/lookup.py --json lookup.json --run runs/demo            adds 10 M rows, the builder's memory, dtypes
    python benchmarks/lookup.py --only dtypes --run runs/demo                 one case

A speed ratio is the other's time over mim_ray's: the median over pairs of runs made in turn, each on keys of its own, with
quartiles. benchmarks/README.md says what each key means.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # both sides of every pair work in one thread
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOALS: dict[str, tuple[str, float]] = {
    "vs_raw_gather": ("at_least", 0.8),
    "string_keys_vs_raw_gather": ("at_least", 0.15),
    "vs_redis_mget": ("at_least", 3.0),
    "vs_redis_mget_remote": ("at_least", 1.0),
    "bytes_per_item": ("at_most", 300.0),
}


@dataclass(frozen=True)
class Plan:
    """Sizes of a run and seconds for each timed pair. The defaults are the goals' sizes.

    Attributes:
        run: root of a finished run, for the cost of dtypes; None leaves that out.
        build_rows: numbers of rows of the log (of width `build_width`) for the builder's memory.
    """

    work: Path
    rows: int = 1_000_000
    many_rows: int | None = 10_000_000
    width: int = 128
    keys: int = 50_000
    client_keys: int = 500
    remote_keys: int = 5_000
    budget_s: float = 10.0
    build_rows: tuple[int, ...] = (1_000_000, 4_000_000)
    build_width: int = 64
    run: str | None = None
    quick: bool = False


Case = Callable[[Plan], dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the report goes")
    parser.add_argument("--quick", action="store_true", help="1 M rows only, shorter; no builder, no dtypes")
    parser.add_argument("--only", action="append", choices=list(CASES), help="one case; may be given again")
    parser.add_argument("--run", metavar="URI", help="root of a finished run (make demo), for the case `dtypes`")
    parser.add_argument("--check", action="store_true", help="leave with 1 when a goal is missed")
    parser.add_argument("--work", type=Path, metavar="DIR", help="for snapshots; a temporary folder is made in it")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="mim-ray-lookup-", dir=args.work) as folder:
        plan = Plan(Path(folder), run=args.run)
        if args.quick:
            plan = Plan(Path(folder), many_rows=None, budget_s=3.0, run=args.run, quick=True)
        report = measure(plan, args.only or [name for name in CASES if not args.quick or name in QUICK])
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(table(report)))
    return int(args.check and not all(goal["met"] for goal in report["goals"].values()))


def measure(plan: Plan, cases: Sequence[str]) -> dict[str, Any]:
    """The whole report: a figure per key, `details` behind each, goals, machine. A case not measured leaves its keys null."""
    import torch
    from measuring import machine

    torch.set_num_threads(1)
    start = time.monotonic()
    details: dict[str, Any] = {}
    for number, name in enumerate(cases, start=1):
        print(f"[{number}/{len(cases)}] {name}", file=sys.stderr, flush=True)
        details |= CASES[name](plan)
    figures = {key: details[key]["value"] if key in details else None for key in GOALS}
    goals = {}
    for key, (side, goal) in GOALS.items():
        value = figures[key]
        met = value is not None and (value >= goal if side == "at_least" else value <= goal)
        goals[key] = {side: goal, "met": met}
    return {
        "benchmark": "lookup",
        "quick": plan.quick,
        "cases": list(cases),
        **figures,
        "goals": goals,
        "details": details,
        "machine": machine(1),
        "seconds": round(time.monotonic() - start, 1),
    }


def table(report: dict[str, Any]) -> list[str]:
    """The report for a person."""
    facts = report["machine"]
    lines = [
        "",
        f"{facts['cpu']}, {facts['cpus']} cpus (load {facts['load_average'][0]}), 1 thread, {facts['system']}",
        f"python {facts['python']}; {facts['command']}   {facts['measured_at']}   commit {facts['git_commit']}",
        "",
        f"{'figure':<28} {'value':>9} {'goal':>9}  met",
    ]
    for key, goal in report["goals"].items():
        value = "none" if report[key] is None else f"{report[key]:.4g}"
        sign = ">= " if "at_least" in goal else "<= "
        bound = goal.get("at_least", goal.get("at_most"))
        lines.append(f"{key:<28} {value:>9} {sign + format(bound, 'g'):>9}  {'yes' if goal['met'] else 'NO'}")
    lines += ["", *(line for key, detail in report["details"].items() for line in _lines(key, detail))]
    return [*lines, "", f"measured in {report['seconds']:.0f} s"]


def _lines(key: str, detail: dict[str, Any]) -> list[str]:
    if "quartiles" in detail:
        low, high = detail["quartiles"]
        times = f"{detail['mim_ray_ms']:.3g} / {detail['other_ms']:.3g} ms"
        return [f"{key}: {detail['value']:.3g} [{low:.3g}, {high:.3g}] of {detail['pairs']} pairs; {times}"]
    nested = {name: value for name, value in detail.items() if isinstance(value, dict)}
    plain = ", ".join(f"{name} {value}" for name, value in detail.items() if name not in nested)
    return [f"{key}: {plain}", *(f"  {line}" for name, value in nested.items() for line in _lines(name, value))]


def _gather(plan: Plan) -> dict[str, Any]:
    from lookup_cases import against_raw_gather

    return against_raw_gather(plan)


def _redis(plan: Plan) -> dict[str, Any]:
    from lookup_redis import against_redis

    return against_redis(plan)


def _remote(plan: Plan) -> dict[str, Any]:
    from lookup_remote import remote_against_redis

    return remote_against_redis(plan)


def _build(plan: Plan) -> dict[str, Any]:
    from lookup_build import builder_memory

    return builder_memory(plan)


def _dtypes(plan: Plan) -> dict[str, Any]:
    from lookup_dtypes import cost_of_dtypes

    return cost_of_dtypes(plan)


CASES: dict[str, Case] = {"gather": _gather, "redis": _redis, "remote": _remote, "build": _build, "dtypes": _dtypes}
"""Each fills some of the keys of `GOALS`, and details beside them."""
QUICK = ("gather", "redis", "remote")


if __name__ == "__main__":
    sys.exit(main())
