"""Pre-training on several workers: gradients, statistics and measures are those of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mim_ray.config.scenario import Scenario
from mim_ray.encoders.item_encoder import ItemEncoder
from mim_ray.encoders.tokenizer import train_tokenizer
from mim_ray.pretraining import batch_norm
from mim_ray.pretraining.objective import ImageTextAligner, equal_content_pairs
from mim_ray.contrastive.info_nce import symmetric_info_nce

BATCH = 6
CUT_US = 1_000_000


@pytest.fixture(scope="module")
def residual(scenario: Scenario) -> Scenario:
    """The scenario with a tower that has BatchNorm."""
    values = scenario.model_dump()
    values["encoders"]["vision"] = {"model": "test_resnet", "image_size": 32, "resize": "squash"}
    values["pretraining"] |= {"batch_size": 8, "vision_dda_steps": 3, "text_dda_steps": 2, "dma_steps": 3}
    return Scenario.model_validate(values)


def pairs_of(num_pairs: int) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """Pictures, titles and keys; the last title of the batch is the first one's again."""
    pixels = torch.randint(0, 256, (num_pairs, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    titles = [f"{('red', 'blue', 'green')[i % 3]} thing {i}" for i in range(num_pairs)]
    titles[-1] = titles[0]
    keys = torch.stack([torch.arange(num_pairs), torch.arange(num_pairs)], dim=1)
    keys[-1, 0] = keys[0, 0]
    return pixels, titles, keys


def gradients(encoder: ItemEncoder, rows: slice, num_pairs: int) -> dict[str, torch.Tensor]:
    """Of DMA's loss over all workers, where this one has `rows`, the temperature's included."""
    from mim_ray.contrastive.gather import gather
    from mim_ray.training.optim import average_gradients

    aligner = ImageTextAligner(encoder, 0.1).train()
    batch_norm.freeze(aligner)
    for part in aligner.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    pixels, titles, keys = pairs_of(num_pairs)
    image, text, scale = aligner(pixels[rows], encoder.text.tokenize(titles[rows]))
    pairs = equal_content_pairs(keys[rows], gather(keys[rows]))
    symmetric_info_nce(image, text, scale, mask=pairs).backward()
    average_gradients(aligner.parameters())
    return {name: p.grad for name, p in aligner.named_parameters() if p.grad is not None}


@pytest.mark.distributed
@pytest.mark.parametrize("num_workers", [2, 3])
def test_gradients_of_dma_equal_those_of_one_worker_on_the_joined_batch(
    num_workers: int, residual: Scenario, gloo_workers: Callable[..., list[dict[str, Any]]]
) -> None:
    tokenizer = train_tokenizer(pairs_of(30)[1], 100).to_str()

    def worker(rank: int, world: int = num_workers) -> dict[str, Any]:
        from tokenizers import Tokenizer

        encoder = ItemEncoder.build(residual.encoders, Tokenizer.from_str(tokenizer), 0)
        return gradients(encoder, slice(rank * BATCH, (rank + 1) * BATCH), BATCH * world)

    results = gloo_workers(worker, num_workers)
    encoder = ItemEncoder.build(residual.encoders, train_tokenizer(pairs_of(30)[1], 100), 0)
    expected = gradients(encoder, slice(0, BATCH * num_workers), BATCH * num_workers)
    assert expected["log_scale"].abs() > 0
    for result in results:
        assert set(result) == set(expected)
        for name, gradient in expected.items():
            assert (result[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


@pytest.mark.distributed
def test_after_each_phase_all_workers_have_the_same_parameters_and_buffers(
    residual: Scenario, samples: str, gloo_workers: Callable[..., list[dict[str, Any]]]
) -> None:
    def worker(rank: int, world: int = 2) -> dict[str, Any]:
        import torch

        from mim_ray.data.catalogue import Catalogue
        from mim_ray.pretraining.dataset import Pictures, Share
        from mim_ray.pretraining.phases import Context, pretrain

        encoder = ItemEncoder.build(residual.encoders, train_tokenizer([f"red thing {i}" for i in range(9)], 100), 0)
        pictures = Pictures(Catalogue.open(f"{samples}/catalogue"), 32, "squash", 10**6, 10**7)
        share = Share(residual.pretraining.batch_size, 0, rank, world)
        states: dict[str, Any] = {}

        def keep(finished: Any) -> None:
            states[finished.phase] = {key: value.clone() for key, value in encoder.state_dict().items()}

        states["start"] = {key: value.clone() for key, value in encoder.state_dict().items()}
        metrics = pretrain(
            Context(encoder, pictures, CUT_US, residual.pretraining, share, torch.device("cpu")), None, keep
        )
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
