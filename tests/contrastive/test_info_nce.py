"""Eq. 5 against a loop, against autograd on dense logits, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mim_ray.contrastive.info_nce import info_nce, info_nce_rows, same_key_pairs
from mim_ray.contrastive.symmetric import symmetric_info_nce


def loop_info_nce(
    queries: list[list[float]],
    candidates: list[list[float]],
    positives: list[int],
    temperature: float,
    hidden: set[tuple[int, int]],
    bias: list[float] | None = None,
) -> float:
    """Eq. 5 as the paper writes it, plus temperature, mask and bias."""
    bias = bias or [0.0] * len(candidates)

    def sim(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

    losses = []
    for i, query in enumerate(queries):
        terms = [
            math.exp(sim(query, candidate) / temperature + bias[j])
            for j, candidate in enumerate(candidates)
            if (i, j) not in hidden or j == positives[i]
        ]
        own = math.exp(sim(query, candidates[positives[i]]) / temperature + bias[positives[i]])
        losses.append(-math.log(own / sum(terms)))
    return sum(losses) / len(losses)


def dense_rows(
    q: Tensor, c: Tensor, positive: Tensor, scale: Tensor, past: Tensor, hidden: Tensor, bias: Tensor | float = 0.0
) -> Tensor:
    logits = scale * normalize(q, dim=-1) @ torch.cat([normalize(c, dim=-1), past.float()]).T + bias
    hidden = hidden.clone()
    hidden[torch.arange(len(q)), positive] = False
    return cross_entropy(logits.masked_fill(hidden, -torch.inf), positive, reduction="none")


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("temperature", [1.0, 0.07])
def test_equals_the_loop_written_from_the_paper(rng: torch.Generator, temperature: float) -> None:
    queries, candidates = torch.randn(4, 3, generator=rng), torch.randn(9, 3, generator=rng)
    positives, hidden = [2, 0, 5, 8], {(0, 1), (0, 2), (3, 7)}
    mask = torch.zeros(4, 9, dtype=torch.bool)
    for i, j in hidden:
        mask[i, j] = True
    past = normalize(candidates[6:], dim=-1)
    got = info_nce(queries, candidates, torch.tensor(positives), logit_scale=torch.tensor(1 / temperature), mask=mask)
    split = info_nce(
        queries, candidates[:6], torch.tensor(positives).clamp_max(5),
        logit_scale=torch.tensor(1 / temperature), past=past, mask=mask,
    )  # fmt: skip
    want = loop_info_nce(queries.tolist(), candidates.tolist(), positives, temperature, hidden)
    assert got.item() == pytest.approx(want, rel=1e-5)
    want = loop_info_nce(queries.tolist(), candidates.tolist(), [2, 0, 5, 5], temperature, hidden)
    assert split.item() == pytest.approx(want, rel=1e-5)


def test_a_bias_equals_the_loop_written_from_the_paper(rng: torch.Generator) -> None:
    """Minus the log of the sampling frequency, on the positive's own logit too (Yi et al. 2019)."""
    queries, candidates = torch.randn(4, 3, generator=rng), torch.randn(9, 3, generator=rng)
    bias = torch.randn(9, generator=rng) * 2
    mask = torch.tensor([[0, 0, 3], [1, 2, 7]])
    got = info_nce(
        queries, candidates[:6], torch.tensor([2, 0, 5, 3]), logit_scale=torch.tensor(5.0),
        past=normalize(candidates[6:], dim=-1), mask=mask, bias=bias, tile=4,
    )  # fmt: skip
    hidden = {(0, 1), (0, 2), (3, 7)}
    want = loop_info_nce(queries.tolist(), candidates.tolist(), [2, 0, 5, 3], 0.2, hidden, bias.tolist())
    assert got.item() == pytest.approx(want, rel=1e-5)


def test_an_equal_bias_for_all_changes_nothing(rng: torch.Generator) -> None:
    q, c = torch.randn(4, 3, generator=rng), torch.randn(9, 3, generator=rng)
    plain, shifted = (
        info_nce(q, c, torch.arange(4), logit_scale=torch.tensor(9.0), bias=bias)
        for bias in (None, torch.full((9,), 7.0))
    )
    assert plain == shifted


def test_by_hand() -> None:
    # one query along x; candidates along x, y and -x: loss = log(1 + e^-1 + e^-2) at temperature 1
    loss = info_nce(
        torch.tensor([[3.0, 0.0]]),
        torch.tensor([[2.0, 0.0], [0.0, 1.0], [-5.0, 0.0]]),
        torch.tensor([0]),
        logit_scale=torch.tensor(1.0),
    )
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1) + math.exp(-2)), rel=1e-6)
    alone = info_nce(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([0]), logit_scale=torch.tensor(5.0))
    assert alone.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("tile", [1, 7, 1000])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias_std", [0.0, 3.0, 40.0])
