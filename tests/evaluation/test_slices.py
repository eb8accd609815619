"""Age buckets: SPEC section 2."""

from __future__ import annotations

import itertools

import numpy as np

from mim_ray.evaluation.slices import age_buckets, created_buckets, exposure_buckets, newest_first_bins


def test_targets_without_a_positive_in_train_are_s1() -> None:
    assert age_buckets(np.array([3, 1, 2]), np.array([-1, 50, -1]))[[0, 2]].tolist() == [0, 0]


def test_bins_are_newest_first_and_nearly_equal_in_rows() -> None:
    generator = np.random.default_rng(0)
    rows = np.bincount(generator.integers(0, 400, 9_000), minlength=400)
    time = np.arange(400) * 7919 % 1009 + 1
    bucket = age_buckets(rows, time)
    counts = np.bincount(bucket, rows, minlength=10)[1:]
    assert counts.min() > 900
    assert counts.max() < 1_100
    newest_first = [time[bucket == b] for b in range(1, 10)]
    assert all(a.min() >= b.max() for a, b in itertools.pairwise(newest_first))


def test_bins_by_hand() -> None:
    assert newest_first_bins(np.array([2, 1, 1]), np.array([30, 20, 10]), 2).tolist() == [0, 1, 1]
    assert newest_first_bins(np.zeros(0, np.int64), np.zeros(0), 3).tolist() == []
    assert newest_first_bins(np.zeros(2, np.int64), np.arange(2), 3).tolist() == [0, 0]


def test_unknown_creation_time_is_in_no_bucket() -> None:
    assert created_buckets(np.array([1, 1]), np.array([-1, 5])).tolist() == [-1, 5]


def test_exposure_by_hand() -> None:
    assert exposure_buckets(np.array([0, 1, 5, 6, 20, 21, 900])).tolist() == [0, 1, 1, 2, 2, 3, 3]
