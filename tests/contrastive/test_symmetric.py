"""CLIP's loss against autograd on dense logits; across workers in test_gather.py."""

from __future__ import annotations

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
