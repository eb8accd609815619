"""What holds for every user behavior model; what each one computes is in test_backbone_equations.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mim_ray.ciubm.backbones import NAMES, BackboneSettings, Side, WithAuxiliaryLoss, build_backbone
from mim_ray.ciubm.backbones.attention import among_newest, as_mask, attend, best, masked_softmax, newest, take
from mim_ray.ciubm.backbones.gaps import NUM_GAPS, gap_bucket

B, L, D = 4, 6, 8
LENGTHS = [6, 3, 1, 0]
PLAIN = BackboneSettings(num_searched=2, num_short=3)
ALL = BackboneSettings(2, 3, sim_search="soft", sim_short="dien", time_gaps=True, cross_width=2, content=True)
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Side]


@pytest.fixture
def case() -> Case:
    """target, behaviors, mask of LENGTHS, and all that can be known of behaviors."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    mask = torch.arange(L) < torch.tensor(LENGTHS).unsqueeze(1)
    side = Side(draw(B, L) > 0, draw(B, L).exp() * 1e5, draw(B, L, 2), draw(B, L).tanh())
    return draw(B, D), draw(B, L, D), mask, side


@pytest.fixture(params=[(name, settings) for name in NAMES for settings in (PLAIN, ALL)], ids=str)
def backbone(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(2)
    name, settings = request.param
    return build_backbone(name, D, settings).requires_grad_()


def _with_other_pads(case: Case) -> Case:
    target, behaviors, mask, side = case
    wide = mask.unsqueeze(-1)
    changed = Side(
        side.same_category | ~mask,
        torch.where(mask, side.age_s, 99.0),  # type: ignore[arg-type]
        torch.where(wide, side.cross, 99.0),  # type: ignore[arg-type]
        torch.where(mask, side.content, 1.0),  # type: ignore[arg-type]
    )
    return target, torch.where(wide, behaviors, 99.0), mask, changed


def _longer(case: Case) -> Case:
    """The case with three more pads."""
    target, behaviors, mask, side = case

    def grown(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values, values.new_full((B, 3, *values.shape[2:]), 7)], dim=1)

    padded = torch.cat([mask, mask.new_zeros(B, 3)], dim=1)
    return target, grown(behaviors), padded, Side(*(grown(values) for values in side))  # type: ignore[arg-type]


def test_the_interest_is_as_wide_as_the_model_says(backbone: torch.nn.Module, case: Case) -> None:
    assert backbone(*case).shape == (B, backbone.width)


@pytest.mark.parametrize("change", [_with_other_pads, _longer])
def test_padding_never_shows(backbone: torch.nn.Module, case: Case, change: Callable[[Case], Case]) -> None:
    assert torch.allclose(backbone(*case), backbone(*change(case)), atol=1e-5)


