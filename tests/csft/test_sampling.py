"""How often items are met in a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mim_ray.csft.hard_negatives import HardNegativeSampler, hard_negative_weights
from mim_ray.csft.sampling import log_q, sampling_rates


def test_by_hand() -> None:
    # category 0: items 0, 1, 2 (2 may not be drawn); category 1: item 3 alone; item 4 has none
    counts, categories = np.array([5, 1, 2, 1, 1]), np.array([0, 0, 0, 1, -1])
    eligible = np.array([1, 1, 0, 1, 1], bool)
    rates = sampling_rates(counts, categories, eligible, np.ones(5))
    # item 0's hard negative is item 1; item 1's is item 0; item 2's is either; items 3 and 4 take any of four
    anywhere = 0.2 / 4
    want = [0.5 + 0.1 + 0.1 + anywhere, 0.1 + 0.5 + 0.1 + anywhere, 0.2, 0.1 + anywhere, 0.1 + anywhere]
    assert rates.tolist() == pytest.approx(want)
    assert rates.sum() == pytest.approx(2.0)
    by_weight = sampling_rates(counts, categories, eligible, np.array([3.0, 1.0, 5.0, 1.0, 1.0]))
    assert by_weight.tolist() == pytest.approx([0.5 + 0.1 + 0.15 + anywhere, 0.1 + 0.5 + 0.05 + anywhere, *want[2:]])


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_rates_are_the_frequencies_of_the_sampler(power: float) -> None:
    rng = np.random.default_rng(0)
    counts, categories = rng.integers(0, 9, 30) ** 2, rng.integers(-1, 6, 30)
    eligible = rng.random(30) < 0.8
    weights = hard_negative_weights(counts, power)
    sampler = HardNegativeSampler(categories, np.arange(30), eligible, weights)
    pairs = np.repeat(np.arange(30), counts)
    nothing = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    num_repeats = 100
    drawn = sampler.draw(np.tile(pairs, num_repeats), nothing, rng).rows
    met = np.bincount(pairs, minlength=30) / len(pairs) + np.bincount(drawn, minlength=30) / len(drawn)
    assert np.abs(sampling_rates(counts, categories, eligible, weights) - met).max() < 0.01


def test_without_hard_negatives_only_the_pairs_count_and_the_unseen_are_as_rare_as_the_rarest() -> None:
    rates = sampling_rates(np.array([3, 1, 0]), np.zeros(3, int), np.ones(3, bool), None)
    assert rates.tolist() == [0.75, 0.25, 0.0]
    assert log_q(rates).tolist() == pytest.approx([math.log(0.75), math.log(0.25), math.log(0.25)])
    assert log_q(np.zeros(2)).tolist() == [0.0, 0.0]
