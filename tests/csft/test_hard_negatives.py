"""Hard negatives: which items may be drawn."""

from __future__ import annotations

import numpy as np

from mim_ray.csft.hard_negatives import HardNegativeSampler

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
