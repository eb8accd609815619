"""What is told to have driven a score is what the network weighed by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mim_ray.ciubm.backbones import BackboneSettings, Side, build_backbone
from mim_ray.ciubm.backbones.attention import weighted
from mim_ray.ciubm.export import Ranker
from mim_ray.ciubm.interest import content_interest

B, L, D = 5, 30, 16
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "din": ("din", {}),
    "din told of content": ("din", {"content": True}),
    "sim": ("sim", {}),
    "sim, few searched": ("sim", {"num_searched": 3}),
    "sim, soft": ("sim", {"sim_search": "soft", "num_searched": 3}),
    "sim, times": ("sim", {"time_gaps": True, "num_searched": 3, "content": True}),
    "twin": ("twin", {}),
    "twin, few searched": ("twin", {"num_searched": 3}),
    "twin, by mask": ("twin", {"num_searched": 10, "content": True}),
}


def inputs(shared: bool) -> tuple[Tensor, Tensor, Tensor, Side]:
    torch.manual_seed(1)
    rows = 1 if shared else B
    mask = torch.arange(L) < torch.tensor([25] if shared else [30, 25, 7, 1, 0]).unsqueeze(1)
    side = Side(torch.rand(B, L) < 0.5, torch.rand(rows, L) * 1e6, None, torch.rand(B, L))
    return torch.randn(B, D), torch.randn(rows, L, D), mask, side


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_interest_is_the_behaviors_weighed_by_what_is_told(name: str, shared: bool) -> None:
    torch.manual_seed(0)
    backbone, options = OPTIONS[name]
    model = build_backbone(backbone, D, BackboneSettings(**options)).eval()
    target, behaviors, mask, side = inputs(shared)
    with torch.inference_mode():
        told = model.explain(target, behaviors, mask, side)  # type: ignore[operator]
        interest = model(target, behaviors, mask, side)[:, :D]
        assert told.shape[::2] == (B, L)
        assert (told[(~mask).expand(B, L).unsqueeze(1).expand_as(told)] == 0).all()
        if backbone == "din":
            expected = weighted(told, behaviors).squeeze(1)
        elif backbone == "sim":
            if "time_gaps" in options:
                from mim_ray.ciubm.backbones.gaps import gap_bucket

                behaviors = torch.cat([behaviors, model.gaps(gap_bucket(side.age_s))], dim=-1)  # type: ignore[operator]
            expected = model.exact.joined(weighted(told, behaviors))  # type: ignore[union-attr, operator]
            assert ((told != 0).sum(dim=-1) <= options.get("num_searched", 20)).all()
        else:
            expected = model.attention.joined(weighted(told, behaviors))  # type: ignore[union-attr, operator]
            assert ((told != 0).sum(dim=-1) <= options.get("num_searched", 20)).all()
    torch.testing.assert_close(interest, expected, rtol=1e-4, atol=1e-5)


def test_bst_tells_the_softmax_of_the_target_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target's row of torch's own attention, seen by values that name their token."""
    torch.manual_seed(0)
    model = build_backbone("bst", D, BackboneSettings()).eval()
    target, behaviors, mask, side = inputs(shared=False)
    seen = []

    def watched(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
        names = torch.eye(key.shape[2]).expand(*key.shape[:2], -1, -1)
        seen.append(torch.nn.functional.scaled_dot_product_attention(query, key, names, attn_mask=attn_mask))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)

    monkeypatch.setattr("mim_ray.ciubm.backbones.bst.scaled_dot_product_attention", watched)
    with torch.inference_mode():
        model(target, behaviors, mask, side)
        told = model.explain(target, behaviors, mask, side)  # type: ignore[operator]
    torch.testing.assert_close(told, seen[0][:, :, -1, :-1], rtol=1e-5, atol=1e-6)
    assert (told[0] > 0).all()


def test_dien_tells_the_gate_of_its_evolution() -> None:
    torch.manual_seed(0)
    model = build_backbone("dien", D, BackboneSettings()).eval()
    target, behaviors, mask, side = inputs(shared=False)
    with torch.inference_mode():
        told = model.explain(target, behaviors, mask, side).squeeze(1)  # type: ignore[operator]
        states = model.extraction(behaviors)[0]  # type: ignore[operator]
        torch.testing.assert_close(model(target, behaviors, mask, side), model.evolution(states, told))  # type: ignore[operator]
    torch.testing.assert_close(told.sum(dim=1), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]))


@pytest.mark.parametrize(("backbone", "has_attention"), [("din", True), ("bst", True), ("average", False)])
def test_the_ranker_tells_the_chosen_rows_as_the_mean_over_seeds(
    backbone: str, has_attention: bool, untrained_ranker: Callable[..., Ranker]
) -> None:
    ranker = untrained_ranker(backbone)
    request = ranker.request("user-1", [f"item-{n}" for n in range(9)], [f"item-{n}" for n in range(20, 32)])
    vectors = np.random.default_rng(0).normal(size=(21, 8)).astype(np.float32)
    batch = request.batch(vectors, np.ones(21, bool), [None] * 21)
    rows = np.array([4, 0, 11])
    by_id, by_content = ranker.relevance(batch, rows)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert by_content is not None
    np.testing.assert_allclose(by_content, units[9:][rows] @ units[:9].T, atol=1e-5)
    interest = content_interest(torch.from_numpy(by_content), torch.from_numpy(vectors[None, :9]), torch.ones(1, 9) > 0)
    np.testing.assert_allclose(interest, by_content @ vectors[:9], atol=1e-5)
    if not has_attention:
        assert by_id is None
        return
    alone = [ranker.of_seed(seed).relevance(batch, rows)[0] for seed in (0, 1)]
    assert by_id is not None
    np.testing.assert_allclose(by_id, np.mean(alone, axis=0), atol=1e-6)
    np.testing.assert_allclose(by_id, ranker.relevance(batch, np.arange(12))[0][rows], rtol=1e-4, atol=1e-4)  # type: ignore[index]
    assert by_id.std() > 0


def test_without_content_the_cosines_are_none(untrained_ranker: Callable[..., Ranker]) -> None:
    ranker = untrained_ranker("din", None)
    by_id, by_content = ranker.relevance(ranker.request("user-1", ["item-1"], ["item-2"]).batch(), np.array([0]))
    assert by_content is None
    assert by_id is not None
