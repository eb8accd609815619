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

from mim_ray.csft.momentum import MomentumEncoder, with_embeddings
from mim_ray.csft.negatives import Candidates, PastBatches
from mim_ray.csft.objective import CsftObjective, LocalBatch, Shown, collapsed
from mim_ray.csft.supervision import make_objective
from mim_ray.errors import NonFiniteLossError
from mim_ray.training.optim import average_gradients, check_finite


def make_csft(temperature: float = 0.2, **options: Any) -> CsftObjective:
    return CsftObjective(temperature=temperature, learn=True, text_loss_weight=0.5, image_loss_weight=0.25, **options)


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
    log_q: list[float] | None = None,
) -> float:
    """L of one level, written from Eq. 5: over the positive and all negatives. log_q: of each candidate."""
    candidates = batch.items[:, level].tolist() + past
    taking_part = [*has.tolist(), *[True] * len(past)]
    log_q = log_q or [0.0] * len(candidates)
    losses = []
    for i, query in enumerate(batch.queries.tolist()):
        if not taking_part[i]:
            continue
        terms = {
            j: math.exp(cosine(query, candidate) / temperature - log_q[j])
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
    result = make_csft()(batch, past)
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
    result = make_csft(temperature=1.0)(batch)
    assert result.loss.item() == pytest.approx(1.75 * math.log(1 + math.exp(-1)), rel=1e-6)
    assert result.num_negatives == 1


def test_sampling_frequencies_are_taken_from_the_logits_of_fresh_and_past_items() -> None:
    rates = torch.rand(108, generator=torch.Generator().manual_seed(3)).log()
    batch, old, past = make_batch(), make_batch(seed=1), PastBatches(1, torch.float32)
    everything = torch.ones(8, dtype=torch.bool)
    past.push(Candidates(old.items, everything, everything, old.item_rows, old.contents))
    result = make_csft(log_q=rates)(batch, past)
    drawn = [*rates[:8].tolist(), *rates[100:].tolist()]
    levels = [
        loop_level(batch, level, 0.2, old.items[:, level].tolist(), everything, set(), drawn) for level in range(3)
    ]
    assert result.level_losses.tolist() == pytest.approx(levels, rel=1e-5)


def test_without_space_time_negatives_only_the_own_positives_count() -> None:
    past = PastBatches(1)
    past.push(make_csft()(make_batch(seed=1)).fresh)
    batch = replace(make_batch(), item_rows=torch.tensor([0, 1, 2, 0, 4, 5, 6, 7]))  # the last pair bought item 0 again
    result = make_csft(space_time=False)(batch, past)
    alone = replace(
        batch, items=batch.items[:4], has_text=batch.has_text[:4], has_image=batch.has_image[:4],
        item_rows=batch.item_rows[:4], contents=batch.contents[:4],
    )  # fmt: skip
    assert result.loss.item() == pytest.approx(make_csft()(alone).loss.item(), rel=1e-6)
    assert result.num_negatives == 4 - 1 - 2 / 4
    assert result.fresh is None


def test_a_loss_near_that_of_guessing_is_named() -> None:
    guess = math.log(40)
    assert collapsed(torch.tensor([guess * 1.005, guess * 0.98, 0.0]), 40) == ("mm",)
    assert collapsed(torch.tensor([2.0, 2.0, 2.0]), 40) == ()
    batch = make_batch()
    same = replace(batch, items=torch.ones_like(batch.items))
    result = make_csft()(same)
    assert collapsed(result.level_losses, 1 + result.num_negatives) == ("mm", "text", "image")


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
    result = make_csft()(batch)
    result.loss.backward()
    assert check_finite(result.loss, 0) > 0
    assert batch.items.grad is not None
    assert torch.isfinite(batch.items.grad).all()
    assert batch.items.grad[:, 1].abs().max() == 0.0


def test_one_over_temperature_stays_at_most_100() -> None:
    objective = make_csft(temperature=0.001)
    with torch.no_grad():
        for parameter in objective.log_scales.values():
            parameter += 5.0
    objective.clamp()
    assert objective.temperatures()["mm"] == pytest.approx(0.01)


PAIRS, WIDTH, STEPS, NUM_ITEMS = 4, 6, 3, 40
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "log_q": {"log_q": torch.rand(NUM_ITEMS, generator=torch.Generator().manual_seed(5)).log()},
    "one level": {"multi_level": False},
    "momentum": {},
    "v1": {"supervision": "category"},
    "v2": {"supervision": "click-binary"},
}


