"""Rows and gradients across workers: two gloo processes equal one process on the joined batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mim_ray.contrastive.gather import gather, gather_with_grad, place, total
from mim_ray.contrastive.symmetric import symmetric_info_nce


def test_without_a_process_group_gathering_changes_nothing() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_with_grad(x) is x
    assert not gather(x).requires_grad
    assert total(torch.tensor(3.0)) == 3.0
    assert place() == (0, 1)


@pytest.mark.distributed
def test_two_workers_match_one_on_the_joined_batch(gloo_workers: Callable[..., list[dict[str, Any]]]) -> None:
    generator = torch.Generator().manual_seed(1)
    image, text = torch.randn(8, 6, generator=generator), torch.randn(8, 5, generator=generator)
    image_weight, text_weight = torch.randn(6, 4, generator=generator), torch.randn(5, 4, generator=generator)

    def worker(rank: int) -> dict[str, Any]:
        import torch

        from mim_ray.contrastive.gather import gather, gather_with_grad
        from mim_ray.contrastive.symmetric import symmetric_info_nce
        from mim_ray.training.optim import average_gradients

        rows = slice(rank * 4, rank * 4 + 4)
        parameters = [torch.nn.Parameter(t.clone()) for t in (image_weight, text_weight, torch.tensor(9.0))]
        loss = symmetric_info_nce(image[rows] @ parameters[0], text[rows] @ parameters[1], parameters[2])
        loss.backward()
        average_gradients(parameters)
        x = torch.full((2, 1), float(rank + 1), requires_grad=True)
        ((rank + 1.0) * gather_with_grad(x)).sum().backward()
        return {
            "loss": loss.detach(),
            "gradients": [p.grad for p in parameters],
            "gathered": gather(torch.tensor([rank == 0])),
            "summed": x.grad,
        }

    results = gloo_workers(worker, 2)
    parameters = [torch.nn.Parameter(t.clone()) for t in (image_weight, text_weight, torch.tensor(9.0))]
    loss = symmetric_info_nce(image @ parameters[0], text @ parameters[1], parameters[2])
    loss.backward()
    assert torch.stack([r["loss"] for r in results]).mean().item() == pytest.approx(loss.item(), rel=1e-6)
    for result in results:
        for mine, parameter in zip(result["gradients"], parameters, strict=True):
            assert parameter.grad is not None
            assert (mine - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max()
        assert result["gathered"].tolist() == [True, False]
        assert result["summed"].flatten().tolist() == [3.0, 3.0]  # both workers' losses ask for this row
