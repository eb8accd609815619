"""Exactly once: an actor, a decoding worker or the whole job is killed, and the log is that of an undisturbed run.

Jobs stop at a chosen point of their work (`LOADER`), so that a kill lands there and nowhere else.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mim_ray.config.scenario import Extraction
from mim_ray.data.transforms import PictureFormat
from mim_ray.extraction.read import Decoding
from mim_ray.extraction.run import Extracted, extract
from mim_ray.representation_center.table import EmbeddingTable

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

SETTINGS = Extraction(shard_rows=4, batch_size=4, commit_every_s=0.05, num_actors=2, num_decoders=0)
BAD = {
    "image": {3: b"broken", 4: None, 160: None, 161: b"x" * 100_001},
    "title": {3: None, 5: None, 160: None, 161: None, 20: "the same", 22: "the same"},
    "item_id": {7: "item-6", 8: None, 299: "item-0"},
}
PARTS = (0.10, 0.25, 0.50, 0.75, 0.90, 0.99)


DECODING = Decoding(PictureFormat(8, "squash"), 100_000, 10_000, 40, "/nowhere")
PATIENCE_S = 120.0

JOB = """
import sys
from mim_ray.config.scenario import Extraction, Run
from mim_ray.data.transforms import PictureFormat
from mim_ray.extraction.read import Decoding
from mim_ray.extraction.run import extract
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.runtime.cluster import cluster

{source}

items, folder, settings, gate, limit = sys.argv[1:]
with cluster(Run(num_cpus=2, object_store_mb=100)):
    extract(items, EmbeddingTable(f"{{folder}}/table").create(), encoder="stand-in", encoder_version="v1",
            decoding=Decoding(PictureFormat(8, "squash"), 100_000, 10_000, 40, "/nowhere"),
            settings=Extraction.model_validate_json(settings), rejects=f"{{folder}}/rejects",
            load=gated_loader(gate, int(limit)))
print("finished")
"""

# Travels to workers by value, and into the job's program as text.
LOADER = '''
def gated_loader(gate, limit):
    """Vectors computed from the content; after `limit` batches the rest waits until the file `gate`-open is there."""

    def load(uri, use_gpu):
        import fcntl
        import os
        import time

        import numpy as np

        def encode(titles, images, has_image):
            if gate:
                with open(gate, "a+") as counter:
                    fcntl.lockf(counter, fcntl.LOCK_EX)
                    counter.write(".")
                    counter.flush()
                    number = counter.tell()
                while number > limit and not os.path.exists(gate + "-open"):
                    time.sleep(0.01)
            rows = [
                [len(title or ""), sum((title or "").encode()) % 97, image.mean(), float(there)]
                for title, image, there in zip(titles, images, has_image, strict=True)
            ]
            vectors = np.array(rows, np.float32)
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

        return encode

    return load
'''
_names: dict[str, Any] = {"__name__": "__main__"}
exec(LOADER, _names)
gated_loader: Callable[[str | None, int], Any] = _names["gated_loader"]


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory, make_items: Callable[..., str]) -> str:
    return make_items(tmp_path_factory.mktemp("data"), num=400, row_group_rows=100, **BAD)


@pytest.fixture(scope="module")
def whole(items: str, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[EmbeddingTable, Extracted]:
    return fill(items, tmp_path_factory.mktemp("undisturbed"), SETTINGS)


def check_job(items: str, whole: tuple[EmbeddingTable, Extracted], folder: Path, parts: tuple[float, ...]) -> None:
    """Kill the job at each of `parts` of what is left, then let it end."""
    folder.mkdir(parents=True, exist_ok=True)
    before: dict[str, int] = {}
    for part in parts:
        committed = kill_job(items, folder, SETTINGS, part, whole[1].num_shards)
        assert before.items() <= committed.items()
        before = committed
    table, rest = fill(items, folder, SETTINGS)
    assert rest.num_shards_found == len(before)
    assert_same_log(log(table), log(whole[0]))
    assert before.items() <= versions(table).items(), "a finished shard was made again"
    assert sorted(rest.rejects.to_pylist(), key=str) == sorted(whole[1].rejects.to_pylist(), key=str)


def check_actor(items: str, whole: tuple[EmbeddingTable, Extracted], folder: Path, part: float) -> None:
    limit = max(1, int(part * whole[1].num_shards) - 2)
    table = kill_worker(items, folder, SETTINGS, "ray::ShardEncoder", limit)
    assert_same_log(log(table), log(whole[0]))


def check_worker(
    items: str, whole: tuple[EmbeddingTable, Extracted], folder: Path, part: float, batch_size: int = 1
) -> None:
    """Small batches: a decoding task still has work when the encoder has done `part` of its own."""
    settings = SETTINGS.model_copy(update={"num_decoders": 1, "batch_size": batch_size})
    limit = max(1, int(part * 390 / batch_size) - 6)
    table = kill_worker(items, folder, settings, "ray::_decode", limit)
    assert_same_log(log(table), log(whole[0]))


@pytest.mark.slow
@pytest.mark.chaos
def test_a_job_killed_twice_in_a_row_ends_as_an_undisturbed_one(
    items: str, whole: tuple[EmbeddingTable, Extracted], tmp_path: Path
) -> None:
    check_job(items, whole, tmp_path, (0.3, 0.5))


def test_an_encoder_killed_at_its_work_changes_nothing(
    items: str, whole: tuple[EmbeddingTable, Extracted], tmp_path: Path
) -> None:
    check_actor(items, whole, tmp_path, 0.5)


def test_a_decoding_worker_killed_at_its_work_changes_nothing(
    items: str, whole: tuple[EmbeddingTable, Extracted], tmp_path: Path
) -> None:
    check_worker(items, whole, tmp_path, 0.5, batch_size=2)


@pytest.mark.chaos
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["job", "actor", "worker"])
def test_a_kill_at_any_part_of_the_work_changes_nothing(
    items: str, whole: tuple[EmbeddingTable, Extracted], tmp_path: Path, kind: str, part: float
) -> None:
    CHECKS[kind](items, whole, tmp_path, part)


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_random_kills_change_nothing(
    items: str, whole: tuple[EmbeddingTable, Extracted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make chaos KILLS=n`: n kills of a random kind at a random part of the work."""
    wanted = int(os.environ.get("KILLS", "6"))
    seed = int(os.environ.get("KILLS_SEED", random.randrange(2**32)))
    rng, kills = random.Random(seed), Counter[str]()
    while kills.total() < wanted:
        kind = rng.choice(["job", "job twice", "actor", "worker"])
        CHECKS[kind](items, whole, tmp_path / str(kills.total()), rng.uniform(0.02, 0.98))
        kills[kind.removesuffix(" twice")] += 2 if kind.endswith("twice") else 1
        with capsys.disabled():
            counted = ", ".join(f"{count} of {name}" for name, count in sorted(kills.items()))
            print(f"\nkills survived: {kills.total()} ({counted}); KILLS_SEED={seed}", flush=True)


