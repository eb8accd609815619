"""mim_ray/representation_center/snapshot_merge.py and stored_rows.py: a state made from the one before is that of the whole log."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mim_ray.data.schema import TIME
from mim_ray.errors import ArtifactError
from mim_ray.representation_center import snapshot_files, snapshot_merge
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.compaction import compact, purge
from mim_ray.representation_center.log_rows import RowRanges
from mim_ray.representation_center.snapshot import Snapshot, write_snapshot
from mim_ray.representation_center.snapshot_line import list_snapshots, switch_snapshot
from mim_ray.representation_center.table import EmbeddingTable

WIDTH = 4
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def rows(
    rng: np.random.Generator, ids: list[str], days: list[int | None], deleted: list[bool] | None = None
) -> pa.Table:
    values = rng.standard_normal(len(ids) * WIDTH).astype(np.float32)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(values), WIDTH).cast(pa.list_(pa.float32()))
    return pa.table(
        {
            "item_id": pa.array(ids, pa.string()),
            "embedding": embedding,
            "content_hash": [rng.bytes(16).hex() if rng.random() < 0.9 else None for _ in ids],
            "content_at": pa.array([None if day is None else day * 86_400_000_000 for day in days], TIME),
            "deleted": [False] * len(ids) if deleted is None else deleted,
        }
    )


def random_rows(rng: np.random.Generator, num_items: int, days: int = 4) -> pa.Table:
    """Items that are new, change, are deleted, come again, or get older content or content of no time."""
    num = int(rng.integers(0, num_items // 2))
    ids = [f"item-{'x' * (number % 5)}{number}" for number in rng.choice(num_items, num, replace=False)]
    chosen = [None if day == 0 else int(day) for day in rng.integers(0, days, num)]
    return rows(rng, ids, chosen, (rng.random(num) < 0.2).tolist())


def files_of(snapshot: Snapshot) -> dict[str, object]:
    manifest = json.loads((Path(snapshot.uri) / "manifest.json").read_text())
    return {name: manifest[name] for name in ("files", "rows", "block_hashes", "buckets", "key_wraps", "delta_version")}


def assert_same(made: Snapshot, table: EmbeddingTable, whole_line: Path) -> None:
    """`made` has byte for byte the files of a state made of the whole log, and their checksums are right."""
    whole = build_snapshot(table, "v1", str(whole_line), dtype=made.dtype, whole_log=True, keep=1)
    assert (whole.base, whole.whole_log_because) == (None, "it was asked for")
    assert files_of(made) == files_of(whole)
    Snapshot.open(made.uri, verify=True)
    for name in files_of(whole)["files"]:  # type: ignore[attr-defined]
        assert (Path(made.uri) / name).read_bytes() == (Path(whole.uri) / name).read_bytes()


@pytest.fixture
def table(tmp_path: Path) -> EmbeddingTable:
    return EmbeddingTable(str(tmp_path / "table")).create()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("seed", range(4))
def test_a_random_history_gives_the_files_of_the_whole_log(
    table: EmbeddingTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(snapshot_merge, "PIECE_ROWS", 7)
    monkeypatch.setattr(snapshot_files, "BLOCK_BYTES", 128)
    line = str(tmp_path / "line")
    num_items = int(rng.integers(20, 120))
    table.append(rows(rng, ["item-0", "other"], [1, 1]), encoder_version="v1")
    num_based = 0
    for _ in range(10):
        for _ in range(int(rng.integers(0, 4))):
            table.append(random_rows(rng, num_items), encoder_version="v1")
        action = rng.random()
        if action < 0.3:  # across the version of the state before: old rows come again under a later commit
            compact(table, "v1", fan_in=2)
        elif action < 0.5:
            compact(table, "v1", keep_apart=[state.delta_version for state in list_snapshots(line)], fan_in=2)
        elif action < 0.6:
            purge(table, "v1", before=NOW, committed_before=datetime.now(UTC) + timedelta(days=1))
        elif action < 0.7:
            table.append(random_rows(rng, num_items), encoder_version="v2")
        elif action < 0.8 and len(list_snapshots(line)) > 1:
            switch_snapshot(line, list_snapshots(line)[-1].snapshot_id)
        memory = int(rng.choice([3_000, 10_000, 2**28]))
        made = build_snapshot(table, "v1", line, dtype=dtype, memory_bytes=memory, keep=int(rng.integers(1, 4)))
        num_based += made.base is not None
        assert_same(made, table, tmp_path / "whole")
    assert num_based >= 2


def test_only_the_rows_since_are_read(table: EmbeddingTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    line = str(tmp_path / "line")
    ids = [f"i{number}" for number in range(500)]
    table.append(rows(rng, ids, [2] * 500), encoder_version="v1")
    first = build_snapshot(table, "v1", line)
    assert (first.base, first.whole_log_because) == (None, "the line has no state yet")
    table.append(rows(rng, [ids[3], "new"], [3, 3]), encoder_version="v1")
    seen: list[int] = []
    add = RowRanges.add
    monkeypatch.setattr(RowRanges, "add", lambda ranges, part: (seen.append(part.num_rows), add(ranges, part))[1])
    second = build_snapshot(table, "v1", line)
    assert seen == [2]
    assert (second.base, second.whole_log_because) == (first.snapshot_id, None)
    assert_same(second, table, tmp_path / "whole")
    seen.clear()
    third = build_snapshot(table, "v1", line)
    assert not seen
    assert third.base == second.snapshot_id
    assert files_of(third) == files_of(second)


def test_older_content_that_comes_late_changes_nothing_and_deletions_leave(
    table: EmbeddingTable, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    line = str(tmp_path / "line")
    table.append(rows(rng, ["a", "b", "c", "d", "gone"], [5, 5, 5, None, 5]), encoder_version="v1")
    table.append(rows(rng, ["gone"], [6], [True]), encoder_version="v1")
    old = build_snapshot(table, "v1", line)
    table.append(
        rows(rng, ["a", "b", "c", "d", "gone", "e"], [4, 5, 4, None, 5, 1], [False, False, True, False, False, False]),
        encoder_version="v1",
    )
    new = build_snapshot(table, "v1", line)
    assert new.base == old.snapshot_id
    assert set(new.ids.to_pylist()) == {"a", "b", "c", "d", "e"}
    changed = (new.gather(new.lookup(["a", "b", "c", "d"])) != old.gather(old.lookup(["a", "b", "c", "d"]))).any(axis=1)
    assert changed.tolist() == [False, True, False, True]
    assert_same(new, table, tmp_path / "whole")
    table.append(rows(rng, ["a", "b", "gone"], [9, 4, 6], [True, True, False]), encoder_version="v1")
    new = build_snapshot(table, "v1", line)
    assert set(new.ids.to_pylist()) == {"b", "c", "d", "e", "gone"}
    assert_same(new, table, tmp_path / "whole")


def test_many_new_items_between_two_old_ones(
    table: EmbeddingTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_merge, "PIECE_ROWS", 3)
    rng = np.random.default_rng(0)
    line = str(tmp_path / "line")
    table.append(rows(rng, ["a", "b"], [1, 1]), encoder_version="v1")
    build_snapshot(table, "v1", line)
    for ids in ([f"n{number}" for number in range(50)], ["a", "b"]):
        table.append(rows(rng, ids, [2] * len(ids), [len(ids) == 2] * len(ids)), encoder_version="v1")
        made = build_snapshot(table, "v1", line)
        assert made.base is not None
        assert_same(made, table, tmp_path / "whole")


def test_a_state_that_cannot_serve_is_passed_over_with_a_reason(table: EmbeddingTable, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    line = str(tmp_path / "line")
    table.append(rows(rng, ["a", "b"], [1, 1], [False, True]), encoder_version="v1")
    state = build_snapshot(table, "v1", line)
    assert "float32 of encoder version v1" in str(build_snapshot(table, "v1", line, dtype="float16").whole_log_because)
    switch_snapshot(line, state.snapshot_id)

    matrix = Path(state.uri) / "matrix.bin"
    content = bytearray(matrix.read_bytes())
    content[2] ^= 1
    matrix.write_bytes(content)
    table.append(rows(rng, ["c"], [1]), encoder_version="v1")
    mended = build_snapshot(table, "v1", line)
    assert mended.base is None
    assert "damaged" in str(mended.whole_log_because)
    assert_same(mended, table, tmp_path / "whole")

    purge(table, "v1", before=NOW, committed_before=datetime.now(UTC) + timedelta(days=1))
    purged = build_snapshot(table, "v1", line)
    assert "rewritten from its beginning" in str(purged.whole_log_because)
    assert build_snapshot(table, "v1", line).base == purged.snapshot_id

    write_snapshot(line, ["a"], np.zeros((1, WIDTH), np.float32), encoder_version="v1", delta_version=99)
    assert "has no rows of the log" in str(build_snapshot(table, "v1", line).whole_log_because)
    other = EmbeddingTable(str(tmp_path / "other")).create()
    other.append(rows(rng, ["a"], [1]), encoder_version="v1")
    assert build_snapshot(other, "v1", line).base is None


def test_a_table_begun_anew_is_not_mixed_with_the_old_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    line = str(tmp_path / "line")
    for name in ("old", "new"):
        table = EmbeddingTable(str(tmp_path / name)).create()
        for _ in range(2 if name == "old" else 3):
            table.append(rows(rng, [f"{name}-a"], [1]), encoder_version="v1")
        assert build_snapshot(table, "v1", line).ids.to_pylist() == [f"{name}-a"]


def test_a_new_row_that_cannot_be_stored_is_named_and_the_old_state_stays(
    table: EmbeddingTable, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    line = str(tmp_path / "line")
    table.append(rows(rng, ["a"], [1]), encoder_version="v1")
    state = build_snapshot(table, "v1", line, dtype="float16")
    bad = rows(rng, ["good", "bad"], [1, 1])
    large = pa.array([[1.0] * WIDTH, [1e6] * WIDTH], pa.list_(pa.float32()))
    table.append(bad.set_column(1, "embedding", large), encoder_version="v1")
    with pytest.raises(ArtifactError, match="embedding of item 'bad' is not finite in float16"):
        build_snapshot(table, "v1", line, dtype="float16")
    assert Snapshot.open(line).uri == state.uri
