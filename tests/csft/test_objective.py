"""Eq. 6 against a loop, missing modalities, and P workers against one process on the joined batch."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from ray import cloudpickle
from torch import Tensor

from mim_ray.csft.negatives import Candidates, PastBatches
from mim_ray.csft.objective import CsftObjective, LocalBatch
from mim_ray.training.optim import average_gradients, check_finite


def make_objective(temperature: float = 0.2) -> CsftObjective:
    return CsftObjective(temperature=temperature, learn=True, text_loss_weight=0.5, image_loss_weight=0.25)


def make_batch(num_pairs: int = 4, width: int = 3, seed: int = 0) -> LocalBatch:
    rng = torch.Generator().manual_seed(seed)
    n = 2 * num_pairs
    return LocalBatch(
        queries=torch.randn(num_pairs, width, generator=rng),
        items=torch.randn(n, 3, width, generator=rng),
        has_text=torch.ones(n, dtype=torch.bool),
        has_image=torch.ones(n, dtype=torch.bool),
        item_rows=torch.arange(n) + 100 * seed,
        contents=torch.arange(n) + 10_000 * (seed + 1),
    )


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def loop_level(
    batch: LocalBatch,
    level: int,
    temperature: float,
    past: list[list[float]],
    has: Tensor,
    hidden: set[tuple[int, int]],
) -> float:
    """L of one level, written from Eq. 5: over the positive and all negatives."""
    candidates = batch.items[:, level].tolist() + past
    taking_part = [*has.tolist(), *[True] * len(past)]
    losses = []
    for i, query in enumerate(batch.queries.tolist()):
        if not taking_part[i]:
            continue
        terms = {
            j: math.exp(cosine(query, candidate) / temperature)
            for j, candidate in enumerate(candidates)
            if taking_part[j] and ((i, j) not in hidden or j == i)
        }
        losses.append(-math.log(terms[i] / sum(terms.values())))
    return sum(losses) / len(losses)


def test_equals_the_loop_written_from_the_paper() -> None:
    batch = make_batch()
    batch = replace(
        batch,
        item_rows=torch.tensor([0, 1, 2, 3, 4, 0, 6, 7]),  # hard negative 5 is the first query's positive again
        has_text=torch.tensor([1, 0, 1, 1, 1, 1, 0, 1]).bool(),
        bought=(torch.tensor([0, 2]), torch.tensor([0, 7])),  # query 2's user also bought item 7
    )
    past = PastBatches(1, torch.float32)
    old = make_batch(seed=1)
    everything = torch.ones(8, dtype=torch.bool)
    past.push(Candidates(old.items, everything, everything, old.item_rows, old.contents))
    result = make_objective()(batch, past)
    hidden = {(0, 5), (2, 7)}
    levels = [
        loop_level(batch, level, 0.2, old.items[:, level].tolist(), has, hidden)
        for level, has in enumerate((everything, batch.has_text, everything))
    ]
    assert result.level_losses.tolist() == pytest.approx(levels, rel=1e-5)
    assert result.loss.item() == pytest.approx(levels[0] + 0.5 * levels[1] + 0.25 * levels[2], rel=1e-5)
    assert result.num_negatives == 2 * 4 * (1 + 1) - 1 - 2 / 4


def test_by_hand() -> None:
    # one pair along x, hard negative along y, at temperature 1: each level is log(1 + e^-1)
    x, y = [1.0, 0.0], [0.0, 1.0]
    batch = LocalBatch(
        queries=torch.tensor([x]),
        items=torch.tensor([[x, x, x], [y, y, y]]),
        has_text=torch.ones(2, dtype=torch.bool),
        has_image=torch.ones(2, dtype=torch.bool),
        item_rows=torch.tensor([0, 1]),
        contents=torch.tensor([10, 11]),
    )
    result = make_objective(temperature=1.0)(batch)
    assert result.loss.item() == pytest.approx(1.75 * math.log(1 + math.exp(-1)), rel=1e-6)
    assert result.num_negatives == 1


def test_a_level_of_weight_zero_is_off() -> None:
    objective = CsftObjective(temperature=0.2, learn=True, text_loss_weight=0.0, image_loss_weight=0.0)
    result = objective(make_batch())
    result.loss.backward()
    assert result.loss.item() == pytest.approx(result.level_losses[0].item())
    assert result.level_losses[1:].tolist() == [0.0, 0.0]
    assert objective.log_scales["text"].grad is None


def test_a_batch_whose_positives_all_lack_a_title_stays_finite() -> None:
    batch = make_batch()
    batch = replace(batch, has_text=torch.zeros(8, dtype=torch.bool), items=batch.items.requires_grad_())
    result = make_objective()(batch)
    result.loss.backward()
    assert check_finite(result.loss, 0) > 0
    assert batch.items.grad is not None
    assert torch.isfinite(batch.items.grad).all()
    assert batch.items.grad[:, 1].abs().max() == 0.0


def test_one_over_temperature_stays_at_most_100() -> None:
    objective = make_objective(temperature=0.001)
    with torch.no_grad():
        for parameter in objective.log_scales.values():
            parameter += 5.0
    objective.clamp()
    assert objective.temperatures()["mm"] == pytest.approx(0.01)


PAIRS, WIDTH, STEPS = 4, 6, 4


def train(rank: int, workers: int, num_pairs: int, total: int) -> dict[str, Any]:
    """A few steps on this worker's part of a seeded stream, with doubles, purchases, missing modalities, past batches."""
    rng = torch.Generator().manual_seed(7)
    weights = [torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=rng)) for _ in range(4)]
    objective = CsftObjective(temperature=0.1, learn=True, text_loss_weight=0.5, image_loss_weight=0.25)
    parameters = [*weights, *objective.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    past = PastBatches(2, torch.float32)
    kept: dict[str, Any] = {"losses": [], "levels": [], "negatives": [], "gradients": []}
    for _ in range(STEPS):
        queries = torch.randn(total, WIDTH, generator=rng)
        positives, hard = torch.randn(2, total, WIDTH, generator=rng)
        rows = torch.randint(0, 40, (2, total), generator=rng)
        has = torch.rand(2, 2, total, generator=rng) < 0.7
        bought = torch.randint(0, 40, (total, 2), generator=rng)
        mine = slice(rank * num_pairs, (rank + 1) * num_pairs)
        x = torch.cat([positives[mine], hard[mine]])
        batch = LocalBatch(
            queries=queries[mine] @ weights[0],
            items=torch.stack([x @ weight for weight in weights[1:]], dim=1),
            has_text=torch.cat([has[0, 0, mine], has[0, 1, mine]]),
            has_image=torch.cat([has[1, 0, mine], has[1, 1, mine]]),
            item_rows=torch.cat([rows[0, mine], rows[1, mine]]),
            contents=torch.cat([rows[0, mine], rows[1, mine]]) + 1_000,
            bought=(torch.arange(num_pairs).repeat_interleave(2), bought[mine].flatten()),
        )
        result = objective(batch, past)
        optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        average_gradients(parameters)
        kept["losses"].append(result.loss.detach())
        kept["levels"].append(result.level_losses)
        kept["negatives"].append(result.num_negatives)
        kept["gradients"].append([p.grad.clone() for p in parameters if p.grad is not None])
        optimizer.step()
        past.push(result.fresh)
    return kept


def count_negatives(first_item: int) -> list[float]:
    """Negatives per query while two past batches fill up, all items different."""
    objective, past, counts, n = make_objective(), PastBatches(2), [], 2 * PAIRS
    everything = torch.ones(n, dtype=torch.bool)
    for step in range(5):
        rows = torch.arange(n) + n * step + first_item
        items, queries = torch.randn(n, 3, 3), torch.randn(PAIRS, 3)
        result = objective(LocalBatch(queries, items, everything, everything, rows, rows + 10**9), past)
        counts.append(result.num_negatives)
        past.push(result.fresh)
    return counts


@pytest.fixture(scope="module", params=[2, 3])
def workers(request: pytest.FixtureRequest, gloo_workers: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What 2 and 3 gloo processes computed."""
    num_workers: int = request.param
    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def worker(rank: int) -> dict[str, Any]:
        result = train(rank, num_workers, PAIRS, PAIRS * num_workers)
        return {**result, "counts": count_negatives(first_item=rank * 100_000)}

    return gloo_workers(worker, num_workers)


@pytest.mark.distributed
def test_workers_match_one_process_on_the_joined_batch(workers: list[dict[str, Any]]) -> None:
    """Loss and parameter gradients, temperatures included, to a relative 1e-5, with and without past batches."""
    num_pairs = PAIRS * len(workers)
    joined = train(0, 1, num_pairs, num_pairs)
    for step in range(STEPS):
        losses = torch.stack([result["losses"][step] for result in workers])
        assert losses.mean().item() == pytest.approx(joined["losses"][step].item(), rel=1e-5)
        negatives = sum(result["negatives"][step] for result in workers) / len(workers)
        assert negatives == pytest.approx(joined["negatives"][step])
        for result in workers:
            torch.testing.assert_close(result["levels"][step], joined["levels"][step], rtol=1e-5, atol=0)
            for mine, theirs in zip(result["gradients"][step], joined["gradients"][step], strict=True):
                assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.distributed
def test_every_query_meets_2np_k_plus_1_minus_1_negatives(workers: list[dict[str, Any]]) -> None:
    """Past batches empty, partly filled and full."""
    for result in workers:
        assert result["counts"] == [2 * PAIRS * len(workers) * (k + 1) - 1 for k in (0, 1, 2, 2, 2)]
    assert count_negatives(0) == [2 * PAIRS * (k + 1) - 1 for k in (0, 1, 2, 2, 2)]
