"""Splits by time, and the age buckets of the report."""

import numpy as np
import pytest

from mim_ray.config.scenario import Samples
from mim_ray.data.splits import Split, age_shares, iso, split_by_time
from mim_ray.errors import ConfigError

DAY = 86_400_000_000


def test_shares_by_time_are_as_configured():
    times = np.random.default_rng(0).permutation(10_000) * 1_000_000 + DAY
    split = split_by_time(times, Samples(validation_ratio=0.1, test_ratio=0.2))
    assert np.bincount(split.of(times)).tolist() == [7_000, 1_000, 2_000]


def test_configured_instants_win_and_days_are_not_cut():
    times = np.arange(100) * DAY // 10
    assert split_by_time(times, Samples(validation_start="1970-01-03", test_start="1970-01-05T00:00:00Z")) == Split(
        2 * DAY, 4 * DAY
    )
    split = split_by_time(times + 7, Samples(time_resolution="day"))
    assert split.validation_start % DAY == 0
    assert split.test_start % DAY == 0
    given = split_by_time(times, Samples(test_start="1970-01-06"))
    assert given.test_start == 5 * DAY
    assert given.validation_start == times[45]


def test_contradicting_instants_are_config_errors():
    with pytest.raises(ConfigError, match="no ISO time"):
        split_by_time(np.arange(3), Samples(test_start="yesterday"))
    with pytest.raises(ConfigError, match="after test"):
        split_by_time(np.arange(3), Samples(validation_start="2020-01-02", test_start="2020-01-01"))
    with pytest.raises(ConfigError, match="nothing is left"):
        split_by_time(np.arange(3), Samples(validation_ratio=0.5, test_ratio=0.5))


def test_age_buckets_are_newest_first_and_nearly_equal_in_rows():
    first = np.concatenate([[-1, -1], np.arange(90)])
    buckets = age_shares(first, np.full(92, 10), np.concatenate([[1, 1], np.full(45, 2), np.full(45, 5)]))
    assert [b["bucket"] for b in buckets] == [f"S{i}" for i in range(1, 11)]
    assert buckets[0] == {"bucket": "S1", "num_rows": 20, "positive_ratio": 0.1}
    assert [b["num_rows"] for b in buckets[1:]] == [100] * 9
    assert buckets[1]["positive_ratio"] == 0.5  # the newest
    assert buckets[-1]["positive_ratio"] == 0.2
    assert age_shares(np.array([-1]), np.array([3]), np.array([0]))[1]["positive_ratio"] is None


def test_iso_keeps_microseconds():
    assert iso(1_000_001) == "1970-01-01T00:00:01.000001+00:00"
