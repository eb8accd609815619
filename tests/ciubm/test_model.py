"""The CTR network: what reaches it, and what does not."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from mim_ray.ciubm.backbones import NAMES
from mim_ray.ciubm.model import CtrNetwork, EmbeddedBatch, NetworkConfig
from mim_ray.ciubm.recipe import network_config
from mim_ray.config.scenario import Ciubm

CONFIG = NetworkConfig("sim", id_width=8, user_width=4, content_width=6, num_histogram_bins=5, hidden=(16,))


@pytest.fixture
def batch() -> EmbeddedBatch:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    mask = torch.arange(5) < torch.tensor([5, 2, 0]).unsqueeze(1)
    return EmbeddedBatch(draw(3, 8), draw(3, 5, 8), mask, mask, draw(3, 4), draw(3, 6), draw(3, 5, 6))


def _network(config: NetworkConfig) -> CtrNetwork:
    torch.manual_seed(0)
    return CtrNetwork(config).eval()


@pytest.mark.parametrize("backbone", NAMES)
def test_padding_changes_no_logit(backbone: str, batch: EmbeddedBatch) -> None:
    network = _network(replace(CONFIG, backbone=backbone))
    pad = torch.zeros(3, 4, dtype=torch.bool)
    longer = batch._replace(
        behaviors=torch.cat([batch.behaviors, torch.full((3, 4, 8), 5.0)], 1),
        behavior_mask=torch.cat([batch.behavior_mask, pad], 1),
        same_category=torch.cat([batch.same_category, ~pad], 1),
        behavior_mm=torch.cat([batch.behavior_mm, torch.full((3, 4, 6), 5.0)], 1),  # type: ignore[list-item]
    )
    assert torch.allclose(network(batch), network(longer), atol=1e-5)
    assert torch.isfinite(network(batch)).all()


def test_the_base_model_sees_no_content(batch: EmbeddedBatch) -> None:
    network = _network(replace(CONFIG, content_width=None))
    without = batch._replace(target_mm=None, behavior_mm=None)
    assert torch.equal(network(batch), network(without))


def test_with_content_modules_off_no_content_reaches_the_network(batch: EmbeddedBatch) -> None:
    config = replace(CONFIG, content_module=False, fusion_module=False, num_histogram_bins=0)
    network = _network(config)
    other = batch._replace(target_mm=-batch.target_mm, behavior_mm=2 * batch.behavior_mm + 1)  # type: ignore[operator]
    assert torch.equal(network(batch), network(other))


def test_each_module_adds_its_own_width(batch: EmbeddedBatch) -> None:
    def width(**changes: object) -> int:
        network = _network(replace(CONFIG, **changes))  # type: ignore[arg-type]
        return sum(part.shape[1] for part in network.features(batch))

    whole = width()
    assert whole - width(id_module=False) >= 16
    assert whole - width(content_module=False) == 6
    assert whole - width(fusion_module=False) == 8
    assert whole - width(num_histogram_bins=0) == 5
    assert width(target_content=True) - whole == 6


def test_eq_9_keeps_the_order_id_content_fusion(batch: EmbeddedBatch) -> None:
    widths = [part.shape[1] for part in _network(CONFIG).features(batch)]
    assert widths[:4] == [16, 6, 8, 5]


def test_content_that_is_missing_in_the_batch_is_named(batch: EmbeddedBatch) -> None:
    with pytest.raises(ValueError, match="needs target_mm"):
        _network(CONFIG)(batch._replace(target_mm=None))


def test_config_survives_json() -> None:
    assert NetworkConfig.from_json(json.loads(json.dumps(CONFIG.to_json()))) == CONFIG


def test_a_config_of_an_earlier_version_gets_the_defaults_of_what_it_does_not_name() -> None:
    later = {"sim_search", "context_width", "query_width", "auxiliary_weight", "missing_content", "similarity_summary"}
    earlier = {name: value for name, value in CONFIG.to_json().items() if name not in later}
    assert NetworkConfig.from_json(earlier) == CONFIG


def test_weights_of_an_earlier_version_load(batch: EmbeddedBatch) -> None:
    network, weights = _network(CONFIG), {}
    for name, weight in network.state_dict().items():
        weights[name.removeprefix("ciubm.")] = weight
    torch.manual_seed(1)
    other = CtrNetwork(CONFIG).eval()
    other.load_state_dict(weights)
    assert torch.equal(network(batch), other(batch))


def test_context_and_query_reach_base_and_mim_alike(batch: EmbeddedBatch) -> None:
    full = batch._replace(context=torch.ones(3, 2), query_mm=torch.ones(3, 6))
    for content_width in (None, 6):
        config = replace(CONFIG, content_width=content_width)
        plain, told = _network(config), _network(replace(config, context_width=2, query_width=6))
        assert told.network[0].in_features - plain.network[0].in_features == 8  # type: ignore[operator]
        assert torch.equal(torch.cat(told.features(full)[-2:], dim=1), torch.ones(3, 8))
        assert not torch.allclose(told(full), told(full._replace(context=torch.zeros(3, 2))))
        with pytest.raises(ValueError, match="built for context of width 2"):
            told(batch)


@pytest.mark.parametrize("backbone", NAMES)
def test_the_loss_is_cross_entropy_and_the_weighed_auxiliary_loss(backbone: str, batch: EmbeddedBatch) -> None:
    label = torch.tensor([1.0, 0.0, 1.0])
    config = replace(CONFIG, backbone=backbone, sim_search="soft", auxiliary_weight=0.5)
    network = _network(config)
    torch.manual_seed(5)
    loss, logits = network.loss(batch, label)
    torch.manual_seed(5)
    auxiliary = network.ciubm.parts_and_loss(batch, label)[1]
    prob = torch.sigmoid(network(batch)).tolist()
    main = -sum(math.log(p if one else 1 - p) for p, one in zip(prob, label.tolist(), strict=True)) / 3
    assert loss.item() == pytest.approx(main + 0.5 * auxiliary.item(), abs=1e-5)
    assert (auxiliary.item() > 0) == (backbone in ("sim", "dien"))
    assert torch.allclose(logits, network(batch), atol=1e-6)
    assert _network(replace(config, auxiliary_weight=0.0)).loss(batch, label)[0].item() == pytest.approx(main, abs=1e-5)


def test_start_is_the_share_of_positives(batch: EmbeddedBatch) -> None:
    network = _network(CONFIG)
    network.start_at(0.2)
    last = network.network[-1]
    torch.nn.init.zeros_(last.weight)  # type: ignore[arg-type]
    assert torch.sigmoid(network(batch)).tolist() == pytest.approx([0.2] * 3)


def test_a_frozen_input_changes_no_gradient_of_the_first_layer() -> None:
    config = NetworkConfig("average", id_width=4, user_width=0, content_width=3, hidden=(5,), num_histogram_bins=2)
    torch.manual_seed(0)
    network = CtrNetwork(config)
    mask = torch.tensor([[True, True], [True, False]])
    target, behaviors = torch.randn(2, 4), torch.randn(2, 2, 4)
    content = {"target_mm": torch.randn(2, 3), "behavior_mm": torch.randn(2, 2, 3)}
    gradients = []
    for frozen in (True, False):
        leaves = [target.clone().requires_grad_(), behaviors.clone().requires_grad_()]
        batch = EmbeddedBatch(leaves[0], leaves[1], mask, mask, **content)
        if not frozen:
            batch = batch._replace(behavior_mm=content["behavior_mm"].clone().requires_grad_())
        logits = network(batch)
        gradients.append([logits, *torch.autograd.grad(logits.sum(), [*network.parameters(), *leaves])])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("width", "projected"), [(None, 0), (64, 0), (65, 32), (128, 32)])
def test_only_wide_mm_vectors_are_projected_by_default(width: int | None, projected: int) -> None:
    assert network_config(Ciubm(), "sim", width).content_projection == projected
