"""How fast the extraction is beside a plain process pool and Daft, and whether its memory grows with the table.

    python benchmarks/extraction.py --json extraction.json --quick       under a minute on four cores
    python benchmarks/extraction.py --json extraction.json               an hour: runs of a minute, then 10 M items
    python benchmarks/extraction.py --json memory.json --only memory --items 2_000_000

JPEGs of 512 x 512 pixels, quality 85, to 224 x 224 and a random ResNet-18, on the same cores; each side is warm in a process of
its own, and the sides take turns. A ratio is the other side's seconds over ours: above 1 the extraction is faster.
benchmarks/README.md says what each key means.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many processes as cores on every side
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

GOALS = {"vs_process_pool": (">=", 0.9), "vs_daft": (">=", 1.0), "pss_10m_over_100k": ("<=", 1.5)}


@dataclass(frozen=True)
class Plan:
    """Sizes of a run. Attributes: decode_items: of the case without a model. small, large: items of the memory part."""

    num_items: int = 8_192
    decode_items: int = 16_384
    rounds: int = 3
    cores: int = 4
    small: int = 100_000
    large: int = 10_000_000
    quick: bool = False
    work: Path = Path("runs/benchmark_extraction")
    only: str | None = None

    @classmethod
    def quickly(cls, cores: int, work: Path) -> Plan:
        return cls(num_items=384, decode_items=2_048, rounds=1, cores=cores, quick=True, work=work, only="speed")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the report goes")
    parser.add_argument("--quick", action="store_true", help="few items, one round, no memory part")
    parser.add_argument("--check", action="store_true", help="leave with 1 when a goal is missed")
    parser.add_argument("--only", choices=("speed", "memory"), help="one part alone")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="of each side (all)")
    parser.add_argument("--pictures", type=int, metavar="N", help="of the speed part, instead of 8,192 and 16,384")
    parser.add_argument("--items", type=int, default=Plan.large, help="of the memory part's large table (10 M)")
    parser.add_argument("--work", type=Path, default=Plan.work, metavar="DIR", help="pictures and tables, kept")
    args = parser.parse_args(argv)
    if args.cores < 1 or args.items < Plan.small or (args.pictures or 1) < 1:
        parser.error(f"--cores and --pictures must be 1 or more and --items {Plan.small} or more.")
    work = args.work.resolve()
    plan = Plan(cores=args.cores, large=args.items, work=work, only=args.only)
    plan = Plan.quickly(args.cores, work) if args.quick else plan
    if args.pictures is not None:
        plan = replace(plan, num_items=args.pictures, decode_items=args.pictures)
    report = measure(plan)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(table(report)))
    return int(args.check and not all(goal["met"] for goal in report["goals"].values()))


def measure(plan: Plan) -> dict[str, Any]:
    """The whole report: a figure per key (null where not measured), `details` behind each, goals, machine."""
    from measuring import machine

    start = time.monotonic()
    details: dict[str, Any] = {}
    if plan.only != "memory":
        details |= measure_speed(plan)
    if plan.only != "speed":
        from extraction_memory import measure_memory

        details |= measure_memory(plan.small, plan.large, plan.work, plan.cores)
    report: dict[str, Any] = {"benchmark": "extraction", "quick": plan.quick}
    report |= {key: details[key]["value"] if details.get(key) else None for key in (*GOALS, "decode_vs_process_pool")}
    report["goals"] = {
        key: {"goal": f"{sign} {bound:g}", "met": (report[key] >= bound) if sign == ">=" else (report[key] <= bound)}
        for key, (sign, bound) in GOALS.items()
        if report[key] is not None
    }
    return report | {
        "details": details,
        "machine": machine(plan.cores),
        "seconds": round(time.monotonic() - start, 1),
    }


def measure_speed(plan: Plan) -> dict[str, Any]:
    """`vs_process_pool`, `vs_daft`, and the case that only decodes."""
    import extraction_data
    from extraction_sides import Side
    from measuring import missing_package

    _tell("pictures")
    encoded = extraction_data.make(plan.work, plan.num_items)
    decoded = extraction_data.make(plan.work, plan.decode_items)
    details: dict[str, Any] = {"missing": {}}
    names = ["extract", "process_pool", "daft", "daft_threads"]
    try:
        import daft  # noqa: F401
    except ImportError as error:
        details["missing"]["daft"] = missing_package(error, "daft")
        names = names[:2]
    _tell("start of " + ", ".join(names))
    sides = [Side(name, encoded.encoder, plan.cores) for name in names]
    try:
        for side in sides:
            side.wait()
        seconds = _in_turn(sides, encoded.items, True, plan.rounds)
        decode_seconds = _in_turn(sides[:2], decoded.items, False, plan.rounds)
    finally:
        for side in sides:
            side.close()
    if "daft" in seconds:
        ways = {name: statistics.median(seconds[name]) for name in names[2:]}
        fastest = min(ways, key=lambda name: ways[name])
        details["vs_daft"] = _compare(seconds["extract"], seconds[fastest], plan.num_items)
        details["vs_daft"] |= {
            "way": fastest,
            "seconds_by_way": {name: round(value, 2) for name, value in ways.items()},
        }
    details["vs_process_pool"] = _compare(seconds["extract"], seconds["process_pool"], plan.num_items)
    details["decode_vs_process_pool"] = _compare(
        decode_seconds["extract"], decode_seconds["process_pool"], plan.decode_items
    )
    return details


def table(report: dict[str, Any]) -> list[str]:
    """The report for a person."""
    facts = report["machine"]
    lines = [
        "",
        f"{facts['cpu']}, {facts['cpus']} cpus (load {facts['load_average'][0]}), {facts['threads']} used, {facts['system']}",
        f"{facts['command']}   {facts['measured_at']}   commit {facts['git_commit']}",
        "",
        f"{'figure':<24} {'value':>8} {'goal':>8}  {'met':<4} behind it",
    ]
    for key in (*GOALS, "decode_vs_process_pool"):
        value = "none" if report[key] is None else f"{report[key]:.3g}"
        goal = report["goals"].get(key, {"goal": "", "met": None})
        met = {True: "yes", False: "NO", None: ""}[goal["met"]]
        lines.append(f"{key:<24} {value:>8} {goal['goal']:>8}  {met:<4} {_behind(report['details'].get(key))}")
    lines += [f"not measured: {reason}" for reason in report["details"].get("missing", {}).values()]
    return [*lines, "", f"measured in {report['seconds']:.0f} s"]


def _in_turn(sides: list[Any], items: str, encode: bool, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            _tell(f"{'encode' if encode else 'decode only'}, round {number + 1} of {rounds}: {side.name}")
            seconds[side.name].append(side.seconds(items, encode))
    return seconds


def _compare(ours: list[float], theirs: list[float], num_items: int) -> dict[str, Any]:
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    return {
        "value": round(statistics.median(ratios), 4),
        "rounds": [round(ratio, 4) for ratio in ratios],
        "items": num_items,
        "mim_ray_s": [round(value, 2) for value in ours],
        "other_s": [round(value, 2) for value in theirs],
        "mim_ray_items_per_s": round(num_items / statistics.median(ours), 1),
        "other_items_per_s": round(num_items / statistics.median(theirs), 1),
    }


def _behind(detail: dict[str, Any] | None) -> str:
    if not detail:
        return ""
    if "small_mb" in detail:
        return (
            f"{detail['large_mb']:,} MB at {detail['large']:,} items, {detail['small_mb']:,} MB at {detail['small']:,}"
        )
    return (
        f"{detail['mim_ray_items_per_s']:,}/s against {detail['other_items_per_s']:,}/s,"
        f" {detail['items']:,} items, rounds {detail['rounds']}"
    )


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
