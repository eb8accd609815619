"""Nearest items of a snapshot: the index beside an exact search, by share of the true ten that is found and by time.

    python benchmarks/similar_items.py --json similar_items.json --quick     100,000 items of 128 numbers
    python benchmarks/similar_items.py --json similar_items.json             1,000,000 items

Two catalogues: *styles* (2,000 of them, each item near its own: what embeddings of a shop look like) and *noise* (no structure at
all: the worst case). The queries are not those that the index chose its lists with. benchmarks/README.md says what each key means.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mim_ray.representation_center.snapshot import Snapshot, write_snapshot
from mim_ray.serving.nearest_rows import NearestRows

NUM_STYLES, TOP_K = 2_000, 10


@dataclass(frozen=True)
class Plan:
    num_items: int = 1_000_000
    width: int = 128
    num_queries: int = 100
    recall: float = 0.95


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the report goes")
    parser.add_argument("--quick", action="store_true", help="100,000 items")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="mim-ray-similar-benchmark-"))
    try:
        report = measure(Plan(num_items=100_000) if args.quick else Plan(), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(report, indent=1))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(plan: Plan, folder: Path) -> dict[str, Any]:
    """Of each catalogue: recall, milliseconds a search, seconds and bytes of the build."""
    from measuring import machine

    report: dict[str, Any] = {}
    for name in ("styles", "noise"):
        line = f"{folder}/{name}"
        write_snapshot(
            line,
            [f"i{row}" for row in range(plan.num_items)],
            _vectors(plan, name),
            encoder_version="v",
            delta_version=0,
            width=plan.width,
            dtype="float16",
        )
        snapshot = Snapshot.open(line)
        started = time.perf_counter()
        nearest = NearestRows.open(snapshot, exact_rows=1, recall=plan.recall, folder=folder / "indexes")
        built_s = time.perf_counter() - started
        exact = NearestRows.open(snapshot, exact_rows=plan.num_items, recall=1.0, folder=folder / "indexes")
        queries = snapshot.gather(np.random.default_rng(1).choice(plan.num_items, plan.num_queries, replace=False))
        found, found_ms = _search(nearest, queries)
        true, true_ms = _search(exact, queries)
        report[name] = {
            "recall_at_10": round(float(np.mean([np.isin(a, b).mean() for a, b in zip(true, found, strict=True)])), 4),
            "recall_at_build": round(nearest.recall, 4),
            "lists_read": nearest.num_lists_read,
            "search_ms": round(found_ms, 3),
            "exact_ms": round(true_ms, 3),
            "build_s": round(built_s, 1),
            "index_bytes_per_item": round(nearest.num_bytes / plan.num_items, 1),
        }
    return report | {"plan": asdict(plan), "machine": machine(1)}


def _vectors(plan: Plan, name: str) -> Iterator[np.ndarray]:
    random = np.random.default_rng(0)
    styles = random.standard_normal((NUM_STYLES, plan.width), np.float32)
    for first in range(0, plan.num_items, 50_000):
        rows = random.standard_normal((min(50_000, plan.num_items - first), plan.width), np.float32)
        yield 0.7 * rows + styles[random.integers(0, NUM_STYLES, len(rows))] if name == "styles" else rows


def _search(nearest: NearestRows, queries: np.ndarray) -> tuple[list[np.ndarray], float]:
    """Ten rows for each query beside itself, and the median milliseconds of a search."""
    rows, seconds = [], []
    for query in queries:
        started = time.perf_counter()
        rows.append(nearest.search(query, TOP_K + 1)[0][1:])
        seconds.append(time.perf_counter() - started)
    return rows, 1e3 * float(np.median(seconds))


if __name__ == "__main__":
    sys.exit(main())
