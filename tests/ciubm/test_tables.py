"""ID tables: only met rows move, as torch's SparseAdam moves them."""

from __future__ import annotations

import math

import pytest
import torch

from mim_ray.ciubm.tables import EmbeddingTable, IdTables


def test_equals_lazy_adam_written_out() -> None:
    """Rows met: moments decay and the row moves (torch.optim.SparseAdam's semantics); t counts all steps."""
    rate, first, second, eps = 0.1, 0.9, 0.999, 1e-8
    table = EmbeddingTable(4, 2, generator=torch.Generator().manual_seed(0))
    weight = table.weight.tolist()
    mean, square = [[0.0, 0.0] for _ in range(4)], [[0.0, 0.0] for _ in range(4)]
    batches = [
        ([1, 2, 2], [[1.0, -2.0], [0.5, 0.25], [0.5, 1.0]]),
        ([2], [[-3.0, 0.1]]),
        ([0, 1], [[1.0, 1.0], [2.0, 0.0]]),
    ]
    for t, (ids, factors) in enumerate(batches, start=1):
        (table.embed(torch.tensor(ids), train=True) * torch.tensor(factors)).sum().backward()
        table.step(rate)
        for row in set(ids):
            for k in range(2):
                gradient = sum(factor[k] for i, factor in zip(ids, factors, strict=True) if i == row)
                mean[row][k] = first * mean[row][k] + (1 - first) * gradient
                square[row][k] = second * square[row][k] + (1 - second) * gradient**2
                unbiased = mean[row][k] / (1 - first**t)
                weight[row][k] -= rate * unbiased / (math.sqrt(square[row][k] / (1 - second**t)) + eps)
        for row in range(4):
            assert table.weight[row].tolist() == pytest.approx(weight[row], abs=1e-4)


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
