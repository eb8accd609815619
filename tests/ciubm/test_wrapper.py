"""CiUBM around any user behavior model: what h_B holds, and what cannot reach it."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

from mim_ray.ciubm.backbones import BackboneSettings, Side, build_backbone
from mim_ray.ciubm.batch import EmbeddedBatch
from mim_ray.ciubm.interest import content_interest, content_relevance, fusion_interest, similarity_summary
from mim_ray.ciubm.wrapper import CiUBM, ContentOptions

B, L, D, WIDTH = 3, 5, 8, 6
ALL = ContentOptions("log", 5, summary=True, target_content=True, missing_content=True, query_interest=True)


class LastBehavior(nn.Module):
    """A user's own model: the newest behavior times the target."""

    width = D

    def forward(self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, side: Side) -> Tensor:
        newest = (behavior_mask.sum(dim=1) - 1).clamp_min(0)
        return behaviors[torch.arange(len(target)), newest] * target * behavior_mask[:, :1]


@pytest.fixture
def batch() -> EmbeddedBatch:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    mask = torch.arange(L) < torch.tensor([5, 2, 0]).unsqueeze(1)
    return EmbeddedBatch(
        draw(B, D),
        draw(B, L, D),
        mask,
        mask,
        target_mm=draw(B, WIDTH),
        behavior_mm=draw(B, L, WIDTH),
        query_mm=draw(B, WIDTH),
    )


def test_eq_9_around_a_users_own_module(batch: EmbeddedBatch) -> None:
    h_b = CiUBM(LastBehavior(), D, WIDTH)(batch)
    assert batch.target_mm is not None
    assert batch.behavior_mm is not None
    relevance = content_relevance(batch.target_mm, batch.behavior_mm, batch.behavior_mask)
    expected = [
        LastBehavior()(batch.target, batch.behaviors, batch.behavior_mask, Side(batch.same_category)),
        content_interest(relevance, batch.behavior_mm, batch.behavior_mask),
        fusion_interest(relevance, batch.behaviors, batch.behavior_mask),
    ]
    assert torch.equal(h_b, torch.cat(expected, dim=1))


def test_projections_map_mm_vectors_and_nothing_else(batch: EmbeddedBatch) -> None:
    torch.manual_seed(0)
    whole = CiUBM(LastBehavior(), D, WIDTH, options=ALL)
    projected = CiUBM(LastBehavior(), D, WIDTH, options=replace(ALL, projected_width=2))
    assert projected.width == whole.width - 3 * (WIDTH - 2) == projected(batch).shape[1]
    of_interest, of_target, of_query = (layer.weight.t() for layer in projected.projections)
    expected = list(whole.parts(batch))
    wide = [number for number, part in enumerate(expected) if part.shape[1] == WIDTH]
    assert len(wide) == 3
    for number, weight in zip(wide, (of_interest, of_target, of_query), strict=True):
        expected[number] = expected[number] @ weight
    torch.testing.assert_close(projected(batch), torch.cat(expected, dim=1))


def test_each_part_of_eq_9_can_be_switched_off(batch: EmbeddedBatch) -> None:
    whole = CiUBM(LastBehavior(), D, WIDTH)(batch)
    parts = {
        "id_module": whole[:, :D],
        "content_module": whole[:, D : D + WIDTH],
        "fusion_module": whole[:, D + WIDTH :],
    }
    for name in parts:
        without = CiUBM(LastBehavior(), D, WIDTH, **{name: False})  # type: ignore[arg-type]
        kept = torch.cat([part for other, part in parts.items() if other != name], dim=1)
        assert torch.equal(without(batch), kept)
        assert without.width == kept.shape[1]


@pytest.mark.parametrize("name", ["", *(field.name for field in fields(ContentOptions))])
def test_the_width_is_what_the_parts_have(batch: EmbeddedBatch, name: str) -> None:
    off = ContentOptions()
    chosen = replace(off, **{name: getattr(ALL, name)}) if name else ALL
    for content_module in (True, False):
        ciubm = CiUBM(LastBehavior(), D, WIDTH, content_module=content_module, options=chosen)
        assert ciubm(batch).shape == (B, ciubm.width)


def test_without_content_nothing_of_it_reaches_h_b(batch: EmbeddedBatch) -> None:
    ciubm = CiUBM(LastBehavior(), D, None, options=ALL)
    assert torch.equal(ciubm(batch), ciubm(batch._replace(target_mm=None, behavior_mm=None, query_mm=None)))
    assert ciubm.width == D


