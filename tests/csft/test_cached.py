"""Cached gradients equal those of the whole batch, and hold the graph of one chunk at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from ray import cloudpickle
from torch import Tensor, nn

from mim_ray.csft.cached import cached_backward, joined
from mim_ray.csft.negatives import PastBatches
from mim_ray.csft.objective import LocalBatch, Shown
from mim_ray.csft.supervision import Objective, Supervision, make_objective
from mim_ray.training.optim import average_gradients

NUM_PAIRS, WIDTH = 10, 6


class Encoder(nn.Module):
    """Queries, titles and pictures pass their own layers, with dropout."""

    def __init__(self, dropout: float, hidden: int = 12) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(WIDTH, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, WIDTH))
        self.text = nn.Sequential(nn.Linear(WIDTH, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, WIDTH))
        with torch.no_grad():
            rng = torch.Generator().manual_seed(3)
            for parameter in self.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=rng))

    def items(self, x: Tensor) -> Tensor:
        image, text = self.image(x), self.text(x)
        return torch.stack([image + text, text, image], dim=1)


class Data:
    """One worker's raw pairs, with doubles, purchases, categories, missing modalities and items shown."""

    def __init__(self, rank: int = 0, num_pairs: int = NUM_PAIRS) -> None:
        rng = torch.Generator().manual_seed(20 + rank)
        self.num_pairs = num_pairs
        self.queries = torch.randn(num_pairs, WIDTH, generator=rng)
        self.items = torch.randn(2, num_pairs, WIDTH, generator=rng)
        self.rows = torch.randint(0, 50, (2, num_pairs), generator=rng)
        self.has = torch.rand(2, 2, num_pairs, generator=rng) < 0.8
        self.bought = torch.randint(0, 50, (num_pairs,), generator=rng)
        self.shown = torch.randn(num_pairs, 2, WIDTH, generator=rng)
        self.was_shown = torch.rand(num_pairs, generator=rng) < 0.5

    def embed(self, encoder: Encoder, pairs: slice, *, hard: bool = True) -> LocalBatch:
        kinds = slice(0, 2 if hard else 1)
        rows = self.rows[kinds, pairs].flatten()
        places = self.was_shown[pairs].nonzero().squeeze(1).repeat_interleave(2)
        flags = torch.ones(len(places), dtype=torch.bool)
        return LocalBatch(
            queries=encoder.image(self.queries[pairs]),
            items=encoder.items(self.items[kinds, pairs].flatten(0, 1)),
            has_text=self.has[0, kinds, pairs].flatten(),
            has_image=self.has[1, kinds, pairs].flatten(),
            item_rows=rows,
            contents=rows + 100,
            bought=(torch.arange(len(self.bought[pairs])), self.bought[pairs]),
            categories=rows % 5 - 1,
            shown=Shown(
                places, encoder.items(self.shown[pairs][self.was_shown[pairs]].flatten(0, 1)), flags, flags,
                1_000 + places, 2_000 + places,
            ),
        )  # fmt: skip

    @property
    def everything(self) -> slice:
        return slice(0, self.num_pairs)


def build(supervision: Supervision = "purchase") -> Objective:
    return make_objective(
        supervision, temperature=0.1, learn_temperature=True, text_loss_weight=0.5, image_loss_weight=0.25,
        width=WIDTH, num_categories=4,
    )  # fmt: skip


def make_past(objective: Objective) -> PastBatches:
    past = PastBatches(2, torch.float32)
    fresh = objective(Data(rank=9).embed(Encoder(0.0), slice(0, NUM_PAIRS)), None).fresh
    if fresh is not None:
        past.push(fresh)
    return past


def chunks(size: int) -> list[slice]:
    return [slice(start, min(start + size, NUM_PAIRS)) for start in range(0, NUM_PAIRS, size)]


def gradients(*modules: nn.Module) -> list[Tensor]:
    return [p.grad for module in modules for p in module.parameters() if p.grad is not None]


def assert_close(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("size", [1, 4, 10, 99])
@pytest.mark.parametrize("hard", [True, False])
def test_chunks_equal_the_whole_batch(size: int, hard: bool) -> None:
    encoder, objective, data = Encoder(0.0), build(), Data()
    past = make_past(objective)
    want = objective(data.embed(encoder, data.everything, hard=hard), past)
    want.loss.backward()
    plain = [g.clone() for g in gradients(encoder, objective)]
    encoder.zero_grad()
    objective.zero_grad()
    got = cached_backward(lambda pairs: data.embed(encoder, pairs, hard=hard), NUM_PAIRS, size, objective, past)
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)
    assert got.num_negatives == want.num_negatives
    assert got.fresh is not None
    assert want.fresh is not None
    assert torch.equal(got.fresh.items, want.fresh.items)
    assert_close(gradients(encoder, objective), plain)


