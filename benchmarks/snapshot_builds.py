"""What the next snapshot costs after 1 % of the items changed: made from the state before, beside one of the whole log.

    python benchmarks/snapshot_builds.py --json snapshot_builds.json --quick     100,000 items of 128 numbers
    python benchmarks/snapshot_builds.py --json snapshot_builds.json             1,000,000 items

Both builds show the same Delta version, in turn, and their files are compared. benchmarks/README.md says what each key means.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mim_ray.data.schema import TIME
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.snapshot_files import read_manifest
from mim_ray.representation_center.table import EmbeddingTable

VERSION = "v1"
_FILE_ROWS = 50_000


@dataclass(frozen=True)
class Plan:
    num_items: int = 1_000_000
    width: int = 128
    rounds: int = 5
    dtypes: tuple[str, ...] = ("float32", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the report goes")
    parser.add_argument("--quick", action="store_true", help="100,000 items")
    args = parser.parse_args(argv)
    plan = Plan(num_items=100_000) if args.quick else Plan()
    folder = Path(tempfile.mkdtemp(prefix="mim-ray-snapshots-benchmark-"))
    try:
        report = measure(plan, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(report, indent=1))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(plan: Plan, folder: Path) -> dict[str, Any]:
    """Seconds of both builds for each dtype."""
    from measuring import machine

    random = np.random.default_rng(0)
    table = EmbeddingTable(f"{folder}/table").create()
    for first in range(0, plan.num_items, _FILE_ROWS):
        numbers = np.arange(first, min(first + _FILE_ROWS, plan.num_items))
        table.append(make_rows(random, numbers, plan.width, 0), encoder_version=VERSION)
    since: dict[str, list[float]] = {dtype: [] for dtype in plan.dtypes}
    whole: dict[str, list[float]] = {dtype: [] for dtype in plan.dtypes}
    for dtype in plan.dtypes:
        build_snapshot(table, VERSION, f"{folder}/{dtype}", dtype=dtype, keep=1)
    for number in range(plan.rounds):
        changed = np.sort(random.choice(plan.num_items, plan.num_items // 100, replace=False))
        table.append(make_rows(random, changed, plan.width, 1 + number), encoder_version=VERSION)
        for dtype in plan.dtypes:
            found: dict[bool, Snapshot] = {}
            for whole_log in (False, True) if number % 2 else (True, False):
                line = f"{folder}/{dtype}" + "-whole" * whole_log
                start = time.perf_counter()
                found[whole_log] = build_snapshot(table, VERSION, line, dtype=dtype, keep=1, whole_log=whole_log)
                (whole if whole_log else since)[dtype].append(time.perf_counter() - start)
            assert found[False].base is not None
            assert read_manifest(found[False].uri)["files"] == read_manifest(found[True].uri)["files"]
    return {
        dtype: {
            "since_over_whole": round(
                statistics.median(a / b for a, b in zip(since[dtype], whole[dtype], strict=True)), 3
            ),
            "since_s": [round(value, 3) for value in since[dtype]],
            "whole_s": [round(value, 3) for value in whole[dtype]],
        }
        for dtype in plan.dtypes
    } | {"plan": asdict(plan), "machine": machine(1)}


def make_rows(random: np.random.Generator, numbers: np.ndarray, width: int, day: int) -> pa.Table:
    """Rows of these items with content of that day."""
    values = pa.array(random.standard_normal(len(numbers) * width, np.float32))
    return pa.table(
        {
            "item_id": [f"item-{number:09d}" for number in numbers.tolist()],
            "embedding": pa.FixedSizeListArray.from_arrays(values, width).cast(pa.list_(pa.float32())),
            "content_hash": [f"{number:016x}{day:016x}" for number in numbers.tolist()],
            "content_at": pa.array(np.full(len(numbers), day * 86_400_000_000), TIME),
        }
    )


if __name__ == "__main__":
    sys.exit(main())
