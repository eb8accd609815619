"""mim_ray/extraction/write.py."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import pyarrow as pa
import pytest

from mim_ray.data.schema import TIME
from mim_ray.errors import ArtifactError
from mim_ray.extraction.write import Committer, OpenShards, read_rejects_of, write_pieces
from mim_ray.representation_center.table import EmbeddingTable, Fragment


def encoded(shard_ids: list[str], rows: list[int], dropped: tuple[int, ...] = ()) -> pa.Table:
    num = len(rows)
    drop = [number in dropped for number in range(num)]
    return pa.table(
        {
            "item_id": [f"{shard}-{row}" for shard, row in zip(shard_ids, rows, strict=True)],
            "embedding": pa.array([None if gone else [1.0, 0.0] for gone in drop], pa.list_(pa.float32())),
            "content_hash": ["h"] * num,
            "content_at": pa.array([0] * num, TIME),
            "category": pa.array([None] * num, pa.string()),
            "image_reason": pa.array(["image corrupt" if gone else None for gone in drop], pa.string()),
            "image_detail": pa.array([None] * num, pa.string()),
            "drop_reason": pa.array(["no content" if gone else None for gone in drop], pa.string()),
            "shard_id": shard_ids,
            "row": rows,
        }
    )


def fragment(name: str) -> Fragment:
    return Fragment(f"encoder_version=v1/batch-{name}-0.parquet", 1, 1, "v1", [name])


def test_a_shard_is_complete_only_when_all_its_rows_are_there() -> None:
    shards = OpenShards({"a": 5, "b": 2})
    one, two, three, other = fragment("a"), fragment("a"), fragment("a"), fragment("b")
    assert shards.add("a", [3, 4], one) == []
    assert shards.add("b", [0], other) == []
    assert shards.add("a", [0], two) == []
    assert shards.add("a", [3, 4], fragment("a")) == []  # the same rows again
    assert shards.add("a", [2, 1], three) == [one, two, three]
    assert shards.add("a", [2, 1], three) == []
    assert shards.add("b", [1], other) == [other, other]


def test_a_batch_of_several_shards_becomes_a_file_for_each(tmp_path: Path) -> None:
    table = EmbeddingTable(f"{tmp_path}/table").create()
    batch = encoded(["a", "a", "b", "b"], [4, 5, 0, 1], dropped=(1, 2))
    rejects = f"{tmp_path}/rejects"
    files = write_pieces(batch, table=table.uri, rejects=rejects, encoder_version="v1").to_pylist()
    assert [(file["shard_id"], file["rows"]) for file in files] == [("a", [4, 5]), ("b", [0, 1])]
    write_pieces(batch, table=table.uri, rejects=rejects, encoder_version="v1")  # an attempt that nobody commits
    table.commit([Fragment(**json.loads(file["fragment"])) for file in files])
    assert sorted(table.current_rows("v1")["item_id"].to_pylist()) == ["a-4", "b-1"]
    found = read_rejects_of(["a", "b"], table=table, rejects=rejects, encoder_version="v1").to_pylist()
    assert sorted((row["key"], row["reason"]) for row in found) == [
        ("a-5", "image corrupt"),
        ("a-5", "no content"),
        ("b-0", "image corrupt"),
        ("b-0", "no content"),
    ]
    assert read_rejects_of(["c"], table=table, rejects=rejects, encoder_version="v1").num_rows == 0


def test_complete_shards_become_visible_while_the_job_runs(tmp_path: Path) -> None:
    table = EmbeddingTable(f"{tmp_path}/table").create()

    def files(shard: str) -> list[Fragment]:
        written = write_pieces(
            encoded([shard], [0]), table=table.uri, rejects=f"{tmp_path}/rejects", encoder_version="v1"
        )
        return [Fragment(**json.loads(file["fragment"])) for file in written.to_pylist()]

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
        committer.add([fragment("a")])
