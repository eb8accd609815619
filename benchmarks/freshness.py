"""How soon a new item's embedding is answered by the parameter machines: posted over HTTP, encoded, stored, pushed, looked up.

    python benchmarks/freshness.py --json freshness.json --quick      under a minute
    python benchmarks/freshness.py --json freshness.json              three minutes of load

20 items a second (every fifth changes an item of the snapshot) are posted open loop, from a process of their own, to a new-item
encoder (scenario tiny, untrained; one uvicorn process that folds the window every 10 s). Two more processes look the items up
without pause in 2 shards: one calls the machines, one reads their mappings. An item's time ends when both have got its new
vector. benchmarks/README.md says what each key means.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GOAL_S = 2.0
RATE = 20.0
SHARDS = 2
PATHS = ("called", "read")
"""Ways to an answer: a call to the machine of the shard, and its mapping."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the report goes")
    parser.add_argument("--quick", action="store_true", help="12 + 5 seconds of load")
    parser.add_argument("--check", action="store_true", help="leave with 1 when the goal is missed")
    parser.add_argument("--work", type=Path, metavar="DIR", help="a temporary folder is made in it")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="mim-ray-freshness-", dir=args.work) as folder:
        report = measure(Path(folder), 12.0 if args.quick else 180.0, 5.0 if args.quick else 30.0)
    report["quick"] = args.quick
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(table(report)))
    return int(args.check and not report["goals"]["p99_s"]["met"])


def measure(work: Path, pushed_s: float, followed_s: float) -> dict[str, Any]:
    """The whole report.

    Args:
        pushed_s: seconds of load with pushes, which the figures come from. followed_s: then without, so that the machines find
            the items in the window, for comparison.
    """
    import ray
    from freshness_parts import make_center
    from measuring import machine

    from mim_ray.config.scenario import ParameterMachines as Settings
    from mim_ray.config.scenario import Run
    from mim_ray.representation_center.parameter_machines import ParameterMachines
    from mim_ray.runtime.cluster import cluster

    start = time.monotonic()
    center, release = make_center(work)
    state = f"{work}/machines.json"
    settings = Settings(shards=SHARDS, replicas=1, cpus_per_machine=0, folder=f"{work}/machines", deadline_ms=10_000)
    with cluster(Run(num_cpus=2)):
        machines = ParameterMachines.start(state, release, settings)
        address = ray.get_runtime_context().gcs_address
        try:
            folder = _load(work, pushed_s, followed_s, [center, address, state])
        finally:
            machines.stop()
    pushed, followed = summary(folder, "pushed"), summary(folder, "followed")
    figures = {"p50_s": pushed["answered_after_post"]["p50_s"], "p99_s": pushed["answered_after_post"]["p99_s"]}
    complete = pushed["items"] == pushed["answered"] and not pushed["refused"]
    return {
        "benchmark": "freshness",
        **figures,
        "goals": {"p99_s": {"less_than": GOAL_S, "met": complete and figures["p99_s"] < GOAL_S}},
        "details": {"rate_per_s": RATE, "shards": SHARDS, "pushed": pushed, "followed": followed},
        "machine": machine(1),
        "seconds": round(time.monotonic() - start, 1),
    }


def _load(work: Path, pushed_s: float, followed_s: float, where: list[str]) -> Path:
    """Run the processes; the folder with what they wrote down."""
    folder = work / "load"
    folder.mkdir()
    parts = str(Path(__file__).parent / "freshness_parts.py")

    def start(part: str, *args: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, parts, part, str(folder), *args], stdout=subprocess.PIPE, text=True)

    running = [start("serve", *where), *(start("watch", *where[1:], path) for path in PATHS)]
    try:
        url, *_ = [_said(process) for process in running]
        print(f"{RATE:g} items a second for {pushed_s + followed_s:.0f} s", file=sys.stderr, flush=True)
        posting = start("post", url, str(RATE), str(pushed_s), str(followed_s))
        running.append(posting)
        posting.wait(pushed_s + followed_s + 120)
        for process in running[1:3]:
            process.wait(60)
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
                process.wait(30)
    return folder


def summary(folder: Path, how: str) -> dict[str, Any]:
    """Of the items that came to the machines in one way, what the processes wrote down; all times are of one clock."""
    posts = [line for line in _lines(folder / "posts") if line["how"] == how]
    acks = {line["item"]: line for line in _lines(folder / "acks")}
    seen = {path: {line["item"]: line for line in _lines(folder / f"seen-{path}")} for path in PATHS}
    good = [post for post in posts if acks.get(post["item"], {}).get("status") == 200]
    answered = [post for post in good if all(post["item"] in seen[path] for path in PATHS)]

    def delays(since: str, *paths: str, shard: int | None = None) -> dict[str, Any]:
        values = []
        for post in answered:
            first = acks[post["item"]] if since == "ack" else post
            if shard is None or seen[paths[0]][post["item"]]["shard"] == shard:
                values.append(max(0.0, max(seen[path][post["item"]]["at"] for path in paths) - first["at"]))
        return _percentiles(values)

    return {
        "items": len(posts),
        "refused": len(posts) - len(good),
        "answered": len(answered),
        "acknowledged_after_post": _percentiles([acks[post["item"]]["at"] - post["at"] for post in good]),
        "answered_after_post": delays("post", *PATHS),
        "answered_after_acknowledgement": delays("ack", *PATHS),
        **{f"{path}_after_post": delays("post", path) for path in PATHS},
        **{f"shard_{shard}_after_post": delays("post", *PATHS, shard=shard) for shard in range(SHARDS)},
    }


def table(report: dict[str, Any]) -> list[str]:
    """The report for a person."""
    facts = report["machine"]
    lines = [
        "",
        f"{facts['cpu']}, {facts['cpus']} cpus (load {facts['load_average'][0]}), {facts['system']}",
        f"python {facts['python']}; {facts['command']}   {facts['measured_at']}   commit {facts['git_commit']}",
    ]
    for name in ("pushed", "followed"):
        phase = report["details"][name]
        lines += ["", f"{name}: {phase['answered']} of {phase['items']} items answered, {phase['refused']} refused"]
        for key, value in phase.items():
            if isinstance(value, dict):
                text = "   ".join(f"{part} {number:.3f}" for part, number in value.items())
                lines.append(f"  {key:<32} {text}")
    met = "yes" if report["goals"]["p99_s"]["met"] else "NO"
    lines += ["", f"p50_s {report['p50_s']:.3f}   p99_s {report['p99_s']:.3f}   goal p99_s < {GOAL_S:g}: {met}"]
    return [*lines, f"measured in {report['seconds']:.0f} s"]


def _said(process: subprocess.Popen[str]) -> str:
    """The line a process prints when it is ready."""
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise RuntimeError(f"{' '.join(process.args[1:4])} ended with {process.wait(10)} before it was ready.")  # type: ignore[index]
    return line


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50_s": round(cuts[49], 4), "p99_s": round(cuts[98], 4), "max_s": round(max(seconds), 4)}


if __name__ == "__main__":
    sys.exit(main())
