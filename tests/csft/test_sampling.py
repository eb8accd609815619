"""How often items are met in a batch."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_ray.csft.hard_negatives import HardNegativeSampler
from mim_ray.csft.sampling import log_q, pair_counts, sampling_rates
from mim_ray.data.catalogue import Catalogue


def test_by_hand() -> None:
    # category 0: items 0, 1, 2 (2 may not be drawn); category 1: item 3 alone; item 4 has none
    rates = sampling_rates(
        np.array([5, 1, 2, 1, 1]), np.array([0, 0, 0, 1, -1]), np.array([1, 1, 0, 1, 1], bool), hard_negatives=True
    )
    # item 0's hard negative is item 1; item 1's is item 0; item 2's is either; items 3 and 4 take any of four
    anywhere = 0.2 / 4
    want = [0.5 + 0.1 + 0.1 + anywhere, 0.1 + 0.5 + 0.1 + anywhere, 0.2, 0.1 + anywhere, 0.1 + anywhere]
    assert rates.tolist() == pytest.approx(want)
    assert rates.sum() == pytest.approx(2.0)


def test_rates_are_the_frequencies_of_the_sampler() -> None:
    rng = np.random.default_rng(0)
    counts, categories = rng.integers(0, 9, 30) ** 2, rng.integers(-1, 6, 30)
    eligible = rng.random(30) < 0.8
    sampler = HardNegativeSampler(categories, np.arange(30), eligible)
    pairs = np.repeat(np.arange(30), counts)
    nothing = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    num_repeats = 200
    drawn = sampler.draw(np.tile(pairs, num_repeats), nothing, rng).rows
    met = np.bincount(pairs, minlength=30) / len(pairs) + np.bincount(drawn, minlength=30) / len(drawn)
    assert np.abs(sampling_rates(counts, categories, eligible, hard_negatives=True) - met).max() < 0.01


def test_without_hard_negatives_only_the_pairs_count_and_the_unseen_are_as_rare_as_the_rarest() -> None:
    rates = sampling_rates(np.array([3, 1, 0]), np.zeros(3, int), np.ones(3, bool), hard_negatives=False)
    assert rates.tolist() == [0.75, 0.25, 0.0]
    assert log_q(rates).tolist() == pytest.approx([math.log(0.75), math.log(0.25), math.log(0.25)])
    assert log_q(np.zeros(2)).tolist() == [0.0, 0.0]


def test_pairs_are_counted_by_item_and_signal(samples: str) -> None:
    catalogue = Catalogue.open(f"{samples}/catalogue")
    table = pq.read_table(f"{samples}/interest_pairs").to_pylist()
    for signal in ("any", "click"):
        want = np.zeros(catalogue.num_items, int)
        for row in table:
            if signal in ("any", row["signal"]):
                want[int(catalogue.rows(pa.array([row["item_id"]]))[0])] += 1
        assert pair_counts(f"{samples}/interest_pairs", catalogue, signal).tolist() == want.tolist()
