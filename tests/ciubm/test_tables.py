"""ID tables: only met rows move, as torch's SparseAdam moves them."""

from __future__ import annotations

import torch

from mim_ray.ciubm.tables import EmbeddingTable, IdTables


def test_equals_sparse_adam() -> None:
    table = EmbeddingTable(7, 3, generator=torch.Generator().manual_seed(0))
    reference = torch.nn.Embedding(7, 3, sparse=True)
    reference.weight.data.copy_(table.weight)
    optimizer = torch.optim.SparseAdam(list(reference.parameters()), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for ids in ([1, 2, 2, 5], [2, 3], [1, 1, 6, 0]):
        index = torch.tensor(ids)
        factor = torch.randn(len(ids), 3, generator=generator)
        optimizer.zero_grad()
        ((reference(index) * factor).sum() ** 2).backward()
        optimizer.step()
        ((table.embed(index, train=True) * factor).sum() ** 2).backward()
        table.step(0.1)
        assert torch.allclose(table.weight, reference.weight, atol=1e-6)


def test_rows_not_met_stay() -> None:
    table = EmbeddingTable(5, 2)
    before = table.weight.clone()
    table.embed(torch.tensor([1, 3]), train=True).sum().backward()
    table.step(0.1)
    moved = (table.weight != before).any(dim=1)
    assert moved.tolist() == [False, True, False, True, False]


def test_a_row_met_by_two_lookups_gets_both_gradients() -> None:
    once, twice = (EmbeddingTable(3, 2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    (2 * once.embed(torch.tensor([1]), train=True)).sum().backward()
    first, second = twice.embed(torch.tensor([1]), train=True), twice.embed(torch.tensor([1]), train=True)
    (first.sum() + second.sum()).backward()
    once.step(0.1)
    twice.step(0.1)
    assert torch.equal(once.weight, twice.weight)


def test_lookup_without_training_leaves_no_trace() -> None:
    table = EmbeddingTable(3, 2)
    before = table.weight.clone()
    assert not table.embed(torch.tensor([0, 2])).requires_grad
    table.step(0.1)
    assert torch.equal(table.weight, before)


def test_state_returns_the_same_tables() -> None:
    tables = IdTables.create({"item": 4, "category": 2}, 3, seed=5)
    again = IdTables.from_state(tables.state())
    assert "user" not in again
    assert torch.equal(again["item"].embed(torch.tensor([1, 3])), tables["item"].embed(torch.tensor([1, 3])))
    assert torch.equal(IdTables.create({"item": 4, "category": 2}, 3, seed=5)["item"].weight, tables["item"].weight)
