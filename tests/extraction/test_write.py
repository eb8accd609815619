"""mim_ray/extraction/write.py."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from mim_ray.data.schema import TIME
from mim_ray.errors import ArtifactError
from mim_ray.extraction.plan import plan
from mim_ray.extraction.write import Committer, ShardFile, read_rejects_of, write_shard
from mim_ray.representation_center.data_files import Fragment
from mim_ray.representation_center.table import EmbeddingTable


def encoded(shard_id: str, num: int, dropped: tuple[int, ...] = ()) -> pa.Table:
    drop = [number in dropped for number in range(num)]
    return pa.table(
        {
            "item_id": [f"{shard_id}-{row}" for row in range(num)],
            "embedding": pa.array([None if gone else [1.0, 0.0] for gone in drop], pa.list_(pa.float32())),
            "content_hash": ["h"] * num,
            "content_at": pa.array([0] * num, TIME),
            "category": pa.array([None] * num, pa.string()),
            "image_reason": pa.array(["image corrupt" if gone else None for gone in drop], pa.string()),
            "image_detail": pa.array([None] * num, pa.string()),
            "drop_reason": pa.array(["no content" if gone else None for gone in drop], pa.string()),
            "row": pa.array(range(num), pa.int64()),
        }
    )


def write(folder: Path, rows: pa.Table, shard_id: str) -> ShardFile:
    return write_shard(
        rows, shard_id=shard_id, table=f"{folder}/table", rejects=f"{folder}/rejects", encoder_version="v1"
    )


def test_a_shard_is_one_file_and_its_rejects_stand_beside_it(tmp_path: Path, make_items: Callable[..., str]) -> None:
    table = EmbeddingTable(f"{tmp_path}/table").create()
    planned = plan(make_items(tmp_path / "data", num=40, files=1), 20, ["v1"])
    first, second = planned.shard_ids()
    files = [write(tmp_path, encoded(first, 3, dropped=(1,)), first), write(tmp_path, encoded(second, 2), second)]
    write(tmp_path, encoded(first, 3, dropped=(1,)), first)  # an attempt that nobody commits
    write(tmp_path, encoded("another", 3, dropped=(1,)), "another")
    assert [file.num_rows for file in files] == [3, 2]
    table.commit([file.fragment for file in files])
    expected = [f"{first}-0", f"{first}-2", f"{second}-0", f"{second}-1"]
    assert sorted(table.current_rows("v1")["item_id"].to_pylist()) == sorted(expected)
    found = read_rejects_of(planned, f"{tmp_path}/rejects").to_pylist()
    assert [(row["key"], row["reason"]) for row in found] == [
        (f"{first}-1", "image corrupt"),
        (f"{first}-1", "no content"),
    ]
    assert read_rejects_of(planned, f"{tmp_path}/none").num_rows == 0


def test_complete_shards_become_visible_while_the_job_runs(tmp_path: Path) -> None:
    table = EmbeddingTable(f"{tmp_path}/table").create()

    def files(shard: str) -> list[Fragment]:
        return [write(tmp_path, encoded(shard, 1), shard).fragment]

    with Committer(table, every_s=0.02) as committer:
        committer.add(files("a"))
        deadline = time.monotonic() + 5
        while table.committed_shards("v1") != {"a"}:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        committer.add(files("b"))
    assert table.committed_shards("v1") == {"a", "b"}
    with contextlib.suppress(KeyboardInterrupt), Committer(table, every_s=60) as committer:
        committer.add(files("c"))
        raise KeyboardInterrupt
    assert table.committed_shards("v1") == {"a", "b", "c"}  # finished work is kept when the job fails


def test_a_failed_commit_fails_the_job(tmp_path: Path) -> None:
    committer = Committer(EmbeddingTable(f"{tmp_path}/none"), every_s=0.01)
    with pytest.raises(ArtifactError, match="no Delta table"), committer:
        committer.add([Fragment("encoder_version=v1/batch-a-0.parquet", 1, 1, "v1", ["a"])])
