"""Impressions become indices into the batch's items, with content joined late."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mim_ray.ciubm import train
from mim_ray.ciubm.dataset import Content, ImpressionEncoder, count_input, gather_batch
from mim_ray.ciubm.model import CtrNetwork
from mim_ray.ciubm.tables import IdTables
from mim_ray.ciubm.vocabulary import ItemIndex, Vocabulary
from mim_ray.ciubm.vocabulary_build import build_vocabularies
from mim_ray.config import Scenario
from mim_ray.representation_center.snapshot import Snapshot


@pytest.fixture
def items() -> ItemIndex:
    """a and b have embeddings of their own, c was met too seldom; c has no category."""
    ids = pa.array(["a", "b", "c"])
    return ItemIndex.build(ids, np.array([0, 1, -1]), ["red", "blue"], np.array([5, 2, 1]), min_count=2)


def _rows(users: list[Any], targets: list[Any], behaviors: list[Any]) -> pa.Table:
    columns = {"user_id": pa.array(users, pa.string()), "item_id": pa.array(targets, pa.string())}
    columns["behaviors"] = pa.array(behaviors, pa.list_(pa.string()))
    columns["label"] = pa.array([1] * len(users), pa.int8())
    return pa.table(columns)


def _decoded(encoder: ImpressionEncoder, table: pa.Table) -> tuple[list[int], list[list[int]]]:
    batch = encoder.encode(table)
    rows = [
        batch.item_row[place[mask]].tolist() for place, mask in zip(batch.behaviors, batch.behavior_mask, strict=True)
    ]
    return batch.item_row[batch.target].tolist(), rows


def test_rows_are_those_of_the_ids_and_unknown_is_zero(items: ItemIndex) -> None:
    encoder = ImpressionEncoder(items, Vocabulary(pa.array(["u"])), None, 10)
    table = _rows(["u", "stranger", None], ["a", "c", "new"], [["b", "a", "b"], [], None])
    targets, behaviors = _decoded(encoder, table)
    assert targets == [1, 0, 0]
    assert behaviors == [[2, 1, 2], [], []]
    batch = encoder.encode(table)
    assert batch.item_row.tolist() == sorted(batch.item_row.tolist())
    assert batch.user.tolist() == [1, 0, 0]
    assert batch.category[batch.target].tolist() == [1, 0, 0]
    assert batch.label is not None
    assert batch.label.tolist() == [1, 1, 1]


def test_the_newest_behaviors_are_kept_also_in_a_slice(items: ItemIndex) -> None:
    encoder = ImpressionEncoder(items, Vocabulary(pa.array(["u"])), None, 2)
    table = _rows(["u"] * 3, ["a", "b", "a"], [["b", "b"], ["b", "b", "a"], ["a"]])
    _, behaviors = _decoded(encoder, table.slice(1))
    assert behaviors == [[2, 1], [1]]


def test_dropped_targets_keep_category_and_content(items: ItemIndex, small_shop: Any) -> None:
    snapshot = Snapshot.open(small_shop.snapshot)
    ids = snapshot.ids.cast(pa.string())
    index = ItemIndex.build(ids, np.zeros(len(ids), np.int64), ["all"], np.full(len(ids), 9), min_count=1)
    encoder = ImpressionEncoder(index, Vocabulary(pa.array(["u"])), Content(snapshot, index), 5)
    chosen = ids.to_pylist()[:8]
    table = _rows(["u"] * 8, chosen, [[chosen[0]]] * 8)
    kept = encoder.encode(table)
    dropped = encoder.encode(table, id_dropout=1.0, generator=np.random.default_rng(0))
    assert dropped.item_row[dropped.target].tolist() == [0] * 8
    assert dropped.user.tolist() == [0] * 8
    assert dropped.mm is not None
    assert kept.mm is not None
    assert torch.equal(dropped.mm[dropped.target], kept.mm[kept.target])
    assert torch.equal(dropped.category[dropped.target], kept.category[kept.target])
    assert torch.equal(dropped.item_row[dropped.behaviors], kept.item_row[kept.behaviors])
    assert np.array_equal(kept.mm[kept.target].numpy(), snapshot.gather(snapshot.lookup(chosen)))


def test_unknown_categories_are_not_the_same(items: ItemIndex) -> None:
    encoder = ImpressionEncoder(items, Vocabulary(pa.array(["u"])), None, 10)
    batch = encoder.encode(_rows(["u", "u"], ["c", "b"], [["c", "new"], ["b", "a"]]))
    tables = IdTables.create({"item": items.num_table_rows, "category": items.num_category_rows}, 4, seed=0)
    embedded = gather_batch(batch, tables)
    assert embedded.same_category.tolist() == [[False, False], [True, False]]
    assert embedded.user is None
    expected = torch.cat([tables["item"].weight[2], tables["category"].weight[2]])
    assert torch.equal(embedded.target[1], expected)
    assert torch.equal(embedded.behaviors[1, 0], expected)


def test_vocabularies_survive_a_file(items: ItemIndex, tmp_path: Any) -> None:
    items.save(str(tmp_path))
    again = ItemIndex.load(str(tmp_path))
    assert again.vocabulary.encode(["c", "a", "zz"]).tolist() == [3, 1, 0]
    assert np.array_equal(again.table_row, items.table_row)
    assert np.array_equal(again.category, items.category)
    assert list(again.categories) == ["red", "blue"]


def test_unknown_ids_and_missing_content_are_counted(small_shop: Any) -> None:
    items = build_vocabularies(small_shop.samples, min_item_count=1).items
    content = Content(Snapshot.open(small_shop.snapshot), items)
    rows = pa.table(
        {
            "user_id": ["user-1", None, "nobody"],
            "item_id": ["item-59", "unheard-of", "item-3"],  # item-59 has no content
            "behaviors": pa.array([["item-1", "gone", None], ["item-59"], None], pa.list_(pa.string())),
        }
    )
    encoder = ImpressionEncoder(items, Vocabulary(pa.array(["user-1"])), content, 8)
    batch = encoder.encode(rows, id_dropout=1.0, generator=np.random.default_rng(0))
    assert count_input(batch) == {
        "targets": 3,
        "unknown_targets": 1,
        "targets_without_content": 1,
        "behaviors": 4,
        "unknown_behaviors": 2,
        "behaviors_without_content": 1,
    }
    tables = IdTables.create({"item": items.num_table_rows, "category": items.num_category_rows, "user": 2}, 4, seed=0)
    config = train.network_config(Scenario.model_validate({"ciubm": {"id_dim": 4}}).ciubm, "sim", content.width)
    assert CtrNetwork(config)(gather_batch(batch, tables)).isfinite().all()
