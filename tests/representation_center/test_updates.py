"""mim_ray/representation_center/updates.py, lookup.py and parameter_store.py."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mim_ray.errors import ArtifactError, VersionMismatchError
from mim_ray.representation_center import window_folder
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.lookup import EmbeddingLookup
from mim_ray.representation_center.parameter_store import ParameterStore
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import WindowTail, append_segment, fold, list_segments, segment_rows

START = datetime(2025, 1, 1, tzinfo=UTC)


def message(ids: list[str], value: float, day: int | None, **options: object) -> pa.Table:
    return segment_rows(
        ids,
        np.full((len(ids), 2), value, np.float32),
        content_hashes=[f"hash-{value}"] * len(ids),
        content_at=[None if day is None else START + timedelta(days=day)] * len(ids),
        **options,  # type: ignore[arg-type]
    )


def all_rows(table: EmbeddingTable) -> list[tuple[str, str]]:
    _, files = table.scan("v1")
    rows = pa.concat_tables([file.read() for file in files])
    return sorted(zip(rows["item_id"].to_pylist(), rows["shard_id"].to_pylist(), strict=True))


@pytest.fixture
def center(tmp_path: Path) -> str:
    table = EmbeddingTable(f"{tmp_path}/table").create()
    rows = message(["a", "b", "c"], 1, 5).append_column("shard_id", pa.array(["s"] * 3))
    table.append(rows.drop_columns("shard_id"), encoder_version="v1", shard_id="s")
    build_snapshot(table, "v1", f"{tmp_path}/snapshots/v1")
    return str(tmp_path)


def test_a_segment_comes_back_as_it_was_written_and_ids_sort_by_time(center: str) -> None:
    rows = message(["x"], 2, None, categories=["shoes"])
    names = [append_segment(f"{center}/window", rows, encoder_version="v1") for _ in range(5)]
    assert names == sorted(names) == list_segments(f"{center}/window", "v1")
    assert WindowTail(f"{center}/window", "v1").poll()[0][1].equals(rows)


def test_the_tail_gives_each_segment_once_and_only_its_encoder_version(center: str) -> None:
    window = f"{center}/window"
    tail = WindowTail(window, "v1")
    assert tail.poll() == []
    first = append_segment(window, message(["x"], 2, 1), encoder_version="v1")
    append_segment(window, message(["x"], 9, 1), encoder_version="v2")
    assert [name for name, _ in tail.poll()] == [first]
    assert tail.poll() == []
    more = [append_segment(window, message([f"x{i}"], 2, 1), encoder_version="v1") for i in range(3)]
    assert [name for name, _ in tail.poll()] == more


def test_folding_brings_each_segment_in_once(center: str) -> None:
    table, window = EmbeddingTable(f"{center}/table"), f"{center}/window"
    names = [append_segment(window, message(["x"], value, 1), encoder_version="v1") for value in range(3)]
    before = table.version
    result = fold(window, table)
    assert (result.num_segments, result.num_rows, result.num_deleted) == (3, 3, 0)
    assert table.version == before + 1
    again = fold(window, table, keep_s=0)
    assert (again.num_segments, again.num_deleted) == (0, 3)
    assert table.version == before + 1
    assert list_segments(window, "v1") == []
    assert [row for row in all_rows(table) if row[0] == "x"] == [("x", name) for name in names]
    last = {row["item_id"]: row for row in table.current_rows("v1").to_pylist()}["x"]
    assert (last["embedding"], last["origin"], last["shard_id"]) == ([2.0, 2.0], "realtime", names[2])


def test_folding_works_before_there_is_a_table(tmp_path: Path) -> None:
    window = str(tmp_path / "window")
    table = EmbeddingTable(str(tmp_path / "table"))
    assert fold(window, table).num_segments == 0
    append_segment(window, message(["x"], 1, 1), encoder_version="v1")
    assert fold(window, table).num_segments == 1
    assert table.current_rows("v1").num_rows == 1


KILLED_FOLD = """
import sys, time
from mim_ray.representation_center import updates, window_folder
from mim_ray.representation_center.table import EmbeddingTable