class Stream:
    """Seeded raw batches, with doubles, purchases, missing modalities, categories and items shown; a worker sees its part."""

    def __init__(self, rank: int, num_pairs: int, total: int) -> None:
        self._rng = torch.Generator().manual_seed(7)
        self._mine, self._num_pairs, self._total = slice(rank * num_pairs, (rank + 1) * num_pairs), num_pairs, total

    def next(self) -> tuple[Tensor, Tensor, Tensor, LocalBatch]:
        """Raw queries, items and shown items; the batch without its embeddings."""
        rng, mine, total = self._rng, self._mine, self._total
        queries = torch.randn(total, WIDTH, generator=rng)
        positives, hard, shown = torch.randn(3, total, WIDTH, generator=rng)
        rows = torch.randint(0, NUM_ITEMS, (3, total), generator=rng)
        has = torch.rand(3, 2, total, generator=rng) < 0.7
        bought = torch.randint(0, NUM_ITEMS, (total, 2), generator=rng)
        was_shown = (torch.rand(total, generator=rng) < 0.5)[mine].nonzero().squeeze(1)
        both = torch.cat([rows[0, mine], rows[1, mine]])
        nothing = torch.zeros(0)
        batch = LocalBatch(
            queries=nothing,
            items=nothing,
            has_text=torch.cat([has[0, 0, mine], has[1, 0, mine]]),
            has_image=torch.cat([has[0, 1, mine], has[1, 1, mine]]),
            item_rows=both,
            contents=both + 1_000,
            bought=(torch.arange(self._num_pairs).repeat_interleave(2), bought[mine].flatten()),
            categories=both % 4 - 1,
            shown=Shown(
                was_shown, nothing, has[2, 0, mine][was_shown], has[2, 1, mine][was_shown],
                rows[2, mine][was_shown], rows[2, mine][was_shown] + 1_000,
            ),
        )  # fmt: skip
        return queries[mine], torch.cat([positives[mine], hard[mine]]), shown[mine][was_shown], batch


class Linear(torch.nn.Module):
    """The smallest encoder: one matrix for queries and one for each level."""

    def __init__(self) -> None:
        super().__init__()
        start = torch.randn(4, WIDTH, WIDTH, generator=torch.Generator().manual_seed(8))
        self.query, self.mm, self.text, self.image = (torch.nn.Parameter(weight) for weight in start)

    def items(self, x: Tensor) -> Tensor:
        return torch.stack([x @ weight for weight in (self.mm, self.text, self.image)], dim=1)


def train(variant: str, rank: int, workers: int, num_pairs: int, total: int) -> dict[str, Any]:
    """A few steps on this worker's part of the stream; the past fills up from the first step on."""
    options = {"supervision": "any", **VARIANTS[variant]}
    objective = make_objective(
        options.pop("supervision"), temperature=0.1, learn_temperature=True, text_loss_weight=0.5,
        image_loss_weight=0.25, width=WIDTH, num_categories=3, **options,
    )  # fmt: skip
    encoder = Linear()
    slow = MomentumEncoder(encoder, 0.5) if variant == "momentum" else None
    parameters = [*encoder.parameters(), *objective.parameters()]
    past, stream = PastBatches(2, torch.float32), Stream(rank, num_pairs, total)
    kept: dict[str, Any] = {"losses": [], "levels": [], "negatives": [], "gradients": []}
    for _ in range(STEPS):
        queries, items, shown, batch = stream.next()
        assert batch.shown is not None
        batch = replace(
            batch,
            queries=queries @ encoder.query,
            items=encoder.items(items),
            shown=replace(batch.shown, items=encoder.items(shown)),
        )
        result = objective(batch, past)
        for parameter in parameters:
            parameter.grad = None
        result.loss.backward()
        average_gradients(parameters)
        kept["losses"].append(result.loss.detach())
        kept["levels"].append(result.level_losses)
        kept["negatives"].append(result.num_negatives)
        kept["gradients"].append([p.grad.clone() for p in parameters if p.grad is not None])
        with torch.no_grad():  # plain gradient descent: importing an optimizer would take each process three seconds
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
        if slow is not None:
            slow.update(encoder)
        if result.fresh is not None:
            past.push(result.fresh if slow is None else with_embeddings(result.fresh, slow.encoder.items(items)))
    return kept


