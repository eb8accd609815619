"""How the benchmarks measure: paired runs in turn, peak memory from torch's profiler, and what machine it was."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], object]
MEGABYTE = 2**20


def seconds_in_turn(
    *steps: Step, budget_s: float, least: int = 3, most: int = 60, warm_up: bool = True
) -> tuple[list[float], ...]:
    """Seconds of each step, run in turn (the order is turned round from round to round) until the budget is used.

    Each is run once before, unmeasured, unless `warm_up` is off. At least `least` rounds, at most `most`.
    """
    end = time.perf_counter() + budget_s
    seconds: tuple[list[float], ...] = tuple([] for _ in steps)
    for step in steps if warm_up else ():
        step()
    for number in range(most):
        if number >= least and time.perf_counter() > end:
            break
        for side in range(len(steps)) if number % 2 == 0 else reversed(range(len(steps))):
            seconds[side].append(seconds_of(steps[side]))
    return seconds


def seconds_of(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Median over the pairs of ours / theirs, with quartiles, and both sides' median times."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (ratios[0],) * 3
    return {
        "value": round(statistics.median(ratios), 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "pairs": len(ratios),
        "mim_ray_ms": round(statistics.median(ours) * 1_000, 4),
        "other_ms": round(statistics.median(theirs) * 1_000, 4),
    }


def peak_bytes(step: Step, leaves: Sequence[torch.Tensor]) -> int:
    """Most bytes that torch had allocated at once during the step, beyond what was there when it began.

    The gradients of `leaves` are dropped before: what the step before left must not be released, and so gained, in this one.
    """
    for leaf in leaves:
        leaf.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    return peak_of_profile(profile)


def peak_of_profile(profile: torch.profiler.profile) -> int:
    """Highest sum of allocations less releases over the profile's memory events."""
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def machine(threads: int) -> dict[str, Any]:
    """Hardware, versions and command: what a figure is worth nothing without."""
    versions = {}
    for package in ("torch", "open_clip_torch", "pytorch-metric-learning", "sentence-transformers", "ray", "mim_ray"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "cpus_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}",
        "threads": threads,
        "python": platform.python_version(),
        "versions": versions,
        "command": " ".join(["python", *sys.argv]),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
    }


def missing_package(error: ImportError, name: str) -> str:
    """Why a peer was not measured and what to do."""
    return f"{name} cannot be imported ({error}). Install the peers with: pip install -e '.[bench]'"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
