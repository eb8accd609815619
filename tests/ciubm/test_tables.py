"""ID tables: only met rows move, as torch's SparseAdam moves them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from mim_ray.ciubm.tables import EmbeddingTable, IdTables
from mim_ray.ciubm.tables.gradients import summed_by_row
from mim_ray.ciubm.tables.hand_out import hand_out
from mim_ray.ciubm.tables.optimizers import OptimizerName


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


def test_equals_rowwise_adagrad_written_out() -> None:
    """One accumulator per row: the mean over the row of the squared gradient (FBGEMM's EXACT_ROWWISE_ADAGRAD)."""
    rate, eps = 0.1, 1e-8
    table = EmbeddingTable(3, 2, optimizer="rowwise_adagrad", generator=torch.Generator().manual_seed(0))
    weight, square = table.weight.tolist(), [0.0, 0.0, 0.0]
    batches = [([1, 2, 2], [[1.0, -2.0], [0.5, 0.25], [0.5, 1.0]]), ([2], [[-3.0, 0.1]]), ([1], [[0.0, 0.0]])]
    for rows, factors in batches:
        (table.embed(torch.tensor(rows), train=True) * torch.tensor(factors)).sum().backward()
        table.step(rate)
        for row in set(rows):
            gradient = [sum(f[k] for r, f in zip(rows, factors, strict=True) if r == row) for k in range(2)]
            square[row] += sum(g * g for g in gradient) / 2
            for k in range(2):
                weight[row][k] -= rate * gradient[k] / (math.sqrt(square[row]) + eps)
        for row in range(3):
            assert table.weight[row].tolist() == pytest.approx(weight[row], abs=1e-6)
    assert table.optimizer.slots["square"].shape == (3,)


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
def test_a_run_resumed_from_its_state_equals_the_undisturbed_one(optimizer: OptimizerName) -> None:
    def train(tables: IdTables, steps: range) -> None:
        for step in steps:
            rows = torch.randint(0, 9, (6,), generator=torch.Generator().manual_seed(step))
            embedded = tables.embed({"item": rows, "user": rows[:2]}, train=True)
            sum((value**2 * (step + 1)).sum() for value in embedded.values()).backward()
            tables.step(0.05)

    whole = IdTables.create({"item": 9, "user": 9}, 3, seed=1, optimizer=optimizer)
    train(whole, range(6))
    killed = IdTables.create({"item": 9, "user": 9}, 3, seed=1, optimizer=optimizer)
    train(killed, range(4))
    resumed = IdTables.create({"item": 9, "user": 9}, 3, seed=99, optimizer=optimizer)
    resumed.load_state(killed.state())
    resumed.load_optimizer_state(killed.optimizer_state())
    train(resumed, range(4, 6))
    for name, weight in whole.state().items():
        assert torch.equal(resumed.state()[name], weight)


def test_state_of_an_optimizer_that_never_moved_can_be_loaded() -> None:
    tables = IdTables.create({"item": 2}, 2, seed=0)
    state = tables.optimizer_state()
    assert set(state) == {"item.num_steps"}
    tables.load_optimizer_state(state)
    assert tables["item"].optimizer.num_steps == 0


@pytest.mark.parametrize("rows", [[4, 4, 1, 4, 0, 1], [3, 0, 2], []])
def test_gradients_are_summed_by_row(rows: list[int]) -> None:
    gradients = torch.randn(len(rows), 3, generator=torch.Generator().manual_seed(0))
    distinct, summed = summed_by_row(torch.tensor(rows, dtype=torch.int64), gradients)
    assert distinct.tolist() == sorted(set(rows))
    for row, total in zip(distinct.tolist(), summed, strict=True):
        places = [place for place, other in enumerate(rows) if other == row]
        assert torch.allclose(total, gradients[places].sum(dim=0), atol=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
def test_two_workers_match_one_on_joined_batches(
    gloo_workers: Callable[..., list[dict[str, torch.Tensor]]], optimizer: OptimizerName
) -> None:
    """Within 1e-6; the replicas agree to the bit. In the last step only one worker met anything."""
    batches = [[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8], [7, 7]]

    def steps(rank: int, world: int) -> dict[str, torch.Tensor]:
        tables = IdTables.create({"item": 10}, 3, seed=0, optimizer=optimizer)
        for number, batch in enumerate(batches):
            rows = batch[rank * 4 // world : (rank + 1) * 4 // world]
            embedded = tables.embed({"item": torch.tensor(rows, dtype=torch.int64)}, train=True)["item"]
            (embedded.sin().sum() * (number + 1) * world).backward()  # the mean over workers: the joined batch's sum
            tables.step(0.05)
        return tables.state()

    alone = steps(0, 1)["item"]
    first, second = gloo_workers(lambda rank: steps(rank, 2), 2)
    assert torch.equal(torch.as_tensor(first["item"]), torch.as_tensor(second["item"]))
    assert torch.allclose(torch.as_tensor(first["item"]), alone, atol=1e-6)


def test_handing_items_out_has_the_gradient_of_a_lookup() -> None:
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(7, 3, generator=generator, requires_grad=True)
    target, behaviors = torch.tensor([6, 0]), torch.tensor([[0, 2, 2, 5], [2, 0, 0, 0]])  # 1, 3 and 4 are nowhere
    weights = torch.randn(2, 4, 3, generator=generator)

    def loss(of_target: torch.Tensor, of_behaviors: torch.Tensor) -> torch.Tensor:
        return of_target.sin().sum() + (of_behaviors * weights).sum()

    (expected,) = torch.autograd.grad(loss(items[target], items[behaviors]), items)
    (gradient,) = torch.autograd.grad(loss(*hand_out(items, target, behaviors)), items)
    assert torch.allclose(gradient, expected, atol=1e-6)
    assert not gradient[[1, 3, 4]].any()


def test_a_table_whose_name_begins_like_another_gets_its_own_state() -> None:
    tables = IdTables.create({"feature.a": 2, "feature.a.b": 3}, 2, seed=0)
    for name in ("feature.a", "feature.a.b"):
        tables.embed({name: torch.tensor([1])}, train=True)[name].sum().backward()
    tables.step(0.1)
    again = IdTables.from_state(tables.state())
    again.load_optimizer_state(tables.optimizer_state())
    assert [set(again[name].optimizer.slots) for name in ("feature.a", "feature.a.b")] == [{"mean", "square"}] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: run `pytest -m gpu` on a machine that has one")
@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
def test_a_step_on_the_gpu_equals_one_on_the_cpu(optimizer: str) -> None:
    rows, target, behaviors = torch.arange(5), torch.tensor([0, 4]), torch.tensor([[1, 2, 4], [3, 3, 0]])
    moved = []
    for device in ("cpu", "cuda"):
        tables = IdTables.create({"item": 9}, 4, seed=1, optimizer=optimizer, device=device)
        for _ in range(3):
            items = tables.embed({"item": rows.to(device)}, train=True)["item"]
            of_target, of_behaviors = hand_out(items, target.to(device), behaviors.to(device))
            (of_target.square().sum() + of_behaviors.sin().sum()).backward()
            tables.step(0.1)
        moved.append(tables["item"].weight.cpu())
    assert torch.allclose(*moved, atol=1e-6)
