"""Batches are a function of (seed, epoch, step, rank, world) and miss no row that they should not."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from mim_ray.data import batches
from mim_ray.data.batches import RowBatches, ordered_batches, prefetch
from mim_ray.errors import DataError


@pytest.fixture
def split(tmp_path):
    """Two files, 10,000 rows in row groups of 3,000 and 500."""
    start = 0
    for number, (num_rows, group) in enumerate(((7_000, 3_000), (3_000, 500))):
        rows = np.arange(start, start + num_rows)
        table = pa.table({"row": rows, "text": [f"t{row}" for row in rows]})
        pq.write_table(table, tmp_path / f"part-{number}.parquet", row_group_size=group)
        start += num_rows
    return str(tmp_path)


def rows_of(tables):
    return [table.column("row").to_pylist() for table in tables]


def test_same_arguments_give_the_same_batches_and_others_do_not(split):
    first = rows_of(RowBatches(split, ["row"], 256, seed=1).epoch(0))
    assert first == rows_of(RowBatches(split, ["row"], 256, seed=1).epoch(0))
    assert first != rows_of(RowBatches(split, ["row"], 256, seed=2).epoch(0))
    assert first != rows_of(RowBatches(split, ["row"], 256, seed=1).epoch(1))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_have_equal_steps_and_share_the_rows_without_overlap(split, world):
    ranks = [RowBatches(split, ["row"], 256, seed=5, rank=rank, world=world) for rank in range(world)]
    seen = []
    for rank in ranks:
        tables = rows_of(rank.epoch(3))
        assert len(tables) == rank.steps_per_epoch == 10_000 // world // 256
        assert all(len(rows) == 256 for rows in tables)
        seen += [row for rows in tables for row in rows]
    assert len(seen) == len(set(seen))
    assert len(seen) > 10_000 - 256 * world - world


def test_rows_left_out_differ_between_epochs(split):
    batches_ = RowBatches(split, ["row"], 999, seed=0)
    left = [set(range(10_000)) - {r for rows in rows_of(batches_.epoch(e)) for r in rows} for e in range(2)]
    assert len(left[0]) == len(left[1]) == 10_000 % 999
    assert left[0] != left[1]


@pytest.mark.parametrize("start", [0, 1, 7, 30])
def test_starting_at_a_step_equals_skipping_to_it(split, start, monkeypatch):
    monkeypatch.setattr(batches, "_WINDOW_ROWS", 4_000)
    every = RowBatches(split, None, 128, seed=9, rank=1, world=2)
    assert rows_of(every.epoch(2))[start:] == rows_of(every.epoch(2, start))


def test_skipped_windows_are_not_read(split, monkeypatch):
    monkeypatch.setattr(batches, "_WINDOW_ROWS", 2_048)
    read = []
    original = RowBatches._read
    monkeypatch.setattr(
        RowBatches, "_read", lambda self, unit, groups: read.append(unit) or original(self, unit, groups)
    )
    every = RowBatches(split, ["row"], 1_000, seed=0)
    list(every.epoch(0, start_step=9))
    assert sum(unit.num_rows for unit in read) < 4_000


def test_a_window_is_prepared_once_and_its_row_groups_are_read_once(split, monkeypatch):
    prepared, read = [], []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, **kwargs: read.append(group) or original(self, group, **kwargs),
    )

    def numbered(table):
        prepared.append(len(table))
        return table.append_column("prepared", pc.add(table["row"], 1))

    plain = rows_of(RowBatches(split, ["row"], 256, seed=1).epoch(0))
    read.clear()
    found = list(RowBatches(split, ["row"], 256, seed=1, prepare=numbered).epoch(0))
    assert prepared == [10_000]
    assert len(read) == 9  # 3 row groups of up to 3,000 rows and 6 of 500
    assert rows_of(found) == plain
    assert all(table["prepared"].to_pylist() == [row + 1 for row in table["row"].to_pylist()] for table in found)


def test_steps_run_over_epochs_and_resume_anywhere(split):
    rows = RowBatches(split, ["row"], 2_500, seed=3)
    assert rows.steps_per_epoch == 4
    run = rows_of(rows.steps(10))
    assert len(run) == 10
    assert run[4:8] == rows_of(rows.epoch(1))
    assert run[6:] == rows_of(rows.steps(10, start_step=6))


def test_a_batch_mixes_row_groups(split):
    batch = rows_of(RowBatches(split, ["row"], 512, seed=0).epoch(0))[0]
    assert max(batch) - min(batch) > 5_000


def test_small_splits_give_smaller_batches_never_none(tmp_path):
    pq.write_table(pa.table({"row": np.arange(5)}), tmp_path / "a.parquet")
    ranks = [RowBatches(str(tmp_path), None, 64, seed=0, rank=rank, world=2) for rank in range(2)]
    assert [rank.steps_per_epoch for rank in ranks] == [1, 1]
    assert [len(rows_of(rank.epoch(0))[0]) for rank in ranks] == [2, 2]
    ranks = [RowBatches(str(tmp_path), None, 64, seed=0, rank=rank, world=8) for rank in range(8)]
    assert [len(rows_of(rank.steps(3))) for rank in ranks] == [3] * 8


def test_an_empty_split_says_so(tmp_path):
    pq.write_table(pa.table({"row": pa.array([], pa.int64())}), tmp_path / "a.parquet")
    empty = RowBatches(str(tmp_path), None, 64, seed=0)
    assert empty.steps_per_epoch == 0
    with pytest.raises(DataError, match="no rows to train on"):
        list(empty.steps(1))
    with pytest.raises(DataError, match="no Parquet file"):
        RowBatches(str(tmp_path / "nothing"), None, 64, seed=0)


@pytest.mark.parametrize("size", [1_000, 3_333, 100_000])
def test_prediction_sees_every_row_in_order(split, size):
    tables = rows_of(ordered_batches(split, ["row"], size))
    assert [row for rows in tables for row in rows] == list(range(10_000))
    assert all(len(rows) == min(size, 10_000) for rows in tables[:-1])
    assert batches.num_rows(split) == 10_000


def test_prefetch_raises_the_producers_error_and_stops_with_the_consumer():
    def failing():
        yield 1
        raise DataError("broken row")

    items = prefetch(failing())
    assert next(items) == 1
    with pytest.raises(DataError, match="broken row"):
        next(items)
    made = []
    endless = prefetch(made.append(i) or i for i in range(10**9))
    assert next(endless) == 0
    endless.close()
    assert len(made) < 20
