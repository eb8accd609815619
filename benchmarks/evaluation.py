"""Memory and time of judging two models on many test rows: `python benchmarks/evaluation.py --rows 20000000`.

The rows are random (users with a taste, items with a popularity, two noisy probabilities); what is measured is everything
after the models' predictions: histograms by slice and group of users, GAUC by a shuffle to users, intervals. Leaves with 1
when the peak of resident memory, beyond what there was at the start, passes LIMIT_MB.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring import machine

from mim_ray.data.ids import mix
from mim_ray.evaluation.compare import Comparison
from mim_ray.evaluation.metrics import auc, group_auc
from mim_ray.evaluation.rows import Columns

CHUNK = 500_000
NUM_ITEMS, NUM_SLICES = 100_000, 54
LIMIT_MB = 700


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--users", type=int, default=2_000_000)
    parser.add_argument("--quick", action="store_true", help="1 M rows, compared with the metrics of all rows at once")
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    num_rows = 1_000_000 if args.quick else args.rows
    before = _peak_mb()
    with tempfile.TemporaryDirectory() as name:
        columns = _rows(Path(name), num_rows, args.users)
        start = time.perf_counter()
        comparison = _judge(columns, Path(name))
        models, differences = comparison.metrics({"b": ("b", "a")})
        slices = [comparison.slice(number, {"b": ("b", "a")}) for number in range(1, NUM_SLICES + 1)]
        seconds = time.perf_counter() - start
        figures: dict[str, Any] = {
            "num_rows": num_rows,
            "num_users": comparison.num_users,
            "peak_mb_over_start": round(_peak_mb() - before),
            "limit_mb": LIMIT_MB,
            "seconds": round(seconds, 1),
            "rows_per_s": round(num_rows / seconds),
            "auc": models["a"]["auc"],
            "auc_error": models["a"]["auc_error"],
            "difference": differences["b"]["auc"],
            "num_slices_with_auc": sum(bool(entry["auc"]) for entry in slices),
        }
        if args.quick:
            figures["against_all_rows_at_once"] = _exact(columns, models["a"])
    for key, value in figures.items():
        print(f"{key:26} {value}")
    if args.json:
        Path(args.json).write_text(json.dumps({"evaluation": figures, "machine": machine(1)}, indent=1) + "\n")
    return int(figures["peak_mb_over_start"] > LIMIT_MB)


def _rows(folder: Path, num_rows: int, num_users: int) -> Columns:
    columns = Columns(folder)
    generator = np.random.default_rng(0)
    taste = generator.normal(size=num_users).astype(np.float32)
    for start in range(0, num_rows, CHUNK):
        count = min(CHUNK, num_rows - start)
        user = generator.integers(0, num_users, count)
        logit = taste[user] + generator.normal(size=count) - 2.0
        prob = 1 / (1 + np.exp(-logit))
        columns.append("user", mix(user.astype(np.uint64)))
        columns.append("item", (NUM_ITEMS * generator.random(count) ** 3).astype(np.int32))
        columns.append("label", (generator.random(count) < prob).astype(np.int8))
        for name, noise in (("a", 1.0), ("b", 0.8)):
            columns.append(name, 1 / (1 + np.exp(-(logit + noise * generator.normal(size=count)))))
    return columns


def _judge(columns: Columns, folder: Path) -> Comparison:
    items = np.arange(NUM_ITEMS)
    first = 1
    kinds = []
    for number in (10, 10, 4, 30):  # age and creation buckets, exposure, categories
        kinds.append(first + items % number)
        first += number
    return Comparison(
        columns,
        models=["a", "b"],
        references=[],
        slices=kinds,
        num_slices=NUM_SLICES,
        folder=folder,
        num_bootstrap=200,
        min_label_rows=50,
    )


def _exact(columns: Columns, found: dict[str, Any]) -> dict[str, float]:
    """Distance of the streamed metrics to those of arrays of all rows."""
    label, score, user = (np.concatenate([part for (part,) in columns.chunks(name)]) for name in ("label", "a", "user"))
    groups = group_auc(label, score, np.unique(user, return_inverse=True)[1])
    value, gauc = auc(label, score), groups.weighted
    assert value is not None
    assert gauc is not None
    return {"auc": abs(found["auc"]["value"] - value), "gauc": abs(found["gauc"]["value"] - gauc)}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    raise SystemExit(main())
