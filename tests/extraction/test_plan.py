"""mim_ray/extraction/plan.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mim_ray.extraction import duplicates
from mim_ray.extraction.plan import Plan, plan


def ids_of(planned: Plan) -> list[str]:
    ids = [piece.shard_id for unit in planned.units(set()) for piece in unit.slices]
    assert ids == list(planned.shard_ids())
    return ids


def test_shards_cover_every_row_once_and_are_the_same_each_time(tmp_path: Path, make_items: Callable[..., str]) -> None:
    uri = make_items(tmp_path / "a")
    planned = plan(uri, 16, ["v1"])
    assert ids_of(planned) == ids_of(plan(uri, 16, ["v1"]))
    assert len(set(ids_of(planned))) == len(ids_of(planned)) == planned.num_shards
    assert sum(unit.rows.num_rows for unit in planned.units(set())) == planned.num_rows == 100
    for unit in planned.units(set()):
        edges = [piece.start for piece in unit.slices] + [unit.slices[-1].stop]
        assert edges[0] == 0
        assert edges[-1] == unit.rows.num_rows
        assert max(np.diff(edges)) <= 16


def test_a_copy_of_the_table_elsewhere_has_the_same_shards(tmp_path: Path, make_items: Callable[..., str]) -> None:
    first, second = make_items(tmp_path / "a"), make_items(tmp_path / "b")
    assert ids_of(plan(first, 16, ["v1"])) == ids_of(plan(second, 16, ["v1"]))


def test_changed_content_another_encoder_or_another_size_give_other_shards(
    tmp_path: Path, make_items: Callable[..., str]
) -> None:
    before = set(ids_of(plan(make_items(tmp_path / "a"), 16, ["v1"])))
    changed = ids_of(plan(make_items(tmp_path / "b", title={3: "another"}), 16, ["v1"]))
    assert 0 < len(before & set(changed)) < len(before)  # only the shards of the changed row group
    assert before.isdisjoint(ids_of(plan(str(tmp_path / "a" / "items.parquet"), 16, ["v2"])))
    assert before.isdisjoint(ids_of(plan(str(tmp_path / "a" / "items.parquet"), 17, ["v1"])))


@pytest.mark.parametrize("at_once", [10**9, 7])
def test_duplicates_are_all_rows_after_the_first(
    tmp_path: Path, make_items: Callable[..., str], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "HASHES_AT_ONCE", at_once)
    replaced = {5: "item-90", 91: "item-90", 30: "item-2", 60: None, 61: None, 62: "", 99: "item-98"}
    planned = plan(make_items(tmp_path, item_id=replaced), 16, ["v1"])
    found = [unit.rows.first_row + row for unit in planned.units(set()) for row in unit.duplicates]
    assert found == [30, 90, 91, 99]  # row 5 is the first with item-90; rows without an id are no duplicates


def test_finished_shards_are_left_out(tmp_path: Path, make_items: Callable[..., str]) -> None:
    planned = plan(make_items(tmp_path), 16, ["v1"])
    everything = ids_of(planned)
    done = {*everything[:4], everything[-1], "another table's"}
    left = [piece.shard_id for unit in planned.units(done) for piece in unit.slices]
    assert left == everything[4:-1]
    assert planned.count(done) == (5, 4 * 16 - 8 + 4)
    assert list(planned.units(set(everything))) == []


def test_what_the_plan_keeps_is_small_whatever_the_rows_hold(tmp_path: Path, make_items: Callable[..., str]) -> None:
    planned = plan(make_items(tmp_path, num=200, row_group_rows=10, files=2), 10, ["v1"])
    assert len(planned.groups) == 20
    assert planned.groups.nbytes <= 40 * 20
    assert len(planned.files) == 2
