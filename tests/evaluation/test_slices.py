"""Age buckets: SPEC section 2."""

from __future__ import annotations

import itertools

import numpy as np

from mim_ray.evaluation.slices import age_buckets, created_buckets, newest_first_bins


def test_targets_without_a_positive_in_train_are_s1() -> None:
    target = np.array([0, 1, 2, 0])
    assert age_buckets(target, np.array([-1, 50, -1, -1]))[[0, 2, 3]].tolist() == [1, 1, 1]


def test_bins_are_newest_first_nearly_equal_and_never_split_an_item() -> None:
    generator = np.random.default_rng(0)
    item = generator.integers(0, 400, 9_000)
    time = (item * 7919 % 1009 + 1)[:]
    bucket = age_buckets(item, time)
    counts = np.bincount(bucket, minlength=11)[2:]
    assert counts.min() > 900
    assert counts.max() < 1_100
    for number in range(400):
        assert len(set(bucket[item == number].tolist())) == 1
    newest_first = [time[bucket == b] for b in range(2, 11)]
    assert all(a.min() >= b.max() for a, b in itertools.pairwise(newest_first))


def test_bins_by_hand() -> None:
    item, time = np.array([5, 5, 6, 7]), np.array([30, 30, 20, 10])
    assert newest_first_bins(item, time, 2).tolist() == [0, 0, 1, 1]
    assert newest_first_bins(np.zeros(0, np.int64), np.zeros(0), 3).tolist() == []


def test_unknown_creation_time_is_in_no_bucket() -> None:
    assert created_buckets(np.array([0, 1]), np.array([-1, 5])).tolist()[0] == 0
