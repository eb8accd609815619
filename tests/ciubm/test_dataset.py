"""Impressions become indices into the batch's items, with content joined late."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mim_ray.ciubm.dataset import Content, ImpressionEncoder, count_input, gather_batch
from mim_ray.ciubm.model import CtrNetwork
from mim_ray.ciubm.recipe import network_config
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


@pytest.mark.parametrize("hash_rows", [None, 7])
def test_a_batch_of_a_coded_window_says_of_each_place_what_its_id_says(small_shop: Any, hash_rows: int | None) -> None:
    snapshot = Snapshot.open(small_shop.snapshot)
    ids = pa.array([*snapshot.ids.to_pylist()[:30], "without-content"])
    codes, counts = np.arange(31) % 4 - 1, np.arange(31) % 3
    items = ItemIndex.build(ids, codes, ["x", "y", "z"], counts, min_count=1, hash_rows=hash_rows)
    content = Content(snapshot, items)
    encoder = ImpressionEncoder(items, Vocabulary(pa.array(["u", "v"])), content, 4)
    generator = np.random.default_rng(0)
    known: list[Any] = [*ids.to_pylist(), "new", "newer", None]
    names = [known[place] for place in generator.integers(0, len(known), 40)]
    lists: list[Any] = [[known[place] for place in generator.integers(0, len(known), size)] for size in range(39)]
    window = _rows(["u", "v", None, "w"] * 10, names, [*lists, None])
    chosen = generator.permutation(40)[:16]
    table, coded = window.take(pa.array(chosen)), encoder.coded(window).take(pa.array(chosen))
    batch, of_coded = encoder.encode(table), encoder.encode(coded)
    for name, values in vars(batch).items():
        assert values is None or torch.equal(values, getattr(of_coded, name)), name

    position = {name: place for place, name in enumerate(ids.to_pylist(), start=1)}

    def expected(name: str | None) -> tuple[Any, ...]:
        at = position.get(name, 0)
        row = int(items.table_row[at]) if hash_rows is None else int(items.rows([name], np.array([at]))[0])
        return row, int(items.category[at]), snapshot.gather(snapshot.lookup([name]))[0].tolist(), at > 0

    def found(place: int) -> tuple[Any, ...]:
        assert batch.mm is not None
        assert batch.known is not None
        mm = batch.mm[place].tolist()
        return int(batch.item_row[place]), int(batch.category[place]), mm, bool(batch.known[place])

    assert batch.user.tolist() == [{"u": 1, "v": 2}.get(name, 0) for name in table["user_id"].to_pylist()]
    for row, of_row in enumerate(table.to_pylist()):
        behaviors = (of_row["behaviors"] or [])[-4:]
        assert batch.behavior_mask[row].tolist() == [place < len(behaviors) for place in range(4)]
        assert found(int(batch.target[row])) == expected(of_row["item_id"])
        assert [found(int(place)) for place in batch.behaviors[row, : len(behaviors)]] == [
            expected(b) for b in behaviors
        ]
    places = torch.cat([batch.target, batch.behaviors[batch.behavior_mask]])
    assert places.unique().tolist() == list(range(len(batch.item_row)))  # nothing that no impression shows
    assert batch.item_row.tolist() == sorted(batch.item_row.tolist())


def test_a_batch_may_be_empty(items: ItemIndex) -> None:
    encoder = ImpressionEncoder(items, Vocabulary(pa.array(["u"])), None, 10)
    batch = encoder.encode(_rows(["u"], ["a"], [["b"]]).slice(0, 0))
    tables = IdTables.create({"item": items.num_table_rows, "category": items.num_category_rows}, 4, seed=0)
    assert len(batch) == 0
    assert gather_batch(batch, tables).behaviors.shape == (0, 1, 8)


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
    config = network_config(Scenario.model_validate({"ciubm": {"id_dim": 4}}).ciubm, "sim", content.width)
    assert CtrNetwork(config)(gather_batch(batch, tables)).isfinite().all()
