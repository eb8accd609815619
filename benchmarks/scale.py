"""What storing embeddings costs, per item and as a function of size: the measured rates behind docs/scale.md and jobs/plan.py.

    python benchmarks/scale.py --json scale.json --quick      under a minute
    python benchmarks/scale.py --json scale.json              larger logs, a few minutes

One core: Arrow and OpenMP run in one thread. Vectors are random and of length 1, which no compression makes small; ids have 13
letters. Encoding is a plain loop over the project's own decoding and a random ResNet-18; benchmarks/extraction.py measures the whole
job. The result's "rates" can be given to jobs/plan.py --rates.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAYON_NUM_THREADS", "1")

import argparse
import io
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import timm
import torch
from measuring import machine
from PIL import Image

from mim_ray.data.schema import TIME
from mim_ray.data.transforms import PictureFormat, decode_images
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.compaction import compact
from mim_ray.representation_center.data_files import Fragment, write_fragment
from mim_ray.representation_center.table import EmbeddingTable

WIDTHS = (64, 256)  # two points of the line: bytes per item = fixed + per value · width
SHARD_ROWS = 1_024


@dataclass(frozen=True)
class Plan:
    """Sizes. `rows` in the logs whose bytes are counted, `speed_rows` where time is, files named by the larger log."""

    rows: int = 200_000
    speed_rows: int = 1_000_000
    width: int = 128
    num_files: tuple[int, ...] = (1_000, 20_000, 100_000)
    num_commits: int = 30
    encoding_s: float = 30.0


QUICK = Plan(rows=40_000, speed_rows=150_000, num_files=(500, 10_000), num_commits=15, encoding_s=6.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the report goes")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    args = parser.parse_args()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    plan, start = QUICK if args.quick else Plan(), time.monotonic()
    rates = items_per_second(plan)
    with tempfile.TemporaryDirectory() as folder:
        rates |= bytes_per_item(Path(folder) / "bytes", plan)
        rates |= rows_per_second(Path(folder) / "speed", plan)
        rates |= commit_seconds(Path(folder) / "commits", plan)
    report = {
        "benchmark": "scale",
        "quick": args.quick,
        "rates": rates,
        "machine": machine(threads=1),
        "seconds": round(time.monotonic() - start, 1),
    }
    for name, rate in rates.items():
        print(f"{name:34} {rate['value']:>14,.6g} {rate['unit']:12} {rate['note']}")
    print(f"\n{report['machine']['cpu']}, load {report['machine']['load_average']}, {report['seconds']} s")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def items_per_second(plan: Plan) -> dict[str, Any]:
    """Items per second of one core: decoding JPEGs of 512 × 512 to 224 × 224, and that with a ResNet-18 in float32."""
    torch.set_num_threads(1)
    picture = PictureFormat(224)
    rng = np.random.default_rng(0)
    images = [jpeg(rng) for _ in range(48)]
    model = timm.create_model("resnet18", num_classes=0).eval()
    rates = {}
    for name, encode in (("decode", False), ("encode", True)):
        done, end = 0, time.perf_counter() + plan.encoding_s / 2
        start = time.perf_counter()
        with torch.inference_mode():
            while time.perf_counter() < end:
                pixels, _ = decode_images(images[done % 48 : done % 48 + 16], picture)
                if encode:
                    model(torch.from_numpy(pixels).float() / 255)
                done += 16
        value = done / (time.perf_counter() - start)
        note = f"JPEG 512², quality 85, to 224²{', and a random ResNet-18 in float32, batches of 16' if encode else ''}"
        rates[f"{name}_items_per_s_per_core"] = {"value": value, "unit": "items/s", "note": note}
    return rates


def jpeg(rng: np.random.Generator) -> bytes:
    """A picture of coloured areas with noise, about 55 KB."""
    areas = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).resize((512, 512), Image.Resampling.BICUBIC)
    pixels = np.asarray(areas).astype(np.int16) + rng.integers(-12, 13, (512, 512, 3), np.int16)
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def bytes_per_item(folder: Path, plan: Plan) -> dict[str, Any]:
    """Bytes of the log, as extraction writes it and compacted, and of snapshots, on disk and mapped for lookups."""
    fresh, compacted, disk, mapped = [], [], {}, {}
    for width in WIDTHS:
        table = fill(folder / str(width), plan.rows, width)
        fresh.append(sum(file.num_bytes for file in table.files()) / plan.rows)
        compact(table, "v1")
        compacted.append(sum(file.num_bytes for file in table.files()) / plan.rows)
        for dtype in ("float32", "float16", "int8"):
            snapshot = build_snapshot(table, "v1", str(folder / f"{width}-{dtype}"), dtype=dtype)
            size = sum(path.stat().st_size for path in Path(snapshot.uri).iterdir())
            disk.setdefault(dtype, []).append(size / plan.rows)
            mapped.setdefault(dtype, []).append(snapshot.num_mapped_bytes / plan.rows)
    note = f"{plan.rows:,} items, ids of 13 letters, widths {WIDTHS[0]} and {WIDTHS[1]}"
    rates: dict[str, Any] = {}
    for name, points in (("log", fresh), ("log_compacted", compacted)):
        rates |= line(f"{name}_bytes", points, note)
    for dtype in disk:
        rates |= line(f"snapshot_{dtype}_bytes", disk[dtype], note)
        rates |= line(f"mapped_{dtype}_bytes", mapped[dtype], note)
    return rates


def rows_per_second(folder: Path, plan: Plan) -> dict[str, Any]:
    """Rows per second and core that are written to the log, merged by compaction, and built into a snapshot."""
    start = time.perf_counter()
    table = fill(folder / "log", plan.speed_rows, plan.width)
    filled = time.perf_counter() - start
    start = time.perf_counter()
    build_snapshot(table, "v1", str(folder / "snapshot"), dtype="float16", memory_bytes=2**26)
    built = time.perf_counter() - start
    start = time.perf_counter()
    rewritten = compact(table, "v1").num_rows_written
    merged = time.perf_counter() - start
    note = f"{plan.speed_rows:,} rows of width {plan.width}"
    rates = {
        "log_rows_per_s": (plan.speed_rows / filled, f"{note}, in shards of {SHARD_ROWS}"),
        "build_rows_per_s": (plan.speed_rows / built, f"{note}, float16, spilled to disk"),
        "compaction_rows_per_s": (rewritten / merged, f"{note}, rows written"),
    }
    return {name: {"value": value, "unit": "rows/s", "note": text} for name, (value, text) in rates.items()}


def commit_seconds(folder: Path, plan: Plan) -> dict[str, Any]:
    """Seconds of a commit by a writer that stays, and of opening the log anew, in logs that name few and many files."""
    commits, opens = [], []
    for number in plan.num_files:
        table = EmbeddingTable(str(folder / str(number))).create()
        real = write_fragment(table.uri, rows(np.arange(8), 8), encoder_version="v1", shard_id="first")
        table.commit([real, *(named(real, f"{shard:08d}") for shard in range(number))])
        seconds = []
        for shard in range(plan.num_commits):
            start = time.perf_counter()
            table.commit([named(real, f"more-{shard}")])
            seconds.append(time.perf_counter() - start)
        commits.append(statistics.median(seconds))
        start = time.perf_counter()
        EmbeddingTable(table.uri).contains("v1", ["first"])
        opens.append(time.perf_counter() - start)
    note = f"local disk, logs that name {', '.join(f'{number:,}' for number in plan.num_files)} files"
    rates = {}
    for name, points in (("commit", commits), ("open_log", opens)):
        slope, fixed = np.polyfit(plan.num_files, points, 1)
        rates[f"{name}_s"] = {"value": max(0.0, fixed), "unit": "s", "note": note}
        rates[f"{name}_s_per_file"] = {"value": max(0.0, slope), "unit": "s/file", "note": note}
    return rates


def fill(folder: Path, num_rows: int, width: int) -> EmbeddingTable:
    """A log as extraction leaves it: shards of 1,024 rows, about 25 of them a commit."""
    table = EmbeddingTable(str(folder)).create()
    waiting: list[Fragment] = []
    for start in range(0, num_rows, SHARD_ROWS):
        numbers = np.arange(start, min(start + SHARD_ROWS, num_rows))
        waiting.append(write_fragment(table.uri, rows(numbers, width), encoder_version="v1", shard_id=f"s{start:012d}"))
        if len(waiting) == 25:
            table.commit(waiting)
            waiting = []
    if waiting:
        table.commit(waiting)
    return table


def rows(numbers: np.ndarray, width: int) -> pa.Table:
    rng = np.random.default_rng(int(numbers[0]))
    vectors = rng.normal(size=(len(numbers), width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    digits = rng.integers(0, 16, (len(numbers), 32))
    return pa.table(
        {
            "item_id": [f"6{number * 7919 % 10**12:012d}" for number in numbers.tolist()],
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width),
            "content_hash": ["".join("0123456789abcdef"[digit] for digit in row) for row in digits.tolist()],
            "content_at": pa.array(1_700_000_000_000_000 + numbers * 1_000_000, TIME),
            "category": [f"category-{number % 1_000}" for number in numbers.tolist()],
        }
    )


def named(real: Fragment, shard_id: str) -> Fragment:
    """A file that only the log knows: what is timed does not open it."""
    path = real.path.replace("batch-first", f"batch-{shard_id}")
    return Fragment(path, real.num_bytes, real.num_rows, real.encoder_version, [shard_id])


def line(name: str, points: list[float], note: str) -> dict[str, Any]:
    """Bytes per item at the two widths as fixed + per value · width."""
    per_value = (points[1] - points[0]) / (WIDTHS[1] - WIDTHS[0])
    fixed = points[0] - per_value * WIDTHS[0]
    return {
        f"{name}_fixed": {"value": fixed, "unit": "bytes/item", "note": note},
        f"{name}_per_value": {"value": per_value, "unit": "bytes/value", "note": note},
    }


if __name__ == "__main__":
    main()