def count_negatives(rank: int, workers: int, k: int, num_pairs: int = PAIRS) -> dict[str, list[float]]:
    """Negatives per query while k past batches fill up: all items different, then with doubles and purchases.

    "expected" counts those that are left, in a loop over the queries and items of all workers.
    """
    counts: dict[str, list[float]] = {"distinct": [], "masked": [], "expected": []}
    n = 2 * num_pairs
    for name in ("distinct", "masked"):
        objective, past = make_csft(), PastBatches(k)
        rng = torch.Generator().manual_seed(11)
        held: list[list[tuple[int, int]]] = []
        for step in range(k + 2):
            rows = torch.randint(0, 30, (workers, n), generator=rng)
            contents = rows // 2  # items 2i and 2i + 1 are doubles
            bought = torch.randint(0, 30, (workers, num_pairs, 2), generator=rng)
            if name == "distinct":
                rows = torch.arange(workers * n).view(workers, n) + workers * n * step
                contents, bought = rows, bought - 100
            everything, places = torch.ones(n, dtype=torch.bool), torch.arange(num_pairs).repeat_interleave(2)
            result = objective(
                LocalBatch(
                    torch.randn(num_pairs, 3), torch.randn(n, 3, 3), everything, everything, rows[rank], contents[rank],
                    (places, bought[rank].flatten()),
                ),
                past,
            )  # fmt: skip
            counts[name].append(result.num_negatives)
            past.push(result.fresh)
            fresh = [(int(r), int(c)) for r, c in zip(rows.flatten(), contents.flatten(), strict=True)]
            if name == "masked":
                candidates = fresh + [item for batch in held for item in batch]
                left = 0
                for worker in range(workers):
                    for query in range(num_pairs):
                        own, content = fresh[worker * n + query]
                        mine = set(bought[worker, query].tolist())
                        left += sum(r != own and c != content and r not in mine for r, c in candidates)
                counts["expected"].append(left / (workers * num_pairs))
            held = ([fresh, *held])[:k]
    return counts


def stop_on_nan(rank: int) -> dict[str, Any]:
    """The last worker's queries hold a NaN, which no other worker's loss meets."""
    batch = make_batch(seed=rank)
    if rank == 1:
        batch = replace(batch, queries=batch.queries * float("nan"))
    result = make_csft()(batch)
    try:
        check_finite(result.level_losses.sum(), 0)
    except NonFiniteLossError:
        return {"stopped": True, "own": bool(result.loss.isfinite())}
    return {"stopped": False, "own": bool(result.loss.isfinite())}


@pytest.fixture(scope="module", params=[2, 3])
def workers(request: pytest.FixtureRequest, gloo_workers: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What 2 and 3 gloo processes computed."""
    num_workers: int = request.param
    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def worker(rank: int) -> dict[str, Any]:
        trained = {name: train(name, rank, num_workers, PAIRS, PAIRS * num_workers) for name in VARIANTS}
        counts = [count_negatives(rank, num_workers, k) for k in (0, 2)]
        return {"trained": trained, "counts": counts, "nan": stop_on_nan(rank)}

    return gloo_workers(worker, num_workers)


@pytest.mark.distributed
@pytest.mark.parametrize("variant", VARIANTS)
def test_workers_match_one_process_on_the_joined_batch(workers: list[dict[str, Any]], variant: str) -> None:
    """Loss and parameter gradients, temperatures included, to a relative 1e-5, with and without past batches."""
    num_pairs = PAIRS * len(workers)
    joined = train(variant, 0, 1, num_pairs, num_pairs)
    results = [worker["trained"][variant] for worker in workers]
    for step in range(STEPS):
        losses = torch.stack([result["losses"][step] for result in results])
        assert losses.mean().item() == pytest.approx(joined["losses"][step].item(), rel=1e-5)
        for result in results:
            assert result["negatives"][step] == joined["negatives"][step]
            torch.testing.assert_close(result["levels"][step], joined["levels"][step], rtol=1e-5, atol=0)
            for mine, theirs in zip(result["gradients"][step], joined["gradients"][step], strict=True):
                assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def check_counts(counts: list[dict[str, list[float]]], workers: int) -> None:
    for k, found in zip((0, 2), counts, strict=True):
        filled = [min(step, k) for step in range(k + 2)]  # empty, partly filled, full
        assert found["distinct"] == [2 * PAIRS * workers * (held + 1) - 1 for held in filled]
        assert found["masked"] == found["expected"]
        assert max(found["masked"]) < 2 * PAIRS * workers * (k + 1) - 1


def test_every_query_meets_2np_k_plus_1_minus_1_negatives_minus_the_masked() -> None:
    check_counts([count_negatives(0, 1, k) for k in (0, 2)], 1)


@pytest.mark.distributed
def test_two_and_three_workers_meet_2np_k_plus_1_minus_1_negatives_minus_the_masked(
    workers: list[dict[str, Any]],
) -> None:
    for result in workers:
        check_counts(result["counts"], len(workers))


@pytest.mark.distributed
def test_all_workers_stop_when_the_loss_of_one_is_not_finite(workers: list[dict[str, Any]]) -> None:
    assert [result["nan"]["stopped"] for result in workers] == [True] * len(workers)
    assert [result["nan"]["own"] for result in workers] == [rank != 1 for rank in range(len(workers))]
