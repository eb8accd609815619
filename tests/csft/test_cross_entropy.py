"""Table 4's v1-v3 against loops and by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mim_ray.csft.cross_entropy import BinaryObjective, CategoryObjective
from mim_ray.csft.objective import LocalBatch, Shown


def make_batch(num_pairs: int = 4, width: int = 3) -> LocalBatch:
    rng = torch.Generator().manual_seed(0)
    n = 2 * num_pairs
    everything = torch.ones(n, dtype=torch.bool)
    items = torch.randn(n, 3, width, generator=rng)
    queries = torch.randn(num_pairs, width, generator=rng)
    return LocalBatch(queries, items, everything, everything, torch.arange(n), torch.arange(n) + 100)


def make_binary(temperature: float = 0.5) -> BinaryObjective:
    return BinaryObjective(temperature=temperature, learn=True, text_loss_weight=0.5, image_loss_weight=0.25)


def term(query: Tensor, item: Tensor, label: int, bias: float) -> float:
    """Binary cross-entropy of one pair at temperature 0.5, with math alone."""
    q, i = query.tolist(), item.tolist()
    cosine = sum(x * y for x, y in zip(q, i, strict=True)) / math.hypot(*q) / math.hypot(*i)
    prob = 1 / (1 + math.exp(-(cosine / 0.5 + bias)))
    return -math.log(prob if label else 1 - prob)


def test_binary_by_hand() -> None:
    # two pairs along x and y; hard negatives opposite to them; at temperature 1 and bias 0
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    items = torch.stack([x, y, -x, -y]).unsqueeze(1).expand(4, 3, 2)
    everything = torch.ones(4, dtype=torch.bool)
    batch = LocalBatch(torch.stack([x, y]), items, everything, everything, torch.arange(4), torch.arange(4))
    result = make_binary(1.0)(batch)
    want = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-1)) + math.log(2)) / 3  # positive, hard, other pair's
    assert result.level_losses.tolist() == pytest.approx([want] * 3)
    assert result.loss.item() == pytest.approx(1.75 * want)
    assert result.num_negatives == 2
    assert result.fresh is None


def test_binary_equals_the_loop_over_labelled_items() -> None:
    """Query 0 has items shown; 1 stands on hard and batch negative; 2 bought its hard negative; 3's item has no title."""
    batch = make_batch()
    shown_items = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(1))
    everything = torch.ones(4, dtype=torch.bool)
    batch = replace(
        batch,
        has_text=torch.tensor([1, 1, 1, 0, 1, 0, 1, 1]).bool(),
        bought=(torch.tensor([2, 3]), torch.tensor([6, 30])),
        # the last two shown are none: query 1's own positive, and what query 3 bought
        shown=Shown(
            torch.tensor([0, 0, 1, 3]), shown_items, everything, everything,
            torch.tensor([20, 21, 1, 30]), torch.tensor([220, 221, 222, 223]),
        ),
    )  # fmt: skip
    objective = make_binary()
    with torch.no_grad():
        for bias in objective.biases.values():
            bias += 0.3
    result = objective(batch)
    negatives = [
        [(shown_items[0], True), (shown_items[1], True)],
        [
            (batch.items[3], False),
            (batch.items[5], False),
        ],  # item 3 (of the pair half a batch away) and 5 have no title
        [(batch.items[0], True)],
        [(batch.items[1], True), (batch.items[7], True)],
    ]
    for index, level in enumerate(("mm", "text", "image")):
        losses = []
        for i, others in enumerate(negatives):
            if level == "text" and not batch.has_text[i]:
                continue
            terms = [term(batch.queries[i], batch.items[i, index], 1, 0.3)]
            terms += [
                term(batch.queries[i], item[index], 0, 0.3) for item, has_text in others if has_text or level != "text"
            ]
            losses.append(sum(terms) / len(terms))
        assert float(result.level_losses[index]) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.num_negatives == 7 / 4


def test_no_items_shown_is_the_same_as_none_logged() -> None:
    batch = make_batch()
    nothing = torch.zeros(0, dtype=torch.int64)
    flags = torch.zeros(0, dtype=torch.bool)
    empty = replace(batch, shown=Shown(nothing, torch.zeros(0, 3, 3), flags, flags, nothing, nothing))
    assert make_binary()(empty).loss == make_binary()(batch).loss


def test_without_hard_negatives_one_item_of_the_batch_is_left() -> None:
    batch = make_batch()
    batch = replace(
        batch, items=batch.items[:4], has_text=batch.has_text[:4], has_image=batch.has_image[:4],
        item_rows=batch.item_rows[:4], contents=batch.contents[:4],
    )  # fmt: skip
    assert make_binary()(batch).num_negatives == 1


def test_categories_equal_the_loop_and_items_without_one_take_no_part() -> None:
    batch = replace(make_batch(), categories=torch.tensor([0, 2, 1, -1, 0, 1, -1, 2]))
    objective = CategoryObjective(width=3, num_categories=3)
    result = objective(batch)
    weight, bias = objective.weight.tolist(), objective.bias.tolist()
    assert batch.categories is not None
    losses = []
    for item, category in zip(batch.items[:, 0].tolist(), batch.categories.tolist(), strict=True):
        logits = [sum(w * x for w, x in zip(row, item, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
        if category >= 0:
            losses.append(math.log(sum(math.exp(logit) for logit in logits)) - logits[category])
    assert result.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.level_losses.tolist() == pytest.approx([sum(losses) / len(losses), 0.0, 0.0], rel=1e-5)
    assert result.num_negatives == 2
    none = objective(replace(batch, categories=torch.full((8,), -1)))
    assert none.loss.item() == 0.0


def test_the_query_takes_no_part_in_telling_categories() -> None:
    batch = replace(make_batch(), categories=torch.zeros(8, dtype=torch.int64))
    queries, items = batch.queries.requires_grad_(), batch.items.requires_grad_()
    CategoryObjective(width=3, num_categories=2)(replace(batch, queries=queries, items=items)).loss.backward()
    assert queries.grad is None
    assert items.grad is not None
    assert items.grad[:, 0].abs().min() > 0.0
    assert items.grad[:, 1:].abs().max() == 0.0