@pytest.mark.parametrize("options", [ContentOptions(), ALL])
def test_a_row_without_behaviors_or_content_is_finite(batch: EmbeddedBatch, options: ContentOptions) -> None:
    assert batch.target_mm is not None
    assert batch.behavior_mm is not None
    assert batch.query_mm is not None
    ciubm = CiUBM(LastBehavior(), D, WIDTH, options=options)
    nothing = batch._replace(
        behavior_mask=torch.zeros_like(batch.behavior_mask),
        target_mm=torch.zeros_like(batch.target_mm),
        behavior_mm=torch.zeros_like(batch.behavior_mm),
        query_mm=torch.zeros_like(batch.query_mm),
    )
    assert ciubm(nothing).abs().max() == 0


def test_padding_never_shows(batch: EmbeddedBatch) -> None:
    assert batch.behavior_mm is not None
    ciubm = CiUBM(LastBehavior(), D, WIDTH, options=ALL)
    real = batch.behavior_mask.unsqueeze(-1)
    changed = batch._replace(
        behaviors=torch.where(real, batch.behaviors, 99.0), behavior_mm=torch.where(real, batch.behavior_mm, 99.0)
    )
    assert torch.allclose(ciubm(batch), ciubm(changed), atol=1e-5)


@pytest.mark.parametrize("norm", ["mean", "log"])
def test_an_item_without_content_is_no_evidence_when_told_of(batch: EmbeddedBatch, norm: str) -> None:
    """Row 0 with a behavior without content: as if it had not been there, but for the share of known content."""
    assert batch.behavior_mm is not None
    ciubm = CiUBM(
        LastBehavior(),
        D,
        WIDTH,
        options=ContentOptions(norm, 5, summary=True, missing_content=True),  # type: ignore[arg-type]
    )
    hidden = batch.behavior_mm.clone()
    hidden[0, 1] = 0.0
    order = [0, 2, 3, 4, 1]  # the same behaviors but that one
    shorter = batch._replace(
        behaviors=batch.behaviors[:, order],
        behavior_mm=batch.behavior_mm[:, order],
        behavior_mask=batch.behavior_mask.clone(),
    )
    shorter.behavior_mask[0, 4] = False
    with_missing, without = ciubm(batch._replace(behavior_mm=hidden))[0], ciubm(shorter)[0]
    assert torch.allclose(with_missing[D:-1], without[D:-1], atol=1e-5)
    assert [with_missing[-2].item(), with_missing[-1].item()] == pytest.approx([1.0, 0.8])
    assert without[-1] == 1.0
    counted = CiUBM(LastBehavior(), D, WIDTH, options=ContentOptions(norm))  # type: ignore[arg-type]
    assert not torch.allclose(counted(batch._replace(behavior_mm=hidden))[0], counted(shorter)[0], atol=1e-5)


def test_the_query_stands_where_the_target_stood_in_eq_7(batch: EmbeddedBatch) -> None:
    assert batch.query_mm is not None
    assert batch.behavior_mm is not None
    assert batch.target_mm is not None
    h_b = CiUBM(
        LastBehavior(), D, WIDTH, content_module=False, fusion_module=False, options=ContentOptions(query_interest=True)
    )(batch)
    relevance = content_relevance(batch.query_mm, batch.behavior_mm, batch.behavior_mask)
    interest = content_interest(relevance, batch.behavior_mm, batch.behavior_mask)
    cosine = torch.nn.functional.cosine_similarity(batch.query_mm, batch.target_mm)
    expected = [interest, cosine.unsqueeze(1), similarity_summary(relevance, batch.behavior_mask)]
    assert torch.allclose(h_b[:, D:], torch.cat(expected, dim=1), atol=1e-6)
    with pytest.raises(ValueError, match="needs query_mm"):
        CiUBM(LastBehavior(), D, WIDTH, options=ContentOptions(query_interest=True))(batch._replace(query_mm=None))


def test_the_cosines_reach_an_attention_that_uses_them(batch: EmbeddedBatch) -> None:
    torch.manual_seed(0)
    ciubm = CiUBM(
        build_backbone("din", D, BackboneSettings(content=True)),
        D,
        WIDTH,
        content_module=False,
        fusion_module=False,
        content_attention=True,
    )
    assert batch.target_mm is not None
    assert not torch.allclose(ciubm(batch)[0], ciubm(batch._replace(target_mm=-batch.target_mm))[0])


def test_the_loss_of_a_model_without_one_is_zero(batch: EmbeddedBatch) -> None:
    parts, loss = CiUBM(LastBehavior(), D, WIDTH).parts_and_loss(batch, torch.ones(B))
    assert loss.item() == 0.0
    assert len(parts) == 3
