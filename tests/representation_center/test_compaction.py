"""mim_ray/representation_center/compaction.py and compacted_files.py."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable

from mim_ray.data.schema import TIME
from mim_ray.representation_center import compacted_files, compaction, log_state
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.compaction import Compacted, compact, plan, purge
from mim_ray.representation_center.data_files import DataFile, Fragment, write_fragment
from mim_ray.representation_center.lookup import EmbeddingLookup
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.snapshot_line import list_snapshots
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import WINDOW_SCHEMA, append_segment, fold

DAY = 86_400_000_000
NOW = datetime(1970, 3, 1, tzinfo=UTC)


def rows(
    ids: Sequence[str], value: float, days: Sequence[int | None], deleted: Sequence[bool] | None = None
) -> pa.Table:
    return pa.table(
        {
            "item_id": pa.array(ids, pa.string()),
            "embedding": pa.array([[value, 1.0]] * len(ids), pa.list_(pa.float32())),
            "content_hash": [f"hash-{value}"] * len(ids),
            "content_at": pa.array([None if day is None else day * DAY for day in days], TIME),
            "deleted": [False] * len(ids) if deleted is None else list(deleted),
        }
    )


def random_rows(rng: np.random.Generator, step: int, num: int, items: int = 60) -> pa.Table:
    ids = [f"i{number}" for number in rng.choice(items, num, replace=False)]
    days = [None if day == 0 else int(day) for day in rng.integers(0, 4, num)]
    return rows(ids, float(step), days, (rng.random(num) < 0.2).tolist())


def state(table: EmbeddingTable, version: str = "v1") -> list[tuple[object, ...]]:
    """The current row of each item, deletions too."""
    names = ["item_id", "embedding", "content_hash", "content_at", "deleted", "origin", "shard_id"]
    current = table.current_rows(version, deleted=True).select(names).to_pylist()
    return sorted(tuple(map(str, row.values())) for row in current)


def all_rows(table: EmbeddingTable, version: str = "v1") -> pa.Table:
    return pa.concat_tables([file.read() for file in table.scan(version)[1]])


@pytest.fixture
def table(tmp_path: Path) -> EmbeddingTable:
    return EmbeddingTable(str(tmp_path / "table")).create()


def fake_files(sizes: Sequence[int]) -> list[DataFile]:
    return [
        DataFile("t", f"batch-{number:06d}-x.parquet", 1_000 * size, size, "v1", number, 0, None)
        for number, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("rows_in_memory", [10, 10**6])
def test_compaction_changes_no_current_row_and_forgets_no_shard(table: EmbeddingTable, rows_in_memory: int) -> None:
    rng = np.random.default_rng(3)
    shards = set()
    for step in range(60):
        if step % 7 == 0:
            table.append(random_rows(rng, step, 10), encoder_version="v2")
        origin = "realtime" if step % 3 == 0 else "batch"
        shard = f"{step:020d}-0123abcd" if origin == "realtime" else f"s{step}"
        table.append(
            random_rows(rng, step, int(rng.integers(0, 20))), encoder_version="v1", shard_id=shard, origin=origin
        )
        shards.add(shard)
        if step % 13 == 12:
            before, other, num_rows = state(table), table.scan("v2")[1], all_rows(table).num_rows
            done = compact(table, "v1", rows_in_memory=rows_in_memory)
            assert done.num_merges >= 1
            assert not done.lost
            assert state(table) == before
            assert table.scan("v2")[1] == other
            fresh = EmbeddingTable(table.uri)
            assert fresh.contains("v1", shards | {"s99", f"{99:020d}-0123abcd"}) == shards
            assert table.contains("v1", shards) == shards
            assert fresh.committed_shards("v1") == {shard for shard in shards if shard.startswith("s")}
            assert all_rows(table).num_rows == num_rows - done.num_rows_read + done.num_rows_written
    items = all_rows(table)["item_id"].to_pylist()
    assert len(items) < 180
    compact(table, "v1")
    assert compact(table, "v1") == Compacted()


def test_what_is_not_in_the_range_keeps_its_place(table: EmbeddingTable) -> None:
    table.append(rows([f"i{n}" for n in range(50)], 1, [2] * 50), encoder_version="v1")  # large: stays as it is
    for value in (2, 3, 4, 5):
        table.append(rows(["i1"], value, [2]), encoder_version="v1")  # merged: the last of equal times
    table.append(rows([f"i{n}" for n in range(1, 60)], 6, [1] * 59), encoder_version="v1")  # later, but older content
    assert compact(table, "v1").num_rows_read == 4
    current = {row["item_id"]: row["embedding"][0] for row in table.current_rows("v1").to_pylist()}
    assert (current["i0"], current["i1"], current["i2"], current["i55"]) == (1, 5, 1, 6)
    assert sorted({file.commit_version for file in table.scan("v1")[1]}) == [1, 5, 6]


def test_a_small_change_does_not_rewrite_the_log() -> None:
    sizes = [100_000, *[100] * 50]
    chosen = plan(fake_files(sizes))
    assert [len(part) for part in chosen] == [50]
    assert all(file.num_rows == 100 for part in chosen for file in part)


def test_ranges_are_contiguous_and_no_run_in_one_is_larger_than_the_others() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        files = fake_files((10 ** rng.uniform(0, 5, int(rng.integers(1, 60)))).astype(int).tolist())
        keep_apart = rng.choice(60, 2).tolist()
        for part in plan(files, keep_apart=keep_apart):
            versions = [file.commit_version for file in part]
            weights = [file.num_rows + 1 for file in part]
            assert versions == list(range(versions[0], versions[-1] + 1))
            assert len(part) >= 4
            assert 2 * max(weights) <= sum(weights)
            assert not any(versions[0] <= border < versions[-1] for border in keep_apart)


def test_a_row_is_rewritten_a_logarithmic_number_of_times_and_few_files_remain() -> None:
    rng = np.random.default_rng(1)
    for sizes in ([10] * 3_000, (10 ** rng.uniform(0, 4, 1_000)).astype(int).tolist()):
        runs: list[tuple[int, int]] = []  # (commit version, rows)
        rewritten, most = 0, 0
        for version, size in enumerate(sizes):
            runs.append((version, size))
            if version % 10 == 9:
                for part in plan([replace_run(number, rows) for number, rows in runs]):
                    total = sum(file.num_rows for file in part)
                    rewritten += total
                    covered = {file.commit_version for file in part}
                    runs = [run for run in runs if run[0] not in covered]
                    runs = sorted([*runs, (max(covered), total)])
                most = max(most, len(runs))
        assert rewritten <= sum(sizes) * np.log2(sum(sizes))
        assert most <= 60


def replace_run(version: int, num_rows: int) -> DataFile:
    return DataFile("t", f"f-{version:06d}.parquet", 1_000 * num_rows, num_rows, "v1", version, 0, None)


def test_one_commit_of_many_small_files_is_merged_once(table: EmbeddingTable) -> None:
    table.commit(
        [write_fragment(table.uri, rows([f"i{n}"], n, [1]), encoder_version="v1", shard_id=f"s{n}") for n in range(6)]
    )
    before = state(table)
    assert compact(table, "v1").num_files_written == 1
    assert state(table) == before
    assert compact(table, "v1") == Compacted()


def test_large_results_are_cut_into_files_that_stand_for_their_own_shards(
    table: EmbeddingTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compacted_files, "FILE_BYTES", 5_000)
    monkeypatch.setattr(compacted_files, "GROUP_ROWS", 16)
    for step in range(12):
        table.append(
            rows([f"i{step}-{n}" for n in range(20)], step, [1] * 20), encoder_version="v1", shard_id=f"s{step:02d}"
        )
    before = state(table)
    done = compact(table, "v1")
    assert done.num_files_written > 3
    assert state(table) == before
    marks = [sorted(table.marks_of(file).shards) for file in table.scan("v1")[1]]
    assert sorted(shard for part in marks for shard in part) == [f"s{step:02d}" for step in range(12)]
    assert max(map(len, marks)) < 12


def test_the_logs_statistics_stay_true_so_that_engines_may_skip_files(table: EmbeddingTable) -> None:
    for step in range(4):
        name = f"{step:020d}-0123abcd"
        table.append(rows([f"i{step}"], step, [1]), encoder_version="v1", shard_id=name, origin="realtime")
    assert compact(table, "v1", forget_segments_before=datetime.now(UTC) + timedelta(days=1)).num_merges == 1
    assert table.contains("v1", [f"{0:020d}-0123abcd"]) == set()
    dataset = DeltaTable(table.uri).to_pyarrow_dataset()
    assert dataset.to_table(filter=pc.field("shard_id") == f"{0:020d}-0123abcd").num_rows == 1


def test_marks_of_segments_are_kept_while_anybody_may_fold_them_again(table: EmbeddingTable) -> None:
    names = [f"{step:020d}-0123abcd" for step in range(8)]  # written in 1970 …
    for name in names:
        table.append(rows([name], 1, [1]), encoder_version="v1", shard_id=name, origin="realtime")  # … but folded now
    compact(table, "v1", forget_segments_before=datetime.now(UTC) - timedelta(days=1))
    assert table.contains("v1", names) == set(names)


def test_nothing_is_merged_across_the_version_of_a_snapshot(table: EmbeddingTable) -> None:
    for step in range(12):
        table.append(rows(["a", f"i{step}"], step, [1, 1]), encoder_version="v1")
    compact(table, "v1", keep_apart=[6])
    assert [file.commit_version for file in sorted(table.scan("v1")[1], key=lambda file: file.commit_version)] == [
        6,
        12,
    ]
    newer = table.current_rows("v1", newer_than=6)
    assert sorted(newer["item_id"].to_pylist()) == sorted(["a", *[f"i{step}" for step in range(6, 12)]])


def test_appends_and_another_compaction_meanwhile_lose_nothing(
    table: EmbeddingTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(5)
    for step in range(12):
        table.append(random_rows(rng, step, 10), encoder_version="v1", shard_id=f"s{step}")
    expected = []
    replace = EmbeddingTable.replace

    def late(self: EmbeddingTable, old: Sequence[DataFile], new: Sequence[Fragment], **options: int) -> int | None:
        """Everything is written: before the commit others come."""
        monkeypatch.setattr(EmbeddingTable, "replace", replace)
        other = EmbeddingTable(table.uri)
        assert compact(other, "v1").num_merges == 1
        other.append(rows(["late"], 9, [9]), encoder_version="v1", shard_id="late")
        expected.append(state(other))
        return replace(self, old, new, **options)

    monkeypatch.setattr(EmbeddingTable, "replace", late)
    done = compact(table, "v1")
    assert done.lost
    assert [state(table)] == expected
    assert table.committed_shards("v1") == {"late", *[f"s{step}" for step in range(12)]}


def test_writers_and_compactions_at_once_lose_and_double_nothing(table: EmbeddingTable) -> None:
    stop = threading.Event()
    errors: list[BaseException] = []

    def compacting() -> None:
        mine = EmbeddingTable(table.uri)
        try:
            while not stop.is_set():
                compact(mine, "v1", fan_in=3)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=compacting) for _ in range(2)]
    for thread in threads:
        thread.start()
    for step in range(40):
        table.append(rows([f"i{step}", "all"], step, [1, 1]), encoder_version="v1", shard_id=f"s{step}")
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    compact(table, "v1")
    current = {row["item_id"]: row["embedding"][0] for row in table.current_rows("v1").to_pylist()}
    assert current == {"all": 39} | {f"i{step}": step for step in range(40)}
    assert table.committed_shards("v1") == {f"s{step}" for step in range(40)}
    assert len(table.scan("v1")[1]) < 12


def test_a_compaction_that_fails_leaves_nothing_behind(table: EmbeddingTable, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(6):
        table.append(rows([f"i{step}"], step, [1]), encoder_version="v1")
    before, files = state(table), sorted(Path(table.uri).rglob("*.parquet"))

    def full(self: object, marks: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compaction.CompactedFiles, "account_for", full)
    with pytest.raises(OSError, match="No space"):
        compact(table, "v1")
    assert state(table) == before
    assert sorted(Path(table.uri).rglob("*.parquet")) == files


def at_time(monkeypatch: pytest.MonkeyPatch, at: datetime) -> None:
    """Commits from now on are of this time."""
    monkeypatch.setattr(log_state.time, "time", lambda: at.timestamp())


def purged_table(table: EmbeddingTable, monkeypatch: pytest.MonkeyPatch) -> EmbeddingTable:
    at_time(monkeypatch, NOW - timedelta(days=40))
    table.append(rows(["a", "b", "c"], 1, [1, 1, 1]), encoder_version="v1", shard_id="s1")
    table.append(rows(["a"], 2, [2]), encoder_version="v1", shard_id="s2")
    table.append(rows(["a", "x"], 0, [3, 3], [True, True]), encoder_version="v1", shard_id="s3")  # long ago
    at_time(monkeypatch, NOW - timedelta(days=9))
    table.append(rows(["b"], 0, [50], [True]), encoder_version="v1", shard_id="s4")  # NOW - 9 days
    return table


def test_purging_drops_old_deletions_and_all_that_they_hide(
    table: EmbeddingTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    purged_table(table, monkeypatch)
    options = {"before": NOW - timedelta(days=30), "committed_before": NOW - timedelta(days=7)}
    assert purge(table, "v1", **options, overdue_before=NOW - timedelta(days=90)) == Compacted()
    done = purge(table, "v1", **options)
    assert done.num_purged == 2
    assert sorted(all_rows(table)["item_id"].to_pylist()) == ["b", "c"]  # b: its deletion is not old enough
    assert table.current_rows("v1")["item_id"].to_pylist() == ["c"]
    assert table.committed_shards("v1") == {"s1", "s2", "s3", "s4"}
    assert purge(table, "v1", **options) == Compacted()


def test_purging_spares_what_a_snapshot_or_a_late_writer_may_need(
    table: EmbeddingTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    purged_table(table, monkeypatch)
    before = NOW - timedelta(days=30)
    assert purge(table, "v1", before=before, committed_before=NOW - timedelta(days=50)) == Compacted()
    assert purge(table, "v1", before=before, committed_before=NOW, until=2) == Compacted()
    assert compact(table, "v1").num_merges == 1  # the compacted file is as old as its newest row
    assert purge(table, "v1", before=before, committed_before=NOW - timedelta(days=10)) == Compacted()
    assert purge(table, "v1", before=before, committed_before=NOW - timedelta(days=8), until=3) == Compacted()
    assert purge(table, "v1", before=before, committed_before=NOW - timedelta(days=8), until=4).num_purged == 2


def test_a_log_of_deletions_only_can_be_purged_to_nothing(table: EmbeddingTable) -> None:
    table.append(rows(["a", "b"], 0, [1, None], [True, True]), encoder_version="v1", shard_id="s1")
    late = datetime.now(UTC) + timedelta(days=1)
    assert purge(table, "v1", before=late, committed_before=late).num_purged == 2
    assert all_rows(table).num_rows == 0
    assert table.committed_shards("v1") == {"s1"}


@pytest.mark.parametrize("apart", [True, False])
def test_lookups_that_follow_agree_with_the_log_through_folds_snapshots_and_compactions(
    tmp_path: Path, apart: bool
) -> None:
    rng = np.random.default_rng(int(apart))
    table, window, line = EmbeddingTable(f"{tmp_path}/table").create(), f"{tmp_path}/window", f"{tmp_path}/snapshots/v1"
    table.append(rows(["a", "b"], 1, [1, 1]), encoder_version="v1")
    build_snapshot(table, "v1", line)
    follower = EmbeddingLookup(Snapshot.open(line), table=table, window=window, table_every_s=0)
    for step in range(40):
        ids = [f"i{number}" for number in rng.choice(30, 3, replace=False)] + ["a"]
        data = rows(ids, step + 2, rng.integers(1, 6, 4).tolist(), (rng.random(4) < 0.2).tolist())
        if rng.random() < 0.5:
            message = data.append_column("category", pa.nulls(4, pa.string())).select(WINDOW_SCHEMA.names)
            append_segment(window, message.cast(WINDOW_SCHEMA), encoder_version="v1")
        else:
            table.append(data, encoder_version="v1")
        for chance, work in (
            (0.3, lambda: fold(window, table, keep_s=60 * float(rng.integers(2)))),
            (0.3, follower.refresh),
            (0.1, lambda: build_snapshot(table, "v1", line)),
            (0.3, lambda: compact(table, "v1", fan_in=2, keep_apart=versions(line) if apart else ())),
        ):
            if rng.random() < chance:
                work()
    fold(window, table)
    follower.refresh()
    current = {row["item_id"]: row["embedding"][0] for row in table.current_rows("v1").to_pylist()}
    ids = [*[f"i{number}" for number in range(30)], "a", "b"]
    for lookup in (follower, EmbeddingLookup(Snapshot.open(line), table=table, window=window)):
        found = lookup.get(ids)
        there = zip(ids, found.matrix[:, 0].tolist(), found.found, strict=True)
        assert {item: value for item, value, is_there in there if is_there} == current


def versions(line: str) -> list[int]:
    return [state.delta_version for state in list_snapshots(line)]
