"""mim_ray/extraction/refresh.py under SIGKILL: the same round again ends where an undisturbed one ends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from mim_ray.config.scenario import Extraction, Refresh
from mim_ray.data.transforms import PictureFormat
from mim_ray.extraction.pool import EncoderPool
from mim_ray.extraction.read import Decoding
from mim_ray.extraction.refresh import Refresher
from mim_ray.extraction.run import encoder_pool
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.table import EmbeddingTable

LOAD = """
import time
import numpy as np

def load(uri, use_gpu):
    def encode(titles, images, has_image):
        time.sleep(0.05)
        rows = [[len(t or ""), sum((t or "").encode()) % 97, i.mean(), 1] for t, i in zip(titles, images)]
        return np.array(rows, np.float32)
    return encode
"""
JOB = (
    LOAD
    + """
import os, signal, sys
from mim_ray.config.scenario import Extraction, Refresh, Run
from mim_ray.data.transforms import PictureFormat
from mim_ray.extraction import encode_changes
from mim_ray.extraction import refresh as module
from mim_ray.extraction.read import Decoding
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.runtime.cluster import cluster

items, center, warm_rows, step = sys.argv[1:]

def killed(original):
    def call(*args, **kwargs):
        original(*args, **kwargs)
        print("killed", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return call

if step == "commit":
    EmbeddingTable.commit = killed(EmbeddingTable.commit)
elif step == "state":
    module.StateStore.write = killed(module.StateStore.write)
elif step == "write_deletions":
    encode_changes.write_deletions = killed(encode_changes.write_deletions)
elif step != "none":
    setattr(module, step, killed(getattr(module, step)))
with cluster(Run(num_cpus=2, object_store_mb=100)):
    with module.Refresher(items, center, encoder="none", encoder_version="v1",
                          decoding=Decoding(PictureFormat(8, "squash"), 100_000, 10_000, 40, "/nowhere"),
                          settings=Extraction(shard_rows=20, batch_size=10, commit_every_s=0.1, num_actors=1),
                          refresh=Refresh(warm_rows=int(warm_rows)), rejects=f"{center}-rejects", load=load) as refresher:
        refresher.round()
print("finished")
"""
)
SETTINGS = Extraction(shard_rows=20, batch_size=10, commit_every_s=0.1, num_actors=1, cpus_per_actor=0.25)

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def pool(ray_cluster: None) -> Iterator[EncoderPool]:
    names: dict[str, Any] = {}
    exec(LOAD, names)
    with encoder_pool("none", SETTINGS, names["load"]) as actors:
        yield actors


def items_of(num: int, text: str = "title") -> pa.Table:
    return pa.table({"item_id": [f"item-{n}" for n in range(num)], "title": [f"{text} {n}" for n in range(num)]})


def refresh(items: str, center: Path, warm_rows: int, pool: EncoderPool) -> None:
    """A round to its end, in this process."""
    with Refresher(
        items,
        str(center),
        encoder="none",
        encoder_version="v1",
        decoding=Decoding(PictureFormat(8, "squash"), 100_000, 10_000, 40, "/nowhere"),
        settings=SETTINGS,
        refresh=Refresh(warm_rows=warm_rows),
        rejects=f"{center}-rejects",
        pool=pool,
    ) as refresher:
        refresher.round()


def killed(items: str, center: Path, warm_rows: int, step: str) -> bool:
    """A round in a process of its own that kills itself after a step; whether it got so far."""
    command = [sys.executable, "-c", JOB, items, str(center), str(warm_rows), step]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False
    )
    time.sleep(0.5)  # workers that outlive the job for a moment write files, but only the job commits
    died = done.returncode == -signal.SIGKILL and "killed\n" in done.stdout
    assert died or "finished" in done.stdout, done.stdout
    return died


def outcome(center: Path) -> list[tuple[Any, ...]]:
    """Every row of the log but its times and commits, which must hold no row twice; the snapshot must show the same."""
    table = EmbeddingTable(f"{center}/table")
    names = ["item_id", "content_hash", "deleted"]
    rows = pa.concat_tables([file.read(names) for file in table.scan("v1")[1]]).to_pylist()
    found = sorted((row["item_id"], str(row["content_hash"]), row["deleted"]) for row in rows)
    assert len(set(found)) == len(found)
    current = table.current_rows("v1")
    snapshot = Snapshot.open(f"{center}/snapshots/v1")
    assert snapshot.num_rows == current.num_rows
    vectors = np.array(current["embedding"].to_pylist(), np.float32)
    np.testing.assert_allclose(snapshot.gather(snapshot.lookup(current["item_id"])), vectors, atol=1e-5)
    return found


def prepared(folder: Path, pool: EncoderPool, feed: bool) -> str:
    """A catalogue of which some was changed, deleted and added after the centers' first refresh."""
    uri = f"{folder}/items"
    write_deltalake(uri, items_of(100), configuration={"delta.enableChangeDataFeed": "true" if feed else "false"})
    for name in ("undisturbed", "killed"):
        refresh(uri, folder / name, 4_096, pool)
    DeltaTable(uri).delete("item_id in ('item-1', 'item-2')")
    write_deltalake(uri, items_of(160).slice(100), mode="append")
    changed = items_of(50, "changed").slice(3)
    DeltaTable(uri).merge(changed, "t.item_id = s.item_id", "s", "t").when_matched_update_all().execute()
    return uri


@pytest.mark.chaos  # a minute; `make test` kills an extraction job twice in a row
def test_a_refresh_killed_between_its_commits_and_again_at_its_end_equals_an_undisturbed_one(
    tmp_path: Path, pool: EncoderPool
) -> None:
    uri = prepared(tmp_path, pool, feed=True)
    refresh(uri, tmp_path / "undisturbed", 10, pool)
    assert killed(uri, tmp_path / "killed", 10, "commit")
    before = EmbeddingTable(f"{tmp_path}/killed/table").committed_shards("v1")
    assert killed(uri, tmp_path / "killed", 10, "build_snapshot")
    refresh(uri, tmp_path / "killed", 10, pool)
    assert before < EmbeddingTable(f"{tmp_path}/killed/table").committed_shards("v1")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "undisturbed")


@pytest.mark.chaos
@pytest.mark.parametrize(("warm_rows", "feed"), [(10, False), (4_096, False), (10, True), (4_096, True)])
def test_a_refresh_killed_at_any_step_and_moment_equals_an_undisturbed_one(
    tmp_path: Path, pool: EncoderPool, warm_rows: int, feed: bool
) -> None:
    uri = prepared(tmp_path, pool, feed)
    refresh(uri, tmp_path / "undisturbed", warm_rows, pool)
    find = "find_feed_changes" if feed else "find_changes"
    steps = ("PackWriter", find, "write_deletions", "commit", "write_rejects", "build_snapshot", "state")
    assert sum(killed(uri, tmp_path / "killed", warm_rows, step) for step in steps) >= 4
    moments = random.Random(0)
    for _ in range(int(os.environ.get("KILLS", "3"))):
        command = [sys.executable, "-c", JOB, uri, f"{tmp_path}/killed", str(warm_rows), "none"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(2, 10))
        process.kill()
        process.wait()
    refresh(uri, tmp_path / "killed", warm_rows, pool)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "undisturbed")
