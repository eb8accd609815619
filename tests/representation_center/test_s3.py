"""The representation center on s3://, against an S3 API server on loopback."""

from __future__ import annotations

import multiprocessing
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mim_ray import artifacts
from mim_ray.data.schema import TIME
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.compaction import compact, purge
from mim_ray.representation_center.data_files import write_fragment
from mim_ray.representation_center.maintenance import maintain
from mim_ray.representation_center.parameter_store import ParameterStore
from mim_ray.representation_center.release import promote, releases
from mim_ray.representation_center.snapshot import Snapshot, write_snapshot
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import WindowTail, append_segment, fold, list_segments, segment_rows
from mim_ray.representation_center.vacuum import vacuum

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def rows(ids: list[str], value: float, at: datetime | None = NOON, **columns: object) -> pa.Table:
    values: dict[str, object] = {
        "item_id": ids,
        "embedding": pa.array([[value, 1.0]] * len(ids), pa.list_(pa.float32())),
        "content_hash": [f"{int(value):032x}"] * len(ids),
        "content_at": pa.array([at] * len(ids), TIME),
    }
    return pa.table(values | columns)


def message(ids: list[str], value: float, at: datetime) -> pa.Table:
    matrix = np.full((len(ids), 2), value, np.float32)
    return segment_rows(ids, matrix, content_hashes=["h"] * len(ids), content_at=[at] * len(ids))


def test_the_log_and_its_snapshot(s3: Any) -> None:
    table = EmbeddingTable(f"{s3.uri}/center/table").create()
    table.append(rows(["a", "b", "c"], 1), encoder_version="v1", shard_id="s1")
    version = table.append(rows(["a"], 2), encoder_version="v1", shard_id="s2")
    table.append(rows(["b"], 0, deleted=[True]), encoder_version="v1", shard_id="s3")
    table.append(rows(["a"], 9), encoder_version="v2", shard_id="s1")
    assert table.contains("v1", ["s1", "s2", "other"]) == {"s1", "s2"}
    assert table.committed_shards("v1") == {"s1", "s2", "s3"}
    assert {row["item_id"]: row["embedding"][0] for row in table.current_rows("v1").to_pylist()} == {"a": 2, "c": 1}
    assert [file.commit_version for file in table.scan("v1", newer_than=version)[1]] == [version + 1]
    line = f"{s3.uri}/center/snapshots/v1"
    snapshot = build_snapshot(table, "v1", line)
    assert snapshot.gather(snapshot.lookup(["a", "b", "c"]))[:, 0].tolist() == [2, 0, 1]
    table.append(rows(["d"], 4), encoder_version="v1")
    newer = build_snapshot(table, "v1", line)
    assert newer.delta_version > snapshot.delta_version
    assert Snapshot.open(line).lookup(["d"])[0] >= 0
    assert snapshot.lookup(["d"]).tolist() == [-1]


def test_a_damaged_snapshot_is_refused(s3: Any) -> None:
    uri = f"{s3.uri}/snapshot"
    write_snapshot(uri, ["a", "b"], np.ones((2, 4), np.float32), encoder_version="v1")
    (matrix,) = artifacts.list_files(uri, "matrix.bin")
    artifacts.write_bytes(matrix, b"\0" * 32)
    with pytest.raises(ArtifactError, match="damaged"):
        Snapshot.open(uri)


def test_window_messages_are_read_folded_and_served(s3: Any) -> None:
    center = f"{s3.uri}/center"
    table, window = EmbeddingTable(f"{center}/table").create(), f"{center}/window"
    table.append(rows(["a", "b"], 1), encoder_version="v1")
    build_snapshot(table, "v1", f"{center}/snapshots/v1")
    store = ParameterStore(f"{center}/snapshots/v1", table=table.uri, window=window)
    tail = WindowTail(window, "v1")
    assert tail.poll() == []
    append_segment(window, message(["a", "new"], 5, NOON.replace(hour=13)), encoder_version="v1")
    append_segment(window, message(["b"], 6, NOON.replace(hour=11)), encoder_version="v1")  # older: never wins
    assert store.refresh() == 2  # rows that changed something
    assert store.multi_get(["a", "b", "new"])[0][:, 0].tolist() == [5, 1, 5]
    assert [found.num_rows for _, found in tail.poll()] == [2, 1]
    s3.requests()
    assert tail.poll() == []
    assert len(s3.requests()) == 1  # a poll that finds nothing is one listing
    assert fold(window, table, keep_s=0).num_rows == 3
    assert list_segments(window, "v1") == []
    assert fold(window, table, keep_s=0).num_rows == 0
    current = {row["item_id"]: row["embedding"][0] for row in table.current_rows("v1").to_pylist()}
    assert current == {"a": 5, "b": 1, "new": 5}
    again = ParameterStore(f"{center}/snapshots/v1", table=table.uri, window=window)
    assert again.multi_get(["a", "b", "new"])[0][:, 0].tolist() == [5, 1, 5]


