"""Hard negatives: which items may be drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mim_ray.csft.hard_negatives import HardNegativeSampler, hard_negative_weights

NOTHING = (np.zeros(0, np.int64), np.zeros(0, np.int64))


def test_a_hard_negative_is_another_item_of_the_category_that_the_user_did_not_buy() -> None:
    categories = np.array([0, 0, 0, 0, 1, 1, 1, 2, -1])
    contents = np.array([1, 2, 2, 3, 4, 5, 6, 7, 8])
    eligible = np.array([1, 1, 1, 1, 1, 1, 0, 1, 1], bool)
    sampler = HardNegativeSampler(categories, contents, eligible)
    positives = np.array([1, 1, 4] * 50)
    bought = (np.arange(150)[1::3], np.full(50, 3))  # the second query of three bought item 3
    drawn = sampler.draw(positives, bought, np.random.default_rng(0))
    assert set(drawn.rows[0::3]) == {0, 3}  # item 2 has the same content as item 1
    assert set(drawn.rows[1::3]) == {0}
    assert set(drawn.rows[2::3]) == {5}  # item 6 may not be drawn
    assert drawn.num_other_category == 0


def test_a_lonely_category_takes_any_other_item_and_is_counted() -> None:
    sampler = HardNegativeSampler(np.array([0, 0, 2, -1]), np.arange(4), np.ones(4, bool))
    drawn = sampler.draw(np.array([2, 3, 0]), NOTHING, np.random.default_rng(1))
    assert drawn.num_other_category == 2
    assert drawn.rows[0] != 2
    assert drawn.rows[1] != 3
    assert drawn.rows[2] == 1
    alone = HardNegativeSampler(np.array([0]), np.zeros(1, np.int64), np.ones(1, bool))
    assert alone.draw(np.array([0]), NOTHING, np.random.default_rng(1)).num_other_category == 1


def test_draws_depend_on_the_seed_alone() -> None:
    sampler = HardNegativeSampler(np.zeros(100, np.int64), np.arange(100), np.ones(100, bool))
    first, again, other = (sampler.draw(np.arange(20), NOTHING, np.random.default_rng(s)).rows for s in (5, 5, 6))
    assert (first == again).all()
    assert (first != other).any()


def share_of_draws(sampler: HardNegativeSampler, positive: int, num: int) -> list[float]:
    """Of many draws for one positive, the share of each item up to the last one drawn."""
    drawn = sampler.draw(np.full(num, positive), NOTHING, np.random.default_rng(3))
    return (np.bincount(drawn.rows) / num).tolist()


def chance_by_loop(
    item: int,
    positive: int,
    counts: list[int],
    categories: list[int],
    contents: list[int],
    eligible: list[bool],
    power: float,
) -> float:
    """How probable `item` is as the hard negative of `positive`, written from the definition."""
    weights = {}
    for other in range(len(counts)):
        may = eligible[other] and categories[other] == categories[positive]
        if may and other != positive and contents[other] != contents[positive]:
            weights[other] = math.pow(counts[other] + 0.1, power)
    return weights.get(item, 0.0) / math.fsum(weights.values())


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("positive", [0, 3, 5])
def test_items_are_drawn_by_their_training_pairs_to_the_power(power: float, positive: int) -> None:
    counts = [40, 4, 0, 9, 1, 7, 2]
    categories, contents = [0, 0, 0, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 1]
    eligible = [True, True, True, True, True, False, True]
    weights = hard_negative_weights(np.array(counts), power)
    sampler = HardNegativeSampler(np.array(categories), np.array(contents), np.array(eligible), weights)
    want = [chance_by_loop(item, positive, counts, categories, contents, eligible, power) for item in range(7)]
    assert sum(want) == pytest.approx(1.0)
    assert share_of_draws(sampler, positive, 40_000) == pytest.approx(want, abs=0.012)


def test_an_item_that_has_nearly_all_pairs_leaves_the_others_their_shares() -> None:
    """Then draws keep hitting the positive, and the look through the category decides."""
    weights = hard_negative_weights(np.array([10**9, 3, 1, 0]), 1.0)
    sampler = HardNegativeSampler(np.zeros(4, np.int64), np.arange(4), np.ones(4, bool), weights)
    want = [0.0, 3.1 / 4.3, 1.1 / 4.3, 0.1 / 4.3]
    assert share_of_draws(sampler, 0, 5_000) == pytest.approx(want, abs=0.025)


def test_without_any_pairs_every_power_draws_evenly() -> None:
    for power in (0.0, 1.0):
        weights = hard_negative_weights(np.zeros(4, np.int64), power)
        sampler = HardNegativeSampler(np.zeros(4, np.int64), np.arange(4), np.ones(4, bool), weights)
        assert share_of_draws(sampler, 1, 20_000) == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3], abs=0.015)


def test_drawn_by_pairs_an_item_is_as_often_negative_as_positive() -> None:
    counts = np.random.default_rng(0).integers(0, 30, 60)
    categories = np.arange(60) % 2
    positives = np.tile(np.repeat(np.arange(60), counts), 60)
    ratios = {}
    for power in (0.0, 1.0):
        weights = hard_negative_weights(counts, power)
        sampler = HardNegativeSampler(categories, np.arange(60), np.ones(60, bool), weights)
        drawn = sampler.draw(positives, NOTHING, np.random.default_rng(1)).rows
        ratios[power] = np.bincount(drawn, minlength=60) / np.maximum(np.bincount(positives, minlength=60), 1)
    often, rare = counts >= 5, (counts > 0) & (counts < 5)
    assert ratios[1.0][often] == pytest.approx(1.0, abs=0.2)
    assert ratios[0.0][rare].min() > 2.5  # drawn evenly, rare items are negatives far more often


def test_a_lonely_category_takes_any_other_item_whatever_the_weights() -> None:
    weights = hard_negative_weights(np.array([0, 5, 100]), 1.0)
    sampler = HardNegativeSampler(np.array([0, 1, 1]), np.arange(3), np.ones(3, bool), weights)
    drawn = sampler.draw(np.zeros(1_000, np.int64), NOTHING, np.random.default_rng(1))
    assert drawn.num_other_category == 1_000
    assert np.bincount(drawn.rows, minlength=3)[1:] / 1_000 == pytest.approx([0.5, 0.5], abs=0.06)