def test_gradients_equal_autograd_on_dense_logits(
    rng: torch.Generator, scale: float, tile: int, masked: bool, bias_std: float
) -> None:
    q = torch.randn(6, 8, generator=rng, requires_grad=True)
    c = torch.randn(13, 8, generator=rng, requires_grad=True)
    past = normalize(torch.randn(20, 8, generator=rng), dim=-1).bfloat16()
    s = torch.tensor(scale, requires_grad=True)
    positive = torch.tensor([0, 3, 3, 12, 7, 1])
    mask = torch.rand(6, 33, generator=rng) < (0.3 if masked else 0.0)
    weights = torch.rand(6, generator=rng)
    bias = torch.randn(33, generator=rng) * bias_std
    want = dense_rows(q, c, positive, s, past, mask, bias)
    grads = torch.autograd.grad((want * weights).sum(), (q, c, s))
    got = info_nce_rows(
        q,
        c,
        positive,
        logit_scale=s,
        past=past,
        mask=mask if masked else None,
        bias=bias if bias_std else None,
        tile=tile,
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad((got * weights).sum(), (q, c, s)), grads, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp_min(1e-3)


def test_pairs_mean_the_same_as_the_bool_mask(rng: torch.Generator) -> None:
    q, c = torch.randn(5, 4, generator=rng), torch.randn(11, 4, generator=rng)
    positive, scale = torch.arange(5), torch.tensor(10.0)
    mask = torch.rand(5, 11, generator=rng) < 0.4
    dense = info_nce(q, c, positive, logit_scale=scale, mask=mask, tile=3)
    pairs = info_nce(q, c, positive, logit_scale=scale, mask=mask.nonzero().T, tile=3)
    assert dense == pairs


def test_a_column_that_takes_no_part_is_as_if_it_were_not_there(rng: torch.Generator) -> None:
    q, c = torch.randn(3, 4, generator=rng), torch.randn(8, 4, generator=rng, requires_grad=True)
    valid = torch.tensor([1, 1, 1, 0, 1, 0, 0, 1]).bool()
    scale = torch.tensor(10.0)
    loss = info_nce(q, c, torch.arange(3), logit_scale=scale, valid=valid, tile=2)
    assert loss.item() == pytest.approx(info_nce(q, c[valid], torch.arange(3), logit_scale=scale).item(), rel=1e-6)
    (grad,) = torch.autograd.grad(loss, c)
    assert grad[~valid].abs().max() == 0.0


def test_order_of_negatives_tile_and_length_of_vectors_do_not_matter(rng: torch.Generator) -> None:
    q, c = torch.randn(4, 6, generator=rng), torch.randn(40, 6, generator=rng)
    scale = torch.tensor(20.0)
    loss = info_nce(q, c, torch.arange(4), logit_scale=scale)
    shuffled = torch.cat([c[:4], c[4:][torch.randperm(36, generator=rng)]])
    other = info_nce(q * 7.0, shuffled * 0.1, torch.arange(4), logit_scale=scale, tile=9)
    assert loss.item() == pytest.approx(other.item(), rel=1e-5)


def test_an_extreme_scale_stays_finite() -> None:
    q, c = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    s = torch.tensor(100.0, requires_grad=True)
    loss = info_nce(q, c, torch.tensor([0]), logit_scale=s, tile=1)
    assert loss.item() == pytest.approx(200.0, rel=1e-5)
    assert torch.autograd.grad(loss, s)[0].item() == pytest.approx(2.0, rel=1e-5)


def test_symmetric_loss_is_the_mean_of_both_directions(rng: torch.Generator) -> None:
    image, text = torch.randn(5, 4, generator=rng), torch.randn(5, 4, generator=rng)
    logits = 12.0 * normalize(image, dim=-1) @ normalize(text, dim=-1).T
    want = (cross_entropy(logits, torch.arange(5)) + cross_entropy(logits.T, torch.arange(5))) / 2
    assert symmetric_info_nce(image, text, torch.tensor(12.0)).item() == pytest.approx(want.item(), rel=1e-5)
    twin = torch.eye(5).bool()
    twin[0, 1] = twin[1, 0] = True
    masked = symmetric_info_nce(image, text, torch.tensor(12.0), mask=twin)
    assert masked < want


def test_loss_memory_does_not_grow_with_the_negatives(rng: torch.Generator) -> None:
    q = torch.randn(64, 32, generator=rng, requires_grad=True)
    c = torch.randn(128, 32, generator=rng, requires_grad=True)

    def peak_bytes(num_past: int) -> int:
        past = normalize(torch.randn(num_past, 32, generator=rng), dim=-1)
        with torch.profiler.profile(profile_memory=True) as profile:
            info_nce(q, c, torch.arange(64), logit_scale=torch.tensor(10.0), past=past, tile=256).backward()
        now = most = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most

    few, many = peak_bytes(1_000), peak_bytes(20_000)
    assert 0 < many <= few * 1.1


def test_same_key_pairs_finds_every_equal_pair(rng: torch.Generator) -> None:
    a, b = torch.randint(0, 5, (7,), generator=rng), torch.randint(0, 6, (30,), generator=rng)
    pairs = same_key_pairs(a, b)
    want = {(i, j) for i in range(7) for j in range(30) if a[i] == b[j]}
    assert {(int(i), int(j)) for i, j in pairs.T} == want
    assert pairs.shape[1] == len(want)
    assert same_key_pairs(a, b + 100).shape == (2, 0)
