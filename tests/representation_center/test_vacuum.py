"""mim_ray/representation_center/vacuum.py, maintenance.py and jobs/maintain.py."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mim_ray.errors import ArtifactError
from mim_ray.pipeline import maintain as job
from mim_ray.representation_center import log_state, window_folder
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.compaction import compact
from mim_ray.representation_center.data_files import write_fragment
from mim_ray.representation_center.maintenance import maintain
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import append_segment, fold, list_segments, segment_rows
from mim_ray.representation_center.vacuum import Vacuumed, vacuum, vacuum_window

HOUR, WEEK = timedelta(hours=1), timedelta(days=7)
START = datetime(2025, 1, 1, tzinfo=UTC)


def rows(ids: list[str], value: float, day: int = 1, deleted: bool = False) -> pa.Table:
    return segment_rows(
        ids,
        np.full((len(ids), 2), value, np.float32),
        content_hashes=[f"hash-{value}"] * len(ids),
        content_at=[START + timedelta(days=day)] * len(ids),
        deleted=[deleted] * len(ids),
    )


def age(path: str | Path, by: timedelta) -> None:
    at = time.time() - by.total_seconds()
    os.utime(path, (at, at))


def files(table: EmbeddingTable) -> set[str]:
    return {path.name for path in Path(table.uri).rglob("*.parquet") if "_delta_log" not in path.parts}


def current(table: EmbeddingTable) -> dict[str, float]:
    return {row["item_id"]: row["embedding"][0] for row in table.current_rows("v1").to_pylist()}


@pytest.fixture
def table(tmp_path: Path) -> EmbeddingTable:
    table = EmbeddingTable(f"{tmp_path}/center/table").create()
    for step in range(6):
        table.append(rows([f"i{step}", "all"], step), encoder_version="v1", shard_id=f"s{step}")
    return table


def test_vacuum_deletes_only_what_is_old_and_named_by_nobody(table: EmbeddingTable) -> None:
    replaced = files(table)
    assert compact(table, "v1").num_merges == 1
    young = write_fragment(table.uri, rows(["x"], 1), encoder_version="v1", shard_id="in flight")
    old = write_fragment(table.uri, rows(["y"], 1), encoder_version="v1", shard_id="dead")
    folder = Path(table.uri) / "encoder_version=v1"
    for name in (".tmp-dead", "notes.txt"):
        (folder / name).write_text("x")
    for path in folder.iterdir():
        if young.path.rpartition("/")[2] != path.name:
            age(path, 2 * HOUR)
    expected = files(table) - {Path(old.path).name}
    assert vacuum(table, retention=HOUR, dry_run=True).num_files == 2
    assert files(table) != expected
    assert vacuum(table, retention=HOUR).num_files == 2  # the dead worker's file and the half-written one
    assert files(table) == expected
    assert replaced < expected  # replaced just now: a reader may have begun before
    assert (folder / "notes.txt").exists()
    table.commit([young])
    assert EmbeddingTable(table.uri).committed_shards("v1") == {"in flight", *[f"s{step}" for step in range(6)]}
    assert current(table) == {"all": 5, "x": 1} | {f"i{step}": step for step in range(6)}


def test_replaced_files_go_after_the_retention(table: EmbeddingTable, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = files(table)
    for name in replaced:
        age(f"{table.uri}/encoder_version=v1/{name}", WEEK)
    past = time.time() - 26 * 3600
    with monkeypatch.context() as patch:
        patch.setattr(log_state.time, "time", lambda: past)
        compact(table, "v1")
    assert vacuum(table, retention=27 * HOUR).num_files == 0
    assert vacuum(table, retention=25 * HOUR).num_files == len(replaced)
    assert files(table) & replaced == set()
    assert len(current(table)) == 7
    assert vacuum(EmbeddingTable(table.uri), retention=25 * HOUR) == Vacuumed()


def test_a_file_committed_at_the_last_moment_stays(table: EmbeddingTable, monkeypatch: pytest.MonkeyPatch) -> None:
    late = write_fragment(table.uri, rows(["x"], 1), encoder_version="v1", shard_id="slow")
    age(f"{table.uri}/{late.path}", 2 * HOUR)  # a write that took longer than the retention
    listed = EmbeddingTable.files

    def just_then(self: EmbeddingTable) -> object:
        EmbeddingTable(table.uri).commit([late])
        return listed(self)

    monkeypatch.setattr(EmbeddingTable, "files", just_then)
    assert vacuum(table, retention=HOUR).num_files == 0
    monkeypatch.undo()
    assert current(table)["x"] == 1


def test_a_retention_that_endangers_writers_is_refused(table: EmbeddingTable) -> None:
    with pytest.raises(ArtifactError, match="longer than the longest job"):
        vacuum(table, retention=timedelta(minutes=59))


def test_the_delta_log_is_cleaned_and_open_tables_follow_all_the_same(table: EmbeddingTable) -> None:
    follower = EmbeddingTable(table.uri)
    assert follower.version == 6
    for step in range(6, 12):
        table.append(rows([f"i{step}"], step), encoder_version="v1", shard_id=f"s{step}")
    log = Path(table.uri) / "_delta_log"
    for path in log.iterdir():
        age(path, 2 * WEEK)
    assert vacuum(table, retention=WEEK).num_log_files > 5
    table.append(rows(["last"], 1), encoder_version="v1", shard_id="last")
    assert follower.committed_shards("v1") == {"last", *[f"s{step}" for step in range(12)]}
    assert follower.append(rows(["more"], 1), encoder_version="v1") == table.version


def test_a_table_made_anew_in_the_same_place_is_noticed(table: EmbeddingTable) -> None:
    import shutil

    shutil.rmtree(table.uri)
    assert not table.exists()
    with pytest.raises(ArtifactError, match="no Delta table"):
        table.files()
    table.create()
    assert table.files() == []
    for step in range(12):
        EmbeddingTable(table.uri).append(rows(["a"], step), encoder_version="v9", shard_id=f"n{step}")
    assert table.committed_shards("v9") == {f"n{step}" for step in range(12)}
    assert table.committed_shards("v1") == set()


def test_half_written_segments_go_and_whole_ones_stay(tmp_path: Path) -> None:
    window = str(tmp_path / "window")
    assert vacuum_window(window, retention=HOUR) == 0
    name = append_segment(window, rows(["a"], 1), encoder_version="v1")
    folder = Path(window_folder.segment_uri(window, "v1", name)).parent
    for number, by in enumerate((2 * HOUR, timedelta(0))):
        (folder / f".tmp-{number}").write_text("x")
        age(folder / f".tmp-{number}", by)
    age(window_folder.segment_uri(window, "v1", name), WEEK)
    assert vacuum_window(window, retention=HOUR) == 1
    assert list_segments(window, "v1") == [name]


def test_a_round_does_it_all_and_spares_the_snapshots_readers(table: EmbeddingTable) -> None:
    center = table.uri.removesuffix("/table")
    line = f"{center}/snapshots/v1"
    build_snapshot(table, "v1", line)
    table.append(rows(["i0", "i1"], 0, day=3, deleted=True), encoder_version="v1")
    for step in range(4):
        append_segment(f"{center}/window", rows([f"n{step}"], step), encoder_version="v1")
        fold(f"{center}/window", table, keep_s=0)
    append_segment(f"{center}/window", rows(["unfolded"], 7), encoder_version="v1")
    options = {"retention": WEEK, "deleted_retention": timedelta(days=30), "purge_every": timedelta(0)}
    done = maintain(center, **options)
    assert (done.folded.num_rows, done.compacted.num_merges, done.purged.num_purged) == (1, 2, 0)
    assert (done.num_files, done.num_rows) == (2, 14)
    newer = table.current_rows("v1", newer_than=Snapshot.open(line).delta_version, deleted=True)
    assert sorted(newer["item_id"].to_pylist()) == ["i0", "i1", "n0", "n1", "n2", "n3", "unfolded"]
    later = datetime.now(UTC) + timedelta(days=60)
    assert maintain(center, **options, now=later).purged.num_purged == 0  # the snapshot still shows them
    build_snapshot(table, "v1", line, keep=1)
    assert maintain(center, **options, now=later).purged.num_purged == 2
    assert "i0" not in pa.concat_tables([file.read() for file in table.files()])["item_id"].to_pylist()
    assert set(current(table)) == {"all", "unfolded", *[f"i{n}" for n in range(2, 6)], *[f"n{n}" for n in range(4)]}
    forever = options | {"deleted_retention": None}
    assert maintain(center, **forever).purged.num_merges == 0


def test_a_damaged_message_is_told_when_all_else_is_done(table: EmbeddingTable) -> None:
    center = table.uri.removesuffix("/table")
    bad = append_segment(f"{center}/window", rows(["bad"], 1), encoder_version="v1")
    Path(window_folder.segment_uri(f"{center}/window", "v1", bad)).write_bytes(b"no arrow")
    append_segment(f"{center}/window", rows(["good"], 2), encoder_version="v1")
    with pytest.raises(ArtifactError, match=bad):
        maintain(center, retention=WEEK, deleted_retention=None, purge_every=HOUR)
    assert current(table)["good"] == 2
    assert len(table.files()) == 1


def test_the_job_tells_what_it_did(table: EmbeddingTable, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    job.main("doc", [f"run.root={tmp_path}"])
    out = capsys.readouterr().out
    assert "compacted  6 files into 1, 12 rows into 7" in out
    assert "log now    1 files, 7 rows" in out
    with pytest.raises(SystemExit) as left:
        job.main("doc", [f"run.root={tmp_path}/none"])
    assert left.value.code == 2
    assert "Run the extraction first" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        job.main("doc", ["--every", "soon"])
    assert "--every soon is no duration" in capsys.readouterr().err
