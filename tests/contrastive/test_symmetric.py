"""CLIP's loss against autograd on dense logits; across workers in test_gather.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from mim_ray.contrastive.symmetric import symmetric_info_nce


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("tile", [1, 3, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_autograd_on_dense_logits(scale: float, tile: int, masked: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    image = torch.randn(7, 8, generator=rng, requires_grad=True)
    text = torch.randn(7, 8, generator=rng, requires_grad=True)
    s = torch.tensor(scale, requires_grad=True)
    hidden = (torch.rand(7, 7, generator=rng) < 0.3) & ~torch.eye(7, dtype=torch.bool) & masked
    product = s * normalize(image, dim=-1) @ normalize(text, dim=-1).T
    losses = [cross_entropy(logits.masked_fill(hidden, -torch.inf), torch.arange(7)) for logits in (product, product.T)]
    want = 3.0 * (losses[0] + losses[1]) / 2
    grads = torch.autograd.grad(want, (image, text, s))
    mask = hidden | torch.eye(7, dtype=torch.bool)  # a positive always counts
    got = 3.0 * symmetric_info_nce(image, text, s, mask=mask.nonzero().T if masked else None, tile=tile)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(torch.autograd.grad(got, (image, text, s)), grads, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_without_gradients_the_value_is_the_same() -> None:
    rng = torch.Generator().manual_seed(1)
    image, text = (torch.randn(5, 4, generator=rng, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        alone = symmetric_info_nce(image, text, torch.tensor(10.0))
    assert not alone.requires_grad
    assert alone == symmetric_info_nce(image, text, torch.tensor(10.0))


def test_half_precision_comes_in_and_its_gradient_goes_out() -> None:
    image, text = (torch.eye(4, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    symmetric_info_nce(image, text, torch.tensor(5.0)).backward()
    assert image.grad is not None
    assert image.grad.dtype == torch.bfloat16


@pytest.mark.distributed
def test_two_workers_with_masks_and_weights_of_their_own_match_one_process(
    gloo_workers: Callable[..., list[dict[str, Any]]],
) -> None:
    """Each worker's loss has another weight, so the gathered rows' gradients must be summed after weighing."""

    def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rng = torch.Generator().manual_seed(2)
        image, text = torch.randn(10, 6, generator=rng), torch.randn(10, 6, generator=rng)
        return image, text, torch.rand(10, 10, generator=rng) < 0.3

    def work(rank: int) -> dict[str, Any]:
        image, text, hidden = inputs()
        rows = slice(5 * rank, 5 * rank + 5)
        mine = [side[rows].clone().requires_grad_() for side in (image, text)]
        loss = symmetric_info_nce(*mine, torch.tensor(9.0), mask=hidden[rows].nonzero().T, tile=2)
        ((rank + 1.0) * loss).backward()
        return {"loss": loss.detach(), "image": mine[0].grad, "text": mine[1].grad}

    image, text, hidden = inputs()
    image.requires_grad_()
    text.requires_grad_()
    hidden &= ~torch.eye(10, dtype=torch.bool)
    product = 9.0 * normalize(image, dim=-1) @ normalize(text, dim=-1).T
    rows = sum(
        cross_entropy(logits.masked_fill(hidden, -torch.inf), torch.arange(10), reduction="none") / 2
        for logits in (product, product.T)
    )
    assert isinstance(rows, torch.Tensor)
    (rows[:5].mean() + 2.0 * rows[5:].mean()).backward()
    results = gloo_workers(work, 2)
    for rank, result in enumerate(results):
        part = slice(5 * rank, 5 * rank + 5)
        torch.testing.assert_close(result["loss"], rows[part].mean().detach(), rtol=1e-5, atol=1e-6)
        for name, side in (("image", image), ("text", text)):
            assert side.grad is not None
            assert (result[name] - side.grad[part]).abs().max() <= 1e-5 * side.grad.abs().max()
