"""The sides of extraction.py, each in a process of its own that is warm when it is timed.

    extract       this project's `extraction.run.extract`: Parquet in, Delta log out
    process_pool  multiprocessing.Pool: workers read a row group, decode and encode it, and send the embeddings back
    daft          Daft's native runner with a batch UDF that holds the encoder, instances in processes
    daft_threads  the same with instances in threads of one process

Started by extraction.py; a line of JSON in is one run, a line of JSON out its seconds.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would lose to whatever else runs on a shared machine
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib
import glob
import itertools
import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

BATCH = 16
"""Items encoded at once on all sides: of 8, 16, 32 and 64 the fastest for ResNet-18 on a CPU."""


@dataclass(frozen=True)
class Timed:
    """A run. Attributes: seconds: without start-up; None where the caller's own clock tells it."""

    num_items: int
    seconds: float | None = None


Run = Callable[[str, bool], Timed]
"""(items, encode or decode only) -> what was done."""


class Side:
    """A side's process, from outside."""

    def __init__(self, name: str, encoder: str, cores: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, name, encoder, str(cores)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.name = name

    def wait(self) -> None:
        """Until it is ready; several sides start side by side."""
        self._receive()

    def seconds(self, items: str, encode: bool = True) -> float:
        """Run once."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([items, encode]) + "\n")
        self._process.stdin.flush()
        return float(self._receive()["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"side"'):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError(f"The benchmark's side {self.name} ended; its last words are above.")


@contextlib.contextmanager
def process_pool(encoder: str, cores: int) -> Iterator[Run]:
    """One process per core and one thread each; tasks of 16 to 64 rows are equally fast."""
    with multiprocessing.get_context("spawn").Pool(cores, _start_worker, (encoder,)) as pool:
        pool.map(_nothing, range(4 * cores), chunksize=1)

        def run(items: str, encode: bool) -> Timed:
            tasks = [
                (path, group, encode)
                for path in sorted(glob.glob(f"{items}/*.parquet"))
                for group in range(pq.read_metadata(path).num_row_groups)
            ]
            return Timed(sum(len(vectors) for _, vectors in pool.imap_unordered(_do_group, tasks)))

        yield run


_WORKER: dict[str, Any] = {}


def _start_worker(encoder: str) -> None:
    import torch

    from mim_ray.data.transforms import PictureFormat
    from mim_ray.extraction.embed import load_encoder
    from mim_ray.runtime.memory import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    described = json.loads((Path(encoder) / "encoder.json").read_text())
    _WORKER["picture"] = PictureFormat.from_json(described["picture"])
    _WORKER["encode"] = load_encoder(encoder, False)
    _encode_images(np.zeros((BATCH, 3, 224, 224), np.uint8), _WORKER["encode"])


def _nothing(_: int) -> None:
    time.sleep(0.05)


def _do_group(task: tuple[str, int, bool]) -> tuple[list[str], np.ndarray]:
    from mim_ray.data.transforms import decode_images

    path, group, encode = task
    with pq.ParquetFile(path) as file:
        rows = file.read_row_group(group, columns=["item_id", "image"])
    images = rows["image"].to_pylist()
    vectors = []
    for start in range(0, len(images), BATCH):
        pixels, _ = decode_images(images[start : start + BATCH], _WORKER["picture"])
        vectors.append(_encode_images(pixels, _WORKER["encode"] if encode else None))
    return rows["item_id"].to_pylist(), np.concatenate(vectors)


def _encode_images(pixels: np.ndarray, encode: Callable[..., np.ndarray] | None) -> np.ndarray:
    if encode is None:  # decode only
        return pixels[:, 0, 0, :8].astype(np.float32)
    return encode([None] * len(pixels), pixels, np.ones(len(pixels), bool))


@contextlib.contextmanager
def extract(encoder: str, cores: int) -> Iterator[Run]:
    """The job's own path on an embedded Ray: plan, actors, files, commits, and the log asked whether all is there."""
    from mim_ray.config.scenario import Extraction
    from mim_ray.config.scenario import Run as RunSettings
    from mim_ray.data.transforms import PictureFormat
    from mim_ray.extraction.read import Decoding
    from mim_ray.extraction.run import encoder_pool
    from mim_ray.extraction.run import extract as run_extract
    from mim_ray.representation_center.table import EmbeddingTable
    from mim_ray.runtime.cluster import cluster

    described = json.loads((Path(encoder) / "encoder.json").read_text())
    picture = PictureFormat.from_json(described["picture"])
    decoding = Decoding(picture, 8_000_000, 50_000_000, 2_000, "/nowhere")
    settings = Extraction(num_actors=cores, batch_size=BATCH, shard_rows=64, commit_every_s=2.0)
    numbers = itertools.count()
    with (
        tempfile.TemporaryDirectory() as folder,
        cluster(RunSettings(num_cpus=2 * cores, object_store_mb=1_024)),  # two pools, of which one works at a time
        encoder_pool(encoder, settings) as encoding,
        encoder_pool("decode only", settings, _load_nothing) as decoding_only,
    ):
        encoding.wait()
        decoding_only.wait()

        def run(items: str, encode: bool) -> Timed:
            home = f"{folder}/{next(numbers)}"
            done = run_extract(
                items,
                EmbeddingTable(f"{home}/table").create(),
                encoder=encoder,
                encoder_version="v1",
                decoding=decoding,
                settings=settings,
                rejects=f"{home}/rejects",
                pool=encoding if encode else decoding_only,
            )
            return Timed(done.num_rows_done)

        yield run


def _load_nothing(uri: str, use_gpu: bool) -> Callable[..., np.ndarray]:
    def encode(titles: Any, images: np.ndarray, has_image: Any) -> np.ndarray:
        return images[:, 0, 0, :8].astype(np.float32)

    return encode


@contextlib.contextmanager
def daft(encoder: str, cores: int, own_decode: bool = True, use_process: bool = True) -> Iterator[Run]:
    """Daft's native runner, a class with a batch method, as many instances as cores.

    Args:
        own_decode: decode inside the class with this project's function, which is faster than Daft's own decoding and
            resizing (JPEG's reduced decoding).
        use_process: instances in processes. Daft 0.7.26 goes by the type that the method returns, whatever it is asked for: an
            embedding is made in threads of the query's own process, a list of floats in processes.
    """
    import daft as daft_package

    daft_package.set_runner_native()
    number = daft_package.DataType.float32()
    kind = daft_package.DataType.list(number) if use_process else daft_package.DataType.embedding(number, 128)

    class Encoding:
        """Loads when the query starts it; notes when it is ready and when each batch begins and ends."""

        def __init__(self, encoder: str, log: str, encode: bool) -> None:
            if not _WORKER:
                _start_worker(encoder)
            self._picture = _WORKER["picture"]
            self._encode = _WORKER["encode"] if encode else None
            self._log = open(f"{log}/{os.getpid()}-{threading.get_ident()}-{id(self)}", "a", buffering=1)  # noqa: SIM115
            self._log.write(f"{time.time()} ready\n")

        @daft_package.method.batch(return_dtype=kind, batch_size=BATCH)
        def embed(self, image: Any) -> Any:
            from mim_ray.data.transforms import decode_images

            start = time.time()
            if own_decode:
                pixels, _ = decode_images(image.to_pylist(), self._picture)
            else:
                pixels = np.ascontiguousarray(np.stack(image.to_pylist()).transpose(0, 3, 1, 2))
            vectors = np.zeros((len(pixels), 128), np.float32)
            found = _encode_images(pixels, self._encode)
            vectors[:, : found.shape[1]] = found
            self._log.write(f"{start} {time.time()} {len(pixels)}\n")
            return list(vectors)

    class_ = daft_package.cls(Encoding, use_process=use_process, max_concurrency=cores)
    with tempfile.TemporaryDirectory() as folder:
        numbers = itertools.count()

        def run(items: str, encode: bool) -> Timed:
            log = Path(folder) / str(next(numbers))
            log.mkdir()
            rows = daft_package.read_parquet(f"{items}/*.parquet")
            image = daft_package.col("image")
            if not own_decode:
                image = image.decode_image(mode="RGB").resize(224, 224)
            embedded = rows.select(
                "item_id", class_(encoder, str(log), encode).embed(image).alias("embedding")
            ).collect()
            return _since_all_are_ready(log, time.time(), len(embedded))

        yield run


def _since_all_are_ready(log: Path, end: float, num_items: int) -> Timed:
    """Seconds for all items at the rate since the last instance was ready (its start belongs to the query)."""
    lines = [line.split() for path in log.iterdir() for line in path.read_text().splitlines()]
    ready = max(float(line[0]) for line in lines if line[1] == "ready")
    done = 0.0
    for start, stop, num in ([float(value) for value in line] for line in lines if line[1] != "ready"):
        done += num * min(1.0, max(0.0, (stop - ready) / (stop - start)))
    return Timed(num_items, (end - ready) * num_items / done)


SIDES = {
    "extract": extract,
    "process_pool": process_pool,
    "daft": daft,
    "daft_threads": partial(daft, use_process=False),
    "daft_own_image": partial(daft, own_decode=False),
}


def main(name: str, encoder: str, cores: int) -> None:
    with SIDES[name](encoder, cores) as run:
        print('{"side": "ready"}', flush=True)
        for line in sys.stdin:
            items, encode = json.loads(line)
            start = time.perf_counter()
            done = run(items, encode)
            seconds = time.perf_counter() - start if done.seconds is None else done.seconds
            print(json.dumps({"side": name, "seconds": seconds, "items": done.num_items}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
