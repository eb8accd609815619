"""User behavior models against loops, and the mistakes that BASELINES warns of."""

from __future__ import annotations

import math

import pytest
import torch

from mim_ray.ciubm.backbones import NAMES, BackboneSettings, Side, build_backbone
from mim_ray.ciubm.backbones.attention import TargetAttention, newest, take
from mim_ray.ciubm.backbones.din import Din

B, L, D = 4, 6, 8


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """target, behaviors, mask with 6, 3, 1 and 0 real behaviors, same category."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(L) < torch.tensor([6, 3, 1, 0]).unsqueeze(1)
    same = torch.rand(B, L, generator=generator) < 0.5
    return torch.randn(B, D, generator=generator), torch.randn(B, L, D, generator=generator), mask, same


@pytest.fixture(params=NAMES)
def backbone(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(2)
    return build_backbone(request.param, D, BackboneSettings(num_searched=2, num_short=3))


def test_padding_never_shows(backbone: torch.nn.Module, case: tuple[torch.Tensor, ...]) -> None:
    target, behaviors, mask, same = case
    result = backbone(target, behaviors, mask, Side(same))
    assert result.shape == (B, backbone.width)
    padded = torch.where(mask.unsqueeze(-1), behaviors, 99.0)
    assert torch.allclose(result, backbone(target, padded, mask, Side(same | ~mask)), atol=1e-6)
    longer = torch.cat([behaviors, torch.full((B, 3, D), 7.0)], dim=1)
    more = torch.zeros(B, 3, dtype=torch.bool)
    assert torch.allclose(
        result, backbone(target, longer, torch.cat([mask, more], 1), Side(torch.cat([same, ~more], 1))), atol=1e-6
    )


def test_no_behaviors_no_interest(backbone: torch.nn.Module, case: tuple[torch.Tensor, ...]) -> None:
    target, behaviors, mask, same = case
    assert backbone(target, behaviors, mask, Side(same))[3].abs().max() == 0


@pytest.mark.parametrize("name", ["average", "din"])
def test_order_of_behaviors_does_not_matter(name: str, case: tuple[torch.Tensor, ...]) -> None:
    target, behaviors, mask, same = case
    model = build_backbone(name, D, BackboneSettings())
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = model(target, behaviors[:, order], mask[:, order], Side(same[:, order]))
    assert torch.allclose(model(target, behaviors, mask, Side(same)), shuffled, atol=1e-5)


def test_average_is_the_mean_of_real_behaviors(case: tuple[torch.Tensor, ...]) -> None:
    target, behaviors, mask, same = case
    result = build_backbone("average", D, BackboneSettings())(target, behaviors, mask, Side(same))
    assert torch.allclose(result[1], behaviors[1, :3].mean(dim=0), atol=1e-6)


def test_din_equals_its_layers_on_t_h_difference_product(case: tuple[torch.Tensor, ...]) -> None:
    target, behaviors, mask, same = case
    model = Din(D)
    result = model(target, behaviors, mask, Side(same))
    for row in range(B):
        expected = torch.zeros(D)
        for i in range(int(mask[row].sum())):
            t, h = target[row], behaviors[row, i]
            score = model.second(model.activation(model.first(torch.cat([t, h, t - h, t * h]))))
            expected = expected + score * h
        assert torch.allclose(result[row], expected, atol=1e-5)


def test_target_attention_equals_a_loop_over_heads(case: tuple[torch.Tensor, ...]) -> None:
    target, behaviors, mask, _ = case
    model = TargetAttention(D, num_heads=2)
    result = model(target, behaviors, mask)
    size = D // 2
    for row in range(3):
        joined: list[float] = []
        for head in range(2):
            part = slice(head * size, (head + 1) * size)
            query = model.of_target(target[row])[part]
            real = range(int(mask[row].sum()))
            keys = [model.of_key(behaviors[row, i])[part] for i in real]
            values = [model.of_value(behaviors[row, i])[part] for i in real]
            weights = [math.exp((query @ key).item() / math.sqrt(size)) for key in keys]
            mixed = sum((w / sum(weights) * v for w, v in zip(weights, values, strict=True)), torch.zeros(size))
            joined += mixed.tolist()
        assert torch.allclose(result[row], model.output(torch.tensor(joined)), atol=1e-5)


def test_search_keeps_the_newest_of_the_category_and_no_pad() -> None:
    behaviors = torch.arange(1.0, 7.0).view(1, 6, 1)
    mask = torch.tensor([[True, True, True, True, False, False]])
    same = torch.tensor([[True, False, True, True, True, True]])
    index, real = newest(mask & same, 2)
    found = take(behaviors, index)
    assert found[0, :, 0].tolist() == [4.0, 3.0]
    assert real.tolist() == [[True, True]]
    index, real = newest(mask & same, 5)
    found = take(behaviors, index)
    assert found[0, :, 0][real[0]].tolist() == [4.0, 3.0, 1.0]
    assert real[0].sum() == 3


def test_a_valid_behavior_never_loses_to_padding() -> None:
    """A valid item with a negative score once lost to padding's 0 in public code; here pads score -inf."""
    mask = torch.tensor([[True, True, True, False, False, False]])
    _, real = newest(mask, 3)
    assert real.all()


def test_unknown_backbone_is_named() -> None:
    with pytest.raises(ValueError, match="'gru4rec' is no backbone"):
        build_backbone("gru4rec", D, BackboneSettings())
