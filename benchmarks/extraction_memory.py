"""Whether the extraction's memory grows with the table: items of a title alone through an encoder that does nothing.

PSS (a shared page counts by its share) of the job, of Ray's processes and of its workers is summed every second; a run's figure
is the 95th percentile over its second half. The object store's own size is fixed at 1 GiB.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_FILE = 1_000_000
ROWS_PER_GROUP = 16_384


def measure_memory(small: int, large: int, work: Path, cores: int) -> dict[str, Any]:
    """`pss_10m_over_100k`: summed PSS at `large` items over that at `small`."""
    runs = {name: _run(num, work, cores) for name, num in (("small", small), ("large", large))}
    return {
        "pss_10m_over_100k": {
            "value": round(runs["large"]["mb"] / runs["small"]["mb"], 4),
            "small": small,
            "large": large,
            "small_mb": runs["small"]["mb"],
            "large_mb": runs["large"]["mb"],
            "runs": runs,
        }
    }


def make_items(work: Path, num_items: int) -> str:
    """A table of ids and titles, written as a stream."""
    folder = work / f"titles-{num_items}" / "items.parquet"
    if not folder.exists():
        partial = folder.with_name("partial")
        partial.mkdir(parents=True, exist_ok=True)
        for start in range(0, num_items, ROWS_PER_FILE):
            rows = np.arange(start, min(start + ROWS_PER_FILE, num_items))
            table = pa.table(
                {"item_id": np.char.add("item-", rows.astype(str)), "title": np.char.add("t ", rows.astype(str))}
            )
            pq.write_table(table, partial / f"part-{start:012d}.parquet", row_group_size=ROWS_PER_GROUP)
        partial.rename(folder)
    return str(folder)


def summed_pss(root: int) -> int:
    """Bytes of PSS of a process and all its descendants, as the kernel adds them up now."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
    total = 0
    for process in parents:
        above = process
        while above > 1 and above != root:
            above = parents.get(above, 0)
        if above == root:
            try:
                rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
            except OSError:
                continue
            total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1_024
    return total


def _run(num_items: int, work: Path, cores: int) -> dict[str, Any]:
    items = make_items(work, num_items)
    output = work / f"memory-{num_items}-{os.getpid()}"
    start = time.monotonic()
    job = subprocess.Popen([sys.executable, __file__, items, str(output), str(cores)], stdout=subprocess.DEVNULL)
    samples = []
    while job.poll() is None:
        samples.append((round(time.monotonic() - start, 1), summed_pss(job.pid)))
        time.sleep(1)
    subprocess.run(["rm", "-rf", str(output)], check=False)
    if job.returncode:
        raise RuntimeError(
            f"The extraction of {num_items} items ended with {job.returncode}; its last words are above."
        )
    values = [value for _, value in samples[: max(1, len(samples) - 1)]]  # the last may be of an end
    later = values[len(values) // 2 :]
    every = max(1, len(samples) // 200)
    return {
        "mb": round(float(np.percentile(later, 95)) / 2**20, 1),
        "peak_mb": round(max(values) / 2**20, 1),
        "seconds": round(time.monotonic() - start, 1),
        "samples_mb": [(at, round(value / 2**20, 1)) for at, value in samples[::every]],
    }


def _load_nothing(uri: str, use_gpu: bool) -> Any:
    def encode(titles: Any, images: Any, has_image: Any) -> np.ndarray:
        return np.ones((len(titles), 32), np.float32)

    return encode


def job(items: str, output: str, cores: int) -> None:
    """The extraction of one table, from its start to its end."""
    from mim_ray.config.scenario import Extraction
    from mim_ray.config.scenario import Run as RunSettings
    from mim_ray.data.transforms import PictureFormat
    from mim_ray.extraction.read import Decoding
    from mim_ray.extraction.run import extract
    from mim_ray.representation_center.table import EmbeddingTable
    from mim_ray.runtime.cluster import cluster

    with cluster(RunSettings(num_cpus=cores, object_store_mb=1_024)):
        extract(
            items,
            EmbeddingTable(f"{output}/table").create(),
            encoder="passes through",
            encoder_version="v1",
            decoding=Decoding(PictureFormat(8), 8_000_000, 50_000_000, 2_000, "/nowhere"),
            settings=Extraction(num_actors=cores, batch_size=1_024, shard_rows=4_096),
            rejects=f"{output}/rejects",
            load=_load_nothing,
        )


if __name__ == "__main__":
    job(sys.argv[1], sys.argv[2], int(sys.argv[3]))
