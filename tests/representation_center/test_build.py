"""mim_ray/representation_center/build.py: bounded memory gives the same snapshot, and a kill leaves the old one."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mim_ray.data.schema import TIME
from mim_ray.errors import ArtifactError
from mim_ray.representation_center import build, snapshot_merge
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.log_rows import RowRanges
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.table import EmbeddingTable

NUM, WIDTH = 2_000, 4


def fill(table: EmbeddingTable, steps: int = 5, name: str = "s") -> None:
    """Items that come, change, are deleted, come again, and get older content late."""
    rng = np.random.default_rng(0)
    for step in range(steps):
        numbers = rng.choice(NUM, NUM // 2, replace=False)
        embedding = pa.FixedSizeListArray.from_arrays(
            pa.array(rng.standard_normal(len(numbers) * WIDTH, np.float32)), WIDTH
        )
        rows = {
            "item_id": [f"item-{number}" for number in numbers],
            "embedding": embedding.cast(pa.list_(pa.float32())),
            "content_hash": [f"{number:016x}{step:016x}" for number in numbers],
            "content_at": pa.array(rng.integers(0, 4, len(numbers)) * 1_000_000, TIME),
            "deleted": rng.random(len(numbers)) < 0.1,
        }
        table.append(pa.table(rows), encoder_version="v1", shard_id=f"{name}{step}")


@pytest.fixture
def table(tmp_path: Path) -> EmbeddingTable:
    table = EmbeddingTable(str(tmp_path / "table")).create()
    fill(table)
    return table


def files_of(snapshot: Snapshot) -> dict[str, object]:
    return json.loads((Path(snapshot.uri) / "manifest.json").read_text())["files"]


def test_a_log_that_does_not_fit_into_memory_gives_the_same_snapshot(
    table: EmbeddingTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_snapshot(table, "v1", str(tmp_path / "whole"))
    monkeypatch.setattr(snapshot_merge, "PIECE_ROWS", 100)
    spilled: list[int] = []
    flush = RowRanges._flush

    def counted(ranges: RowRanges) -> None:
        flush(ranges)
        spilled.append(sum(path.exists() for path in ranges._paths))

    monkeypatch.setattr(RowRanges, "_flush", counted)
    parts = build_snapshot(table, "v1", str(tmp_path / "parts"), memory_bytes=100_000)
    assert len(spilled) > 3
    assert max(spilled) > 8
    assert files_of(parts) == files_of(whole)
    assert {path.suffix for path in Path(parts.uri).iterdir()} == {".bin", ".json"}
    current = table.current_rows("v1")
    rows = parts.lookup(current["item_id"])
    assert sorted(rows.tolist()) == list(range(parts.num_rows))
    np.testing.assert_array_equal(parts.gather(rows), np.array(current["embedding"].to_pylist(), np.float32))
    assert parts.content_hashes(rows).to_pylist() == current["content_hash"].to_pylist()
    assert parts.find_content(current["content_hash"]).tolist() == rows.tolist()


def test_many_old_rows_of_few_items_are_dropped_on_the_way(
    table: EmbeddingTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_snapshot(table, "v1", str(tmp_path / "whole"))
    pop = RowRanges.pop
    monkeypatch.setattr(RowRanges, "pop", lambda ranges, part, memory: pop(ranges, part, 1_000))
    assert files_of(build_snapshot(table, "v1", str(tmp_path / "parts"), memory_bytes=300_000)) == files_of(whole)


def _build(table: str, line: str, stop_in: str) -> None:
    original = getattr(build, stop_in)

    def stop(*args: object) -> None:
        original(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(build, stop_in, stop)
    build_snapshot(EmbeddingTable(table), "v1", line, memory_bytes=100_000)


@pytest.mark.parametrize("stop_in", ["read_rows", "merged_rows"])
def test_a_killed_build_leaves_the_old_snapshot_and_the_next_one_clears_up(
    table: EmbeddingTable, tmp_path: Path, stop_in: str
) -> None:
    line = tmp_path / "line"
    old = build_snapshot(table, "v1", str(line))
    fill(table, steps=1, name="late")
    worker = multiprocessing.get_context("spawn").Process(target=_build, args=(table.uri, str(line), stop_in))
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    assert len(list(line.glob(".building-*"))) == 1
    assert Snapshot.open(str(line)).uri == old.uri
    new = build_snapshot(table, "v1", str(line))
    assert not list(line.glob(".building-*"))
    assert new.delta_version == old.delta_version + 1
    assert Snapshot.open(str(line)).uri == new.uri


def test_no_room_for_the_spilled_rows_is_a_sentence(
    table: EmbeddingTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RowRanges, "_flush", full)
    with pytest.raises(ArtifactError, match=r"No space left.*stays current"):
        build_snapshot(table, "v1", str(tmp_path / "line"), memory_bytes=100_000)
    assert not list((tmp_path / "line").iterdir())
