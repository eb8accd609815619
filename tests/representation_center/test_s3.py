"""The representation center on s3://, against an S3 API server on loopback."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mim_ray import artifacts
from mim_ray.data.schema import TIME
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.data_files import write_fragment
from mim_ray.representation_center.parameter_store import ParameterStore
from mim_ray.representation_center.snapshot import Snapshot, write_snapshot
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import WindowTail, append_segment, fold, list_segments, segment_rows

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


def test_two_jobs_that_write_at_once_lose_and_double_nothing(s3: Any) -> None:
    """Four writers, each with its own handle; every shard is offered by two of them."""
    uri = f"{s3.uri}/table"
    EmbeddingTable(uri).create()
    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def job(number: int) -> None:
        try:
            table = EmbeddingTable(uri)
            start.wait()
            for shard in range(6):
                name = f"shard-{shard}-{number % 2}"
                ids = [f"{name}-{row}" for row in range(3)]
                table.commit([write_fragment(uri, rows(ids, shard), encoder_version="v1", shard_id=name)])
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=job, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    table = EmbeddingTable(uri)
    _, files = table.scan("v1")
    ids = [row for file in files for row in file.read(["item_id"])["item_id"].to_pylist()]
    assert sorted(ids) == sorted(f"shard-{s}-{n}-{r}" for s in range(6) for n in range(2) for r in range(3))
    versions = [file.commit_version for file in files]
    assert sorted(versions) == list(range(1, 13))
    assert table.version == 12


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
