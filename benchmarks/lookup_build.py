"""The snapshot builder's memory and speed, by the log's size: each size in a process of its own, beside a small one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from lookup import Plan

_FILE_ROWS = 250_000
_CHILD = """
import json, sys, time
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.table import EmbeddingTable

def peak_mb():
    # Not getrusage's: that one begins at what the process that started this one had.
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024

table, line, memory = sys.argv[1], sys.argv[2], int(sys.argv[3])
before, start = peak_mb(), time.perf_counter()
snapshot = build_snapshot(EmbeddingTable(table), "v1", line, dtype="float16", memory_bytes=memory)
print(json.dumps({"seconds": time.perf_counter() - start, "before_mb": before, "peak_mb": peak_mb(), "rows": snapshot.num_rows}))
"""


def builder_memory(plan: Plan, memory_bytes: int = 2**28) -> dict[str, Any]:
    """`build`: peak resident memory of a process that builds a snapshot, for each number of rows of the log, and their ratio.

    A tenth of the rows are there twice. The log's files are read, and the snapshot is written, through the page cache, which is
    not counted.
    """
    sizes = {}
    for num_rows in plan.build_rows:
        folder = plan.work / f"build-{num_rows}"
        write_log(folder / "table", num_rows, plan.build_width)
        command = [sys.executable, "-c", _CHILD, str(folder / "table"), str(folder / "line"), str(memory_bytes)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        sizes[f"{num_rows}x{plan.build_width}"] = {
            "log_mb": round(num_rows * 1.1 * (4 * plan.build_width + 100) / 2**20),
            "peak_mb": round(found["peak_mb"]),
            "beyond_imports_mb": round(found["peak_mb"] - found["before_mb"]),
            "seconds": round(found["seconds"], 1),
            "rows_per_s": round(num_rows * 1.1 / found["seconds"]),
        }
    peaks = [size["peak_mb"] for size in sizes.values()]
    return {"build": {"memory_mb": memory_bytes >> 20, "peak_last_over_first": round(peaks[-1] / peaks[0], 3), **sizes}}


def write_log(folder: Path, num_rows: int, width: int) -> None:
    """A log of `num_rows` items in files of 250,000 rows, then a tenth of them once more, changed."""
    from lookup_cases import item_ids

    from mim_ray.data.schema import TIME
    from mim_ray.representation_center.table import EmbeddingTable

    table = EmbeddingTable(str(folder)).create()
    rng = np.random.default_rng(0)
    for day, numbers in enumerate([np.arange(num_rows), rng.choice(num_rows, num_rows // 10, replace=False)]):
        for first in range(0, len(numbers), _FILE_ROWS):
            piece = numbers[first : first + _FILE_ROWS]
            values = pa.array(rng.standard_normal(len(piece) * width, np.float32))
            hashes = [f"{value:032x}" for value in (piece + day * num_rows).tolist()]
            rows = {
                "item_id": item_ids(piece).cast(pa.string()),
                "embedding": pa.FixedSizeListArray.from_arrays(values, width).cast(pa.list_(pa.float32())),
                "content_hash": hashes,
                "content_at": pa.array(np.full(len(piece), day * 86_400_000_000), TIME),
            }
            table.append(pa.table(rows), encoder_version="v1", shard_id=f"d{day}-{first:09d}")