CHECKS: dict[str, Callable[..., None]] = {
    "job": lambda items, whole, folder, part: check_job(items, whole, folder, (part,)),
    "job twice": lambda items, whole, folder, part: check_job(items, whole, folder, (part, 0.5)),
    "actor": check_actor,
    "worker": check_worker,
}


def fill(items: str, folder: Path, settings: Extraction, load: Any = None) -> tuple[EmbeddingTable, Extracted]:
    """Run the extraction here, to its end."""
    table = EmbeddingTable(f"{folder}/table").create()
    done = extract(
        items,
        table,
        encoder="stand-in",
        encoder_version="v1",
        decoding=DECODING,
        settings=settings,
        rejects=f"{folder}/rejects",
        load=load or gated_loader(None, 0),
    )
    return table, done


def log(table: EmbeddingTable) -> pa.Table:
    """Every row of the table, sorted."""
    _, files = table.scan("v1")
    return pa.concat_tables([file.read() for file in files]).sort_by("item_id")


def assert_same_log(found: pa.Table, expected: pa.Table) -> None:
    """The same rows, none twice, none missing; embeddings within 1e-5."""
    for name in ("item_id", "content_hash", "encoder_version", "content_at", "shard_id", "category"):
        assert found[name].to_pylist() == expected[name].to_pylist(), name
    np.testing.assert_allclose(
        np.array(found["embedding"].to_pylist()), np.array(expected["embedding"].to_pylist()), atol=1e-5
    )


def kill_job(items: str, folder: Path, settings: Extraction, at: float, num_shards: int) -> dict[str, int]:
    """Start a job on its own Ray, SIGKILL it when a part `at` of its shards is in the table; commit_version by shard then."""
    table = EmbeddingTable(f"{folder}/table").create()
    before = len(table.committed_shards("v1"))
    limit = max(1, round(at * (num_shards - before)))
    gate = folder / f"gate-{time.monotonic_ns()}"
    output = folder / "output"
    with output.open("w") as file:
        job = subprocess.Popen(
            [sys.executable, "-c", JOB.format(source=LOADER), items, str(folder), settings.model_dump_json(), str(gate), str(limit)],
            stdout=file,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    _wait(
        lambda: len(table.committed_shards("v1")) >= before + limit,
        lambda: None if job.poll() is None else output.read_text(),
    )
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL, "the job was not killed"
    assert "finished" not in output.read_text()
    time.sleep(0.5)  # workers that outlive the job for a moment write files, but only the job commits
    committed = versions(table)
    assert before < len(committed) < num_shards, "the kill came too early or too late"
    return committed


def kill_worker(items: str, folder: Path, settings: Extraction, title: str, limit: int) -> EmbeddingTable:
    """Run the extraction here and SIGKILL one of its processes with this title after `limit` batches."""
    gate = folder / "gate"
    folder.mkdir(parents=True, exist_ok=True)
    killed: list[int] = []

    def kill() -> None:
        found: list[int] = []

        def there() -> bool:
            found[:] = processes(title)
            return gate.exists() and gate.stat().st_size > limit and bool(found)

        try:
            _wait(there)
            os.kill(found[0], signal.SIGKILL)
            _wait(lambda: found[0] not in processes(title))
            killed.append(found[0])
        finally:
            Path(f"{gate}-open").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    table, done = fill(items, folder, settings, gated_loader(str(gate), limit))
    killer.join()
    assert len(killed) == 1, f"no process {title} was killed"
    assert done.num_shards_found == 0
    return table


def versions(table: EmbeddingTable) -> dict[str, int]:
    """Delta version that brought each shard."""
    return {str(file.batch_shard): file.commit_version for file in table.scan("v1")[1]}


def processes(title: str) -> list[int]:
    """Ids of this process's descendants whose command line begins so."""
    parents, titles = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(folder.name)] = (
                    (folder / "cmdline").read_bytes().replace(b"\\0", b" ").decode(errors="replace")
                )
            except (OSError, ValueError):
                continue

    def ours(process: int) -> bool:
        while process > 1:
            process = parents.get(process, 0)
            if process == os.getpid():
                return True
        return False

    return [process for process, found in titles.items() if found.startswith(title) and ours(process)]


def _wait(condition: Callable[[], bool], trouble: Callable[[], str | None] = lambda: None) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        found = trouble()
        assert found is None, found
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