def _job(uri: str, number: int) -> None:
    table = EmbeddingTable(uri)
    for shard in range(8):
        name = f"shard-{shard}" if shard % 2 else f"shard-{shard}-{number}"  # the odd ones are offered by both
        ids = [f"{name}-{row}" for row in range(3)]
        table.commit([write_fragment(uri, rows(ids, shard), encoder_version="v1", shard_id=name)])


def test_two_jobs_that_write_at_once_lose_and_double_nothing(s3: Any) -> None:
    uri = f"{s3.uri}/table"
    EmbeddingTable(uri).create()
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=_job, args=(uri, number)) for number in range(2)]
    for process in jobs:
        process.start()
    for process in jobs:
        process.join()
        assert process.exitcode == 0
    table = EmbeddingTable(uri)
    _, files = table.scan("v1")
    ids = [row for file in files for row in file.read(["item_id"])["item_id"].to_pylist()]
    names = [f"shard-{shard}" for shard in (1, 3, 5, 7)]
    names += [f"shard-{shard}-{number}" for shard in (0, 2, 4, 6) for number in range(2)]
    assert sorted(ids) == sorted(f"{name}-{row}" for name in names for row in range(3))
    assert sorted(file.commit_version for file in files) == list(range(1, 13))
    assert table.version == 12


def test_a_commit_whose_answer_is_lost_is_made_once(s3: Any) -> None:
    table = EmbeddingTable(f"{s3.uri}/table").create()
    s3.lose_answers(1)
    table.append(rows(["a", "b"], 1), encoder_version="v1", shard_id="s1")
    _, files = table.scan("v1")
    assert [file.read(["item_id"])["item_id"].to_pylist() for file in files] == [["a", "b"]]
    promote(f"{s3.uri}/center", encoder_version="v1", snapshot="s")
    s3.lose_answers(1)
    promote(f"{s3.uri}/center", encoder_version="v2", snapshot="s")
    assert [release.encoder_version for release in releases(f"{s3.uri}/center")] == ["v1", "v2"]


def test_two_folds_at_once_bring_each_message_once(s3: Any) -> None:
    center = f"{s3.uri}/center"
    for number in range(12):
        append_segment(f"{center}/window", message([f"i{number}"], number, NOON), encoder_version="v1")
    EmbeddingTable(f"{center}/table").create()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            fold(f"{center}/window", EmbeddingTable(f"{center}/table"), keep_s=0)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    _, files = EmbeddingTable(f"{center}/table").scan("v1")
    ids = [row for file in files for row in file.read(["item_id"])["item_id"].to_pylist()]
    assert sorted(ids) == sorted(f"i{number}" for number in range(12))
    assert list_segments(f"{center}/window", "v1") == []


def test_compaction_purge_and_vacuum_keep_the_current_rows(s3: Any) -> None:
    table = EmbeddingTable(f"{s3.uri}/table").create()
    for number in range(9):
        table.append(rows([f"i{number}", "all"], number, NOON.replace(minute=number)), encoder_version="v1")
    table.append(rows(["i3"], 0, NOON.replace(hour=13), deleted=[True]), encoder_version="v1")
    before = {row["item_id"]: row["embedding"][0] for row in table.current_rows("v1").to_pylist()}
    shards = table.committed_shards("v1")
    orphan = write_fragment(table.uri, rows(["lost"], 1), encoder_version="v1", shard_id="never-committed")
    assert compact(table, "v1").num_merges > 0
    assert len(table.scan("v1")[1]) < 10
    later = datetime.now(UTC) + timedelta(days=400)
    assert purge(table, "v1", before=later, committed_before=later).num_purged > 0
    fresh = EmbeddingTable(table.uri)
    assert {row["item_id"]: row["embedding"][0] for row in fresh.current_rows("v1").to_pylist()} == before
    assert fresh.committed_shards("v1") == shards
    files = set(artifacts.list_files(table.uri, ".parquet"))
    assert vacuum(table, retention=timedelta(hours=1)).num_files == 0  # all of it is younger
    assert f"{table.uri}/{orphan.path}" in artifacts.list_files(table.uri, ".parquet")
    assert files <= set(artifacts.list_files(table.uri, ".parquet"))
    s3.make_older(7_200)
    assert vacuum(table, retention=timedelta(hours=1)).num_files >= 1
    left = artifacts.list_files(table.uri, ".parquet")
    assert files - set(left) == {f"{table.uri}/{orphan.path}"}  # what was replaced just now may still be read
    assert {file.uri for file in table.files()} <= set(left)
    append_segment(f"{s3.uri}/window", message(["new"], 5, NOON), encoder_version="v1")
    day = timedelta(days=1)
    done = maintain(s3.uri, retention=timedelta(hours=1), deleted_retention=day, purge_every=day)
    assert done.folded.num_rows == 1
    after = {row["item_id"]: row["embedding"][0] for row in fresh.current_rows("v1").to_pylist()}
    assert after == before | {"new": 5}