@pytest.mark.parametrize("supervision", ["purchase", "click-binary", "category"])
def test_dropout_falls_alike_both_times(supervision: Supervision) -> None:
    """The plain way embeds the same chunks with their graphs, all at once."""
    encoder, objective, data = Encoder(0.3), build(supervision), Data()
    past = make_past(objective)
    torch.manual_seed(5)
    want = objective(joined([data.embed(encoder, pairs) for pairs in chunks(3)]), past)
    want.loss.backward()
    plain, following = [g.clone() for g in gradients(encoder, objective)], torch.rand(1)
    encoder.zero_grad()
    objective.zero_grad()
    torch.manual_seed(5)
    got = cached_backward(lambda pairs: data.embed(encoder, pairs), NUM_PAIRS, 3, objective, past)
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)
    assert_close(gradients(encoder, objective), plain)
    assert torch.equal(torch.rand(1), following)  # random numbers go on as after one forward pass


def test_frozen_towers_are_left_alone() -> None:
    encoder, objective, data = Encoder(0.0), build(), Data()
    encoder.image.requires_grad_(False)
    cached_backward(lambda pairs: data.embed(encoder, pairs), NUM_PAIRS, 4, objective)
    assert all(p.grad is None for p in encoder.image.parameters())
    assert all(p.grad is not None for p in encoder.text.parameters())
    encoder.requires_grad_(False)
    cached_backward(lambda pairs: data.embed(encoder, pairs), NUM_PAIRS, 4, objective)


def test_a_loss_that_is_not_finite_touches_no_gradient() -> None:
    encoder, objective, data = Encoder(0.0), build(), Data()
    data.queries[3] = torch.nan
    result = cached_backward(lambda pairs: data.embed(encoder, pairs), NUM_PAIRS, 4, objective)
    assert not result.level_losses.isfinite().all()
    assert gradients(encoder, objective) == []


class _Held:
    """Bytes of the tensors that graphs hold for their backward pass: now, and the most at any time."""

    def __init__(self) -> None:
        self.now = self.most = 0


class _Saved:
    def __init__(self, tensor: Tensor, held: _Held) -> None:
        self.tensor, self._held, self._bytes = tensor, held, tensor.nbytes
        held.now += self._bytes
        held.most = max(held.most, held.now)

    def __del__(self) -> None:
        self._held.now -= self._bytes


@contextmanager
def counted() -> Iterator[_Held]:
    held = _Held()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(tensor, held), lambda saved: saved.tensor):
        yield held


def test_the_graph_of_one_chunk_is_held_at_a_time() -> None:
    """Hidden layers are wide, so that what the encoder saves is nearly all there is."""
    encoder, objective, data = Encoder(0.1, hidden=600), build(), Data(num_pairs=64)
    with counted() as plain:
        objective(data.embed(encoder, data.everything), None).loss.backward()
    with counted() as cached:
        cached_backward(lambda pairs: data.embed(encoder, pairs), 64, 8, objective)
    assert plain.now == cached.now == 0
    assert cached.most < plain.most / 4  # an eighth of the pairs, unevenly shown items, weights and embeddings


@pytest.mark.distributed
def test_workers_match_one_process_on_the_joined_batch_in_chunks(
    gloo_workers: Callable[..., list[dict[str, Any]]],
) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def worker(rank: int) -> dict[str, Any]:
        encoder, objective, data = Encoder(0.3), build(), Data(rank)
        torch.manual_seed(rank)
        size = 3 + rank  # workers may differ in it
        result = cached_backward(lambda pairs: data.embed(encoder, pairs), NUM_PAIRS, size, objective)
        average_gradients([*encoder.parameters(), *objective.parameters()])
        return {"gradients": gradients(encoder, objective), "levels": result.level_losses}

    results = gloo_workers(worker, 2)
    encoder, objective = Encoder(0.3), build()
    parts = []
    for rank in range(2):
        torch.manual_seed(rank)
        parts += [Data(rank).embed(encoder, pairs) for pairs in chunks(3 + rank)]
    want = objective(joined(parts), None)
    want.loss.backward()
    for result in results:
        assert_close(result["gradients"], gradients(encoder, objective))
        torch.testing.assert_close(result["levels"], want.level_losses, rtol=1e-5, atol=0)