@pytest.mark.parametrize("change", [_with_other_pads, _longer])
def test_padding_changes_no_gradient(backbone: torch.nn.Module, case: Case, change: Callable[[Case], Case]) -> None:
    def gradients(case: Case) -> list[torch.Tensor | None]:
        backbone.zero_grad()
        target, behaviors, mask, side = case
        behaviors = behaviors.clone().requires_grad_()
        backbone(target, behaviors, mask, side).square().sum().backward()
        assert behaviors.grad is not None
        assert behaviors.grad[~mask].abs().max() == 0
        return [behaviors.grad[mask], *(parameter.grad for parameter in backbone.parameters())]

    for one, other in zip(gradients(case), gradients(change(case)), strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.allclose(one, other, atol=1e-4, rtol=1e-4)


def test_no_behaviors_no_interest(backbone: torch.nn.Module, case: Case) -> None:
    assert backbone(*case)[LENGTHS.index(0)].abs().max() == 0


def test_a_batch_of_empty_histories_has_finite_gradients_and_losses(backbone: torch.nn.Module, case: Case) -> None:
    target, behaviors, mask, side = case
    target, behaviors = target.requires_grad_(), behaviors.requires_grad_()
    nothing = torch.zeros_like(mask)
    if isinstance(backbone, WithAuxiliaryLoss):
        interest, loss = backbone.interest_and_loss(target, behaviors, nothing, side, torch.ones(B))
        assert torch.isfinite(loss)
    else:
        interest, loss = backbone(target, behaviors, nothing, side), torch.zeros(())
    assert interest.abs().max() == 0
    (interest.sum() + loss).backward()
    gradients = [values.grad for values in (target, behaviors, *backbone.parameters()) if values.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_the_interest_that_trains_is_the_one_that_serves(backbone: torch.nn.Module, case: Case) -> None:
    if isinstance(backbone, WithAuxiliaryLoss):
        interest, loss = backbone.interest_and_loss(*case, torch.tensor([1.0, 0.0, 1.0, 0.0]))
        assert loss.shape == ()
        assert torch.allclose(interest, backbone(*case), atol=1e-6)


def test_models_with_a_loss_of_their_own_are_sim_and_dien() -> None:
    assert [n for n in NAMES if isinstance(build_backbone(n, D, PLAIN), WithAuxiliaryLoss)] == ["sim", "dien"]


@pytest.mark.parametrize("name", ["average", "din", "twin"])
def test_order_of_behaviors_does_not_matter(name: str, case: Case) -> None:
    target, behaviors, mask, side = case
    model = build_backbone(name, D, ALL)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = Side(*(values[:, order] for values in side))  # type: ignore[index]
    shuffled = model(target, behaviors[:, order], mask[:, order], moved)
    assert torch.allclose(model(*case), shuffled, atol=1e-5)


@pytest.mark.parametrize("name", ["dien", "bst"])
def test_order_of_behaviors_matters_to_sequence_models(name: str, case: Case) -> None:
    target, behaviors, mask, side = case
    torch.manual_seed(0)
    model = build_backbone(name, D, PLAIN)
    assert not torch.allclose(model(*case)[0], model(target, behaviors.flip(1), mask, side)[0], atol=1e-4)


@pytest.mark.parametrize("name", ["bst", "sim", "twin"])
def test_the_age_of_behaviors_matters_where_it_is_used_and_its_lack_is_named(name: str, case: Case) -> None:
    target, behaviors, mask, side = case
    torch.manual_seed(0)
    model = build_backbone(name, D, BackboneSettings(num_searched=2, num_short=3, time_gaps=True))
    assert side.age_s is not None
    older = model(target, behaviors, mask, side._replace(age_s=side.age_s * 50))
    assert not torch.allclose(model(*case), older, atol=1e-5)
    with pytest.raises(ValueError, match="ages in seconds"):
        model(target, behaviors, mask, side._replace(age_s=None))


@pytest.mark.parametrize("name", ["din", "sim", "twin"])
def test_the_attention_told_of_content_follows_it_and_its_lack_is_named(name: str, case: Case) -> None:
    target, behaviors, mask, side = case
    torch.manual_seed(0)
    model = build_backbone(name, D, BackboneSettings(num_searched=2, num_short=3, content=True))
    assert side.content is not None
    assert not torch.allclose(model(*case), model(target, behaviors, mask, side._replace(content=-side.content)))
    with pytest.raises(ValueError, match="must hold the cosines"):
        model(target, behaviors, mask, side._replace(content=None))


def test_a_valid_behavior_never_loses_to_padding() -> None:
    """Scores -1, -2, 3 and three pads: public code fills pads with 0 before the top-k and returns one valid item."""
    scores = torch.tensor([[-1.0, -2.0, 3.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False, False, False]])
    index, found = best(scores, mask, 3)
    assert index.tolist() == [[2, 0, 1]]
    assert found.all()


def test_the_newest_are_of_the_category_and_no_pad() -> None:
    mask = torch.tensor([[True, True, True, True, False, False]])
    same = torch.tensor([[True, False, True, True, True, True]])
    index, real = newest(mask & same, 2)
    assert index.tolist() == [[3, 2]]
    assert real.tolist() == [[True, True]]
    index, real = newest(mask & same, 5)
    assert index[real].tolist() == [3, 2, 0]


def test_take_picks_from_its_own_row() -> None:
    values = torch.arange(24.0).view(2, 4, 3)
    index = torch.tensor([[3, 0], [1, 1]])
    assert take(values, index).tolist() == [[values[b, i].tolist() for i in index[b]] for b in range(2)]
    assert take(values[:, :, 0], index).tolist() == [[9.0, 0.0], [15.0, 15.0]]
    by_head = torch.tensor([[[0], [2]], [[3], [1]]])
    assert take(values, by_head)[1, 0, 0].tolist() == values[1, 3].tolist()


def test_a_softmax_over_nothing_is_zero() -> None:
    scores = torch.tensor([[5.0, 6.0], [1.0, 1.0]])
    mask = torch.tensor([[False, False], [True, True]])
    assert masked_softmax(scores, mask).tolist() == [[0.0, 0.0], [0.5, 0.5]]


def test_gaps_by_hand() -> None:
    minute, hour, day = 60.0, 3_600.0, 86_400.0
    ages = torch.tensor([[-5.0, 0.0, 59.0, minute, 3 * minute, hour, day, 1e12]])
    assert gap_bucket(ages).tolist() == [[0, 0, 1, 2, 4, 11, 20, NUM_GAPS - 1]]


def test_unknown_backbone_is_named() -> None:
    with pytest.raises(ValueError, match="'gru4rec' is no backbone"):
        build_backbone("gru4rec", D, PLAIN)


@pytest.mark.parametrize("heads_of_mask", [1, 3])
def test_attend_is_a_masked_softmax_and_a_weighted_sum_with_the_same_gradients(heads_of_mask: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, behaviors = (torch.randn(4, size, 5, generator=generator, dtype=torch.float64) for size in (3, 7))
    mask = torch.rand(4, heads_of_mask, 7, generator=generator) > 0.4
    mask[1] = False  # nothing is real
    behaviors[0, 0], mask[0, :, 0] = 1e30, False  # a pad of any value
    weight = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    found = []
    for one in (attend, lambda q, h, m: torch.bmm(masked_softmax(torch.bmm(q, h.transpose(1, 2)), m), h)):
        leaves = [values.clone().requires_grad_() for values in (query, behaviors)]
        mixed = one(*leaves, mask)
        found.append([mixed, *torch.autograd.grad((mixed * weight).sum(), leaves)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)
    assert found[0][0][1].abs().max() == 0
    assert found[0][2][1].abs().max() == 0


def test_attend_under_autocast_has_gradients_of_its_inputs_kind() -> None:
    leaves = [torch.randn(2, size, 4).requires_grad_() for size in (1, 6)]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attend(*leaves, torch.ones(2, 1, 6, dtype=torch.bool))
    mixed.float().sum().backward()
    exact = torch.bmm(torch.softmax(torch.bmm(leaves[0], leaves[1].transpose(1, 2)), dim=-1), leaves[1])
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), exact, atol=0.05, rtol=0.05)
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_the_newest_as_a_mask_are_the_newest(count: int) -> None:
    wanted = torch.rand(20, 7, generator=torch.Generator().manual_seed(count)) > 0.5
    assert torch.equal(among_newest(wanted, count), as_mask(*newest(wanted, count), 7))
