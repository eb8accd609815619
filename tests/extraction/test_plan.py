"""mim_ray/extraction/plan.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mim_ray.extraction import plan as plan_module
from mim_ray.extraction.plan import Unit, plan, without


def ids_of(units: list[Unit]) -> list[str]:
    return [piece.shard_id for unit in units for piece in unit.slices]


def test_shards_cover_every_row_once_and_are_the_same_each_time(tmp_path: Path, make_items: Callable[..., str]) -> None:
    uri = make_items(tmp_path / "a")
    units = plan(uri, 16, ["v1"])
    assert ids_of(units) == ids_of(plan(uri, 16, ["v1"]))
    assert len(set(ids_of(units))) == len(ids_of(units))
    assert sum(unit.num_rows for unit in units) == 100
    for unit in units:
        edges = [piece.start for piece in unit.slices] + [unit.slices[-1].stop]
        assert edges[0] == 0
        assert edges[-1] == unit.shard.num_rows
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
    monkeypatch.setattr(plan_module, "HASHES_AT_ONCE", at_once)
    replaced = {5: "item-90", 91: "item-90", 30: "item-2", 60: None, 61: None, 62: "", 99: "item-98"}
    units = plan(make_items(tmp_path, item_id=replaced), 16, ["v1"])
    found = [unit.shard.first_row + row for unit in units for row in unit.duplicates]
    assert found == [30, 90, 91, 99]  # row 5 is the first with item-90; rows without an id are no duplicates


def test_finished_shards_are_left_out(tmp_path: Path, make_items: Callable[..., str]) -> None:
    units = plan(make_items(tmp_path), 16, ["v1"])
    everything = ids_of(units)
    assert ids_of(without(units, set(everything[:4]))) == everything[4:]
    assert without(units, set(everything)) == []
