"""Pre-training on several workers: gradients, statistics and measures are those of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mim_ray.config.scenario import Scenario
from mim_ray.data.transforms import PictureFormat
from mim_ray.encoders import batch_norm
from mim_ray.encoders.item_encoder import ItemEncoder
from mim_ray.encoders.tokenizer import train_tokenizer

BATCH = 6
CUT_US = 1_000_000


@pytest.fixture(scope="module")
def residual(scenario: Scenario) -> Scenario:
    """The scenario with a tower that has BatchNorm."""
    values = scenario.model_dump()
    values["encoders"]["vision"] = {"model": "test_resnet", "image_size": 32, "resize": "squash"}
    values["pretraining"] |= {"batch_size": 8, "vision_dda_steps": 3, "text_dda_steps": 2, "dma_steps": 3}
    return Scenario.model_validate(values)


@pytest.mark.distributed
@pytest.mark.parametrize("num_workers", [2, pytest.param(3, marks=pytest.mark.chaos)])
def test_gradients_of_dma_equal_those_of_one_worker_on_the_joined_batch(
    num_workers: int, gloo_workers: Callable[..., list[dict[str, Any]]]
) -> None:
    size, num_pairs = BATCH, BATCH * num_workers

    def gradients(rows: slice) -> list[torch.Tensor]:
        """Of DMA's loss over all workers where this one has `rows`: towers with nonlinear layers, projections, temperature.

        The last title of the joined batch is the first one's again.
        """
        import torch
        from torch import nn

        from mim_ray.contrastive.gather import gather
        from mim_ray.contrastive.symmetric import symmetric_info_nce
        from mim_ray.pretraining.equal_content import equal_content_pairs
        from mim_ray.training.optim import average_gradients

        torch.manual_seed(0)
        towers = [nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 8)) for _ in range(2)]
        log_scale = nn.Parameter(torch.tensor(2.0))
        image, text = torch.randn(2, num_pairs, 6, generator=torch.Generator().manual_seed(1))
        keys = torch.arange(num_pairs)[:, None].repeat(1, 2)
        keys[-1, 0] = keys[0, 0]
        pairs = equal_content_pairs(keys[rows], gather(keys[rows]))
        symmetric_info_nce(towers[0](image[rows]), towers[1](text[rows]), log_scale.exp(), mask=pairs).backward()
        trained = [*towers[0].parameters(), *towers[1].parameters(), log_scale]
        average_gradients(trained)
        return [parameter.grad for parameter in trained if parameter.grad is not None]

    def worker(rank: int) -> dict[str, Any]:
        return {"gradients": gradients(slice(rank * size, (rank + 1) * size))}

    results = gloo_workers(worker, num_workers)
    expected = gradients(slice(0, num_pairs))
    assert len(expected) == 13
    assert expected[-1].abs() > 1e-4  # the temperature's
    for result in results:
        for mine, gradient in zip(result["gradients"], expected, strict=True):
            assert (mine - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8


@pytest.mark.distributed
@pytest.mark.chaos  # half a minute; gradients are compared above
def test_after_each_phase_all_workers_have_the_same_parameters_and_buffers(
    residual: Scenario, samples: str, gloo_workers: Callable[..., list[dict[str, Any]]]
) -> None:
    def worker(rank: int, world: int = 2) -> dict[str, Any]:
        import torch

        from mim_ray.pretraining.dataset import Content, Share
        from mim_ray.pretraining.phases import Context, pretrain

        encoder = ItemEncoder.build(residual.encoders, train_tokenizer([f"red thing {i}" for i in range(9)], 100), 0)
        content = Content(f"{samples}/catalogue", PictureFormat(32, "squash"), 10**6, 10**7, CUT_US)
        share = Share(residual.pretraining.batch_size, 0, rank, world)
        states: dict[str, Any] = {}

        def keep(finished: Any) -> None:
            states[finished.phase] = {key: value.clone() for key, value in encoder.state_dict().items()}

        states["start"] = {key: value.clone() for key, value in encoder.state_dict().items()}
        metrics = pretrain(Context(encoder, content, residual.pretraining, share, torch.device("cpu")), None, keep)
        measures = {name: [phase["before"], phase["after"], phase["losses"]] for name, phase in metrics.items()}
        return {"states": states, "measures": measures}

    first, second = gloo_workers(worker, 2)
    statistic = "vision.net.bn1.running_mean"
    for phase in ("image", "text", "alignment"):
        mine, other = first["states"][phase], second["states"][phase]
        assert all(torch.equal(value, other[key]) for key, value in mine.items()), phase
    states = first["states"]

    assert not torch.equal(states["image"][statistic], states["start"][statistic])
    assert torch.equal(states["alignment"][statistic], states["image"][statistic])  # frozen
    assert first["measures"] == second["measures"]
    alone = worker(0, world=1)["measures"]
    assert alone["image"][0] == pytest.approx(first["measures"]["image"][0])  # held-out measures do not depend on P
    assert alone["text"][0] == pytest.approx(first["measures"]["text"][0])


def test_averaged_statistics_are_those_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0)) * 2 + torch.tensor([[[1.0]], [[5.0]]])
    norms = [torch.nn.BatchNorm1d(3, momentum=1.0) for _ in parts]
    for norm, rows in zip(norms, parts, strict=True):
        norm(rows)
    moments = [torch.stack([n.running_mean, n.running_var + n.running_mean**2]).double() for n in norms]
    monkeypatch.setattr(batch_norm, "place", lambda: (0, 2))
    monkeypatch.setattr(batch_norm, "total", lambda own: sum(moments))
    batch_norm.average(norms[0])
    everything = parts.reshape(-1, 3)
    torch.testing.assert_close(norms[0].running_mean, everything.mean(0))
    torch.testing.assert_close(norms[0].running_var, everything.var(0), rtol=0.02, atol=0.0)
