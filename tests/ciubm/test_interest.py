"""Eqs. 7-9 against loops written from the paper, invariants, and cases by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mim_ray.ciubm.interest import (
    content_interest,
    content_relevance,
    fusion_interest,
    relevance_and_comparable,
    similarity_histogram,
    similarity_summary,
)


def _cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b)))


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """target (3, 4), MM behaviors (3, 5, 4), ID behaviors (3, 5, 2), mask with 5, 2 and 0 real behaviors."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return draw(3, 4), draw(3, 5, 4), draw(3, 5, 2), mask


def test_equations_7_and_8_equal_a_loop_over_behaviors(case: tuple[torch.Tensor, ...]) -> None:
    target, behaviors, ids, mask = case
    relevance = content_relevance(target, behaviors, mask)
    content = content_interest(relevance, behaviors, mask)
    fusion = fusion_interest(relevance, ids, mask)
    for row in range(3):
        expected_content, expected_fusion = [0.0] * 4, [0.0] * 2
        for i in range(int(mask[row].sum())):
            weight = _cosine(target[row].tolist(), behaviors[row, i].tolist())
            assert relevance[row, i].item() == pytest.approx(weight, abs=1e-6)
            expected_content = [
                s + weight * h for s, h in zip(expected_content, behaviors[row, i].tolist(), strict=True)
            ]
            expected_fusion = [s + weight * h for s, h in zip(expected_fusion, ids[row, i].tolist(), strict=True)]
        assert content[row].tolist() == pytest.approx(expected_content, abs=1e-5)
        assert fusion[row].tolist() == pytest.approx(expected_fusion, abs=1e-5)


def test_by_hand() -> None:
    target = torch.tensor([[3.0, 0.0]])
    behaviors = torch.tensor([[[2.0, 0.0], [0.0, 5.0], [1.0, 1.0]]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    relevance = content_relevance(target, behaviors, mask)
    half = math.sqrt(0.5)
    assert relevance[0].tolist() == pytest.approx([1.0, 0.0, half])
    assert content_interest(relevance, behaviors, mask)[0].tolist() == pytest.approx([2 + half, half])
    assert content_interest(relevance, behaviors, mask, "mean")[0].tolist() == pytest.approx([(2 + half) / 3, half / 3])
    scale = math.log(4)
    assert content_interest(relevance, behaviors, mask, "log")[0, 0].item() == pytest.approx((2 + half) / scale)


def test_what_padding_holds_changes_nothing(case: tuple[torch.Tensor, ...]) -> None:
    target, behaviors, ids, mask = case
    changed = torch.where(mask.unsqueeze(-1), behaviors, 1e3)
    before, after = content_relevance(target, behaviors, mask), content_relevance(target, changed, mask)
    assert torch.equal(before, after)
    assert torch.equal(content_interest(before, behaviors, mask), content_interest(after, changed, mask))
    assert torch.equal(similarity_histogram(before, mask, 21), similarity_histogram(after, mask, 21))
    assert fusion_interest(after, ids, mask)[2].abs().sum() == 0


def test_scale_of_the_target_and_order_of_behaviors_do_not_matter(case: tuple[torch.Tensor, ...]) -> None:
    target, behaviors, _, mask = case
    relevance = content_relevance(target, behaviors, mask)
    assert torch.allclose(relevance, content_relevance(7 * target, behaviors, mask), atol=1e-6)
    order = torch.tensor([4, 2, 0, 1, 3])
    shuffled = content_relevance(target, behaviors[:, order], mask[:, order])
    whole = content_interest(relevance, behaviors, mask)
    assert torch.allclose(whole, content_interest(shuffled, behaviors[:, order], mask[:, order]), atol=1e-5)


def test_an_item_without_content_has_no_likeness_and_no_nan() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    behaviors = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    assert content_relevance(torch.tensor([[1.0, 0.0]]), behaviors, mask).tolist() == [[0.0, 1.0]]
    assert content_relevance(torch.zeros(1, 2), behaviors, mask).tolist() == [[0.0, 0.0]]


def test_histogram_equals_a_loop_and_counts_what_is_counted(case: tuple[torch.Tensor, ...]) -> None:
    target, behaviors, _, mask = case
    relevance = content_relevance(target, behaviors, mask)
    histogram = similarity_histogram(relevance, mask, 5)  # centres -1, -0.5, 0, 0.5, 1
    for row in range(3):
        counts = [0.0] * 5
        for i in range(int(mask[row].sum())):
            place = (relevance[row, i].item() + 1) / 0.5
            lower = min(int(place), 3)
            counts[lower] += 1 - (place - lower)
            counts[lower + 1] += place - lower
        assert histogram[row].tolist() == pytest.approx([math.log(1 + c) for c in counts], abs=1e-5)
    assert torch.allclose(histogram.expm1().sum(dim=1), mask.sum(dim=1).float(), atol=1e-4)


def test_histogram_by_hand() -> None:
    relevance = torch.tensor([[-1.0, 1.0, 0.25, 0.0]])
    counted = torch.tensor([[True, True, True, False]])
    expected = [math.log(2), 0, math.log(1.5), math.log(1.5), math.log(2)]
    assert similarity_histogram(relevance, counted, 5)[0].tolist() == pytest.approx(expected)


def test_comparable_are_real_behaviors_with_content_of_a_target_with_content() -> None:
    behaviors = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]] * 2)
    target = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    mask = torch.tensor([[True, True, False]] * 2)
    relevance, comparable = relevance_and_comparable(target, behaviors, mask)
    assert comparable.tolist() == [[True, False, False], [False] * 3]
    assert relevance.tolist() == [[1.0, 0.0, 0.0], [0.0] * 3]


def test_summary_equals_a_loop(case: tuple[torch.Tensor, ...]) -> None:
    target, behaviors, _, mask = case
    relevance = content_relevance(target, behaviors, mask)
    comparable = mask.clone()
    comparable[0, 3] = False
    summary = similarity_summary(relevance, comparable)
    for row in range(3):
        cosines = [relevance[row, i].item() for i in range(5) if comparable[row, i]]
        if not cosines:
            assert summary[row].tolist() == [0.0, 0.0, 0.0]
            continue
        weights = [0.5 ** (newer / 10) for newer in reversed(range(len(cosines)))]
        recent = sum(w * c for w, c in zip(weights, cosines, strict=True)) / sum(weights)
        assert summary[row].tolist() == pytest.approx([sum(cosines) / len(cosines), max(cosines), recent], abs=1e-6)