center = sys.argv[1]

def wait_for_the_kill(uri):
    print("committed", flush=True)
    time.sleep(60)

updates.artifacts.remove = wait_for_the_kill  # the first deletion: the commit is done, no file is deleted
updates.fold(f"{center}/window", EmbeddingTable(f"{center}/table"), keep_s=0)
print("finished", flush=True)
"""


def test_a_fold_killed_between_commit_and_delete_folds_nothing_twice(center: str) -> None:
    table, window = EmbeddingTable(f"{center}/table"), f"{center}/window"
    names = [append_segment(window, message([f"x{i}"], i, 1), encoder_version="v1") for i in range(4)]
    process = subprocess.Popen([sys.executable, "-c", KILLED_FOLD, center], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "committed"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert process.stdout.read() == ""
    assert list_segments(window, "v1") == names  # killed before any deletion …
    folded = [row for row in all_rows(table) if row[0].startswith("x")]
    assert folded == [(f"x{i}", name) for i, name in enumerate(names)]  # … and after the commit
    late = append_segment(window, message(["x9"], 9, 1), encoder_version="v1")
    result = fold(window, table, keep_s=0)
    assert (result.num_segments, result.num_deleted) == (1, 5)
    assert [row for row in all_rows(table) if row[0].startswith("x")] == [*folded, ("x9", late)]


def test_two_folders_at_once_fold_each_segment_once(center: str) -> None:
    table, window = EmbeddingTable(f"{center}/table"), f"{center}/window"
    names = [append_segment(window, message(["x"], value, 1), encoder_version="v1") for value in range(4)]
    loop = f"from mim_ray.representation_center.updates import fold\nfrom mim_ray.representation_center.table import EmbeddingTable\nimport time\nend=time.time()+1.5\nwhile time.time()<end: fold({window!r}, EmbeddingTable({table.uri!r}), keep_s=0)"
    processes = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(2)]
    while any(process.poll() is None for process in processes):
        names.append(append_segment(window, message(["x"], len(names), 1), encoder_version="v1"))
        time.sleep(0.02)
    assert [process.returncode for process in processes] == [0, 0]
    fold(window, table, keep_s=0)
    assert [row for row in all_rows(table) if row[0] == "x"] == [("x", name) for name in names]
    assert list_segments(window, "v1") == []


def test_a_damaged_segment_stops_the_fold_with_its_name(center: str) -> None:
    name = append_segment(f"{center}/window", message(["x"], 1, 1), encoder_version="v1")
    Path(window_folder.segment_uri(f"{center}/window", "v1", name)).write_bytes(b"no arrow")
    with pytest.raises(ArtifactError, match=name):
        fold(f"{center}/window", EmbeddingTable(f"{center}/table"))


def test_lookup_answers_from_snapshot_table_and_window(center: str) -> None:
    table, window = EmbeddingTable(f"{center}/table"), f"{center}/window"
    table.append(message(["b", "d"], 2, 6), encoder_version="v1")  # after the snapshot
    append_segment(window, message(["e"], 3, 1, categories=["shoes"]), encoder_version="v1")
    lookup = EmbeddingLookup(Snapshot.open(f"{center}/snapshots/v1"), table=table, window=window)
    append_segment(window, message(["c"], 4, 7), encoder_version="v1")
    assert lookup.refresh() == 1
    result = lookup.get(["a", "b", "c", "d", "e", "unknown"])
    assert result.matrix[:, 0].tolist() == [1, 2, 4, 2, 3, 0]
    assert result.found.tolist() == [True] * 5 + [False]
    assert result.category.to_pylist() == [None] * 4 + ["shoes", None]


def test_older_content_never_overwrites_newer(center: str) -> None:
    table, window = EmbeddingTable(f"{center}/table"), f"{center}/window"
    lookup = EmbeddingLookup(Snapshot.open(f"{center}/snapshots/v1"), table=table, window=window)
    for ids, value, day in [
        (["a"], 2, 4),
        (["b"], 3, 9),
        (["b"], 4, 8),
        (["c"], 5, None),
        (["n"], 6, 2),
        (["n"], 7, 1),
    ]:
        append_segment(window, message(ids, value, day), encoder_version="v1")
        lookup.refresh()
    expected = {"a": 1, "b": 3, "c": 1, "n": 6}
    assert lookup.get(list(expected)).matrix[:, 0].tolist() == list(expected.values())
    fold(window, table)
    assert {row["item_id"]: row["embedding"][0] for row in table.current_rows("v1").to_pylist()} == expected
    build_snapshot(table, "v1", f"{center}/snapshots/v1")
    fresh = EmbeddingLookup(Snapshot.open(f"{center}/snapshots/v1"), table=table, window=window)
    assert fresh.get(list(expected)).matrix[:, 0].tolist() == list(expected.values())


def test_a_deleted_item_is_unknown(center: str) -> None:
    window = f"{center}/window"
    lookup = EmbeddingLookup(Snapshot.open(f"{center}/snapshots/v1"), window=window)
    append_segment(window, message(["a"], 0, 6, deleted=[True]), encoder_version="v1")
    append_segment(window, message(["b"], 0, 4, deleted=[True]), encoder_version="v1")  # older than b's content
    lookup.refresh()
    result = lookup.get(["a", "b"])
    assert result.found.tolist() == [False, True]
    assert result.matrix.tolist() == [[0, 0], [1, 1]]


def test_lookup_agrees_with_the_table_after_many_messages(center: str) -> None:
    table, window = EmbeddingTable(f"{center}/table"), f"{center}/window"
    lookup = EmbeddingLookup(Snapshot.open(f"{center}/snapshots/v1"), table=table, window=window)
    rng = np.random.default_rng(0)
    for step in range(60):
        ids = [f"i{number}" for number in rng.choice(40, 3, replace=False)] + ["a"]
        gone = (rng.random(4) < 0.2).tolist()
        append_segment(window, message(ids, step + 2, int(rng.integers(1, 9)), deleted=gone), encoder_version="v1")
        if step % 7 == 0:
            lookup.refresh()
        if step % 20 == 0:
            fold(window, table)
    lookup.refresh()
    fold(window, table)
    current = {row["item_id"]: row["embedding"][0] for row in table.current_rows("v1").to_pylist()}
    ids = [f"i{number}" for number in range(40)] + ["a", "b", "c"]
    for reader in (lookup, EmbeddingLookup(Snapshot.open(f"{center}/snapshots/v1"), table=table, window=window)):
        result = reader.get(ids)
        assert {
            key: float(row[0]) for key, row, there in zip(ids, result.matrix, result.found, strict=True) if there
        } == (current)
        assert reader.overlay.num_rows <= 4 * 60


def test_the_parameter_store_sees_new_items_by_itself_and_switches_snapshots(center: str) -> None:
    table, window, snapshot = f"{center}/table", f"{center}/window", f"{center}/snapshots/v1"
    store = ParameterStore(snapshot, table=table, window=window, encoder_version="v1")
    assert (store.width, store.encoder_version) == (2, "v1")
    store.start(every_s=0.02)
    append_segment(window, message(["new"], 8, 9, categories=["bags"]), encoder_version="v1")
    deadline = time.monotonic() + 5
    while not store.multi_get(["new"])[1][0]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    fold(window, EmbeddingTable(table), keep_s=0)
    build_snapshot(EmbeddingTable(table), "v1", snapshot)
    store.load(snapshot)
    matrix, found, category = store.multi_get(["a", "new", "nobody"])
    store.stop()
    assert found.tolist() == [True, True, False]
    assert matrix[:, 0].tolist() == [1, 8, 0]
    assert category.to_pylist() == [None, "bags", None]
    assert store.num_overlay_rows == 0
    with pytest.raises(VersionMismatchError, match=r"v2.*v1"):
        ParameterStore(snapshot, encoder_version="v2")
