"""mim_ray/extraction/refresh.py under SIGKILL: the same round again ends where an undisturbed one ends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.table import EmbeddingTable

JOB = """
import os, signal, sys, time
import numpy as np
from mim_ray.config.scenario import Extraction, Refresh, Run
from mim_ray.data.transforms import PictureFormat
from mim_ray.extraction import refresh as module
from mim_ray.extraction.read import Decoding
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.runtime.cluster import cluster

def load(uri, use_gpu):
    def encode(titles, images, has_image):
        time.sleep(0.05)
        rows = [[len(t or ""), sum((t or "").encode()) % 97, i.mean(), 1] for t, i in zip(titles, images)]
        return np.array(rows, np.float32)
    return encode

items, center, warm_rows, step, number = sys.argv[1:]
left = [int(number)]

def killed(original):
    def call(*args, **kwargs):
        result = original(*args, **kwargs)
        left[0] -= 1
        if not left[0]:
            print("killed", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

if step == "commit":
    EmbeddingTable.commit = killed(EmbeddingTable.commit)
elif step == "state":
    module.StateStore.write = killed(module.StateStore.write)
elif step != "none":
    setattr(module, step, killed(getattr(module, step)))
with cluster(Run(num_cpus=2, object_store_mb=100)):
    with module.Refresher(items, center, encoder="none", encoder_version="v1",
                          decoding=Decoding(PictureFormat(8, "squash"), 100_000, 10_000, 40, "/nowhere"),
                          settings=Extraction(shard_rows=20, batch_size=10, commit_every_s=0.1, num_actors=1),
                          refresh=Refresh(warm_rows=int(warm_rows)), rejects=f"{center}-rejects", load=load) as refresher:
        print(refresher.round(), flush=True)
print("finished")
"""


def items_of(num: int, text: str = "title") -> pa.Table:
    return pa.table({"item_id": [f"item-{n}" for n in range(num)], "title": [f"{text} {n}" for n in range(num)]})


def refresh(
    items: str, center: Path, warm_rows: int, step: str = "none", number: int = 1
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", JOB, items, str(center), str(warm_rows), step, str(number)]
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False
    )


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


def prepared(folder: Path) -> str:
    """A catalogue of which some was changed, deleted and added after the centers' first refresh."""
    uri = f"{folder}/items"
    write_deltalake(uri, items_of(100))
    for name in ("undisturbed", "killed"):
        assert refresh(uri, folder / name, 4_096).stdout.endswith("finished\n")
    DeltaTable(uri).delete("item_id in ('item-1', 'item-2')")
    write_deltalake(uri, items_of(160).slice(100), mode="append")
    changed = items_of(50, "changed").slice(3)
    DeltaTable(uri).merge(changed, "t.item_id = s.item_id", "s", "t").when_matched_update_all().execute()
    return uri


def kill_and_refresh(uri: str, folder: Path, warm_rows: int, step: str, number: int) -> None:
    died = refresh(uri, folder / "killed", warm_rows, step, number)
    assert died.returncode == -signal.SIGKILL, died.stdout
    assert "killed\n" in died.stdout
    time.sleep(0.5)  # workers that outlive the job for a moment write files, but only the job commits


@pytest.mark.slow
def test_a_refresh_killed_between_its_commits_and_again_at_its_end_equals_an_undisturbed_one(tmp_path: Path) -> None:
    uri = prepared(tmp_path)
    assert refresh(uri, tmp_path / "undisturbed", 10).stdout.endswith("finished\n")
    kill_and_refresh(uri, tmp_path, 10, "commit", 1)
    kill_and_refresh(uri, tmp_path, 10, "build_snapshot", 1)
    assert refresh(uri, tmp_path / "killed", 10).stdout.endswith("finished\n")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "undisturbed")


@pytest.mark.chaos
@pytest.mark.parametrize("warm_rows", [10, 4_096])
def test_a_refresh_killed_at_any_step_equals_an_undisturbed_one(tmp_path: Path, warm_rows: int) -> None:
    uri = prepared(tmp_path)
    assert refresh(uri, tmp_path / "undisturbed", warm_rows).stdout.endswith("finished\n")
    for step in ("PackWriter", "find_changes", "write_fragment", "commit", "write_rejects", "build_snapshot", "state"):
        died = refresh(uri, tmp_path / "killed", warm_rows, step)
        assert died.returncode == -signal.SIGKILL or "finished" in died.stdout, died.stdout
    moments = random.Random(0)
    for _ in range(int(os.environ.get("KILLS", "3"))):
        command = [sys.executable, "-c", JOB, uri, f"{tmp_path}/killed", str(warm_rows), "none", "1"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(2, 10))
        process.kill()
        process.wait()
    assert refresh(uri, tmp_path / "killed", warm_rows).stdout.endswith("finished\n")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "undisturbed")
