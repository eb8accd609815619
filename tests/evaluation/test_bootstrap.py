"""Resampled metrics equal the metric of the resampled rows."""

from __future__ import annotations

import numpy as np
import pytest

from mim_ray.data.ids import hash_ids
from mim_ray.evaluation.bootstrap import (
    NUM_GROUPS,
    auc_resamples,
    difference,
    group_weights,
    interval,
    ratio_resamples,
    user_groups,
)
from mim_ray.evaluation.metrics import auc


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores of 11 values, groups."""
    generator = np.random.default_rng(1)
    label = (generator.random(300) < 0.4).astype(np.int64)
    return label, np.round(10 * (generator.random(300) + 0.3 * label)).astype(int), generator.integers(0, 40, 300)


def test_resampled_auc_equals_auc_of_the_repeated_rows(rows: tuple[np.ndarray, ...]) -> None:
    label, score, group = rows
    counts = np.zeros((40, 14, 2))
    np.add.at(counts, (group, score, label), 1)
    weights = group_weights(np.ones(40, bool), 5, seed=0)
    for value, drawn in zip(auc_resamples(counts, weights), weights, strict=True):
        chosen = np.repeat(np.arange(300), drawn[group].astype(int))
        assert value == pytest.approx(auc(label[chosen], score[chosen]), abs=1e-12)


def test_resampled_mean_equals_mean_of_the_repeated_rows(rows: tuple[np.ndarray, ...]) -> None:
    _, score, group = rows
    weights = group_weights(np.ones(40, bool), 5, seed=0)
    found = ratio_resamples(np.bincount(group, score, 40), np.bincount(group, minlength=40), weights)
    for value, drawn in zip(found, weights, strict=True):
        assert value == pytest.approx(np.average(score, weights=drawn[group]), abs=1e-12)


def test_as_many_groups_are_drawn_as_have_users_and_none_that_has_not() -> None:
    occupied = np.arange(NUM_GROUPS) < 50
    weights = group_weights(occupied, 4, seed=1)
    assert weights.sum(axis=1).tolist() == [50.0] * 4
    assert not weights[:, 50:].any()
    assert np.array_equal(weights, group_weights(occupied, 4, seed=1))
    assert not group_weights(np.zeros(8, bool), 2, seed=0).any()


def test_users_spread_evenly_over_groups() -> None:
    groups = user_groups(hash_ids([f"user-{number}" for number in range(200_000)]))
    counts = np.bincount(groups, minlength=NUM_GROUPS)
    assert len(counts) == NUM_GROUPS
    assert 120 < counts.min() < counts.max() < 280  # 195 each, standard deviation 14


def test_a_model_does_not_differ_from_itself() -> None:
    drawn = np.random.default_rng(0).random(20)
    assert difference(0.7, 0.7, drawn, drawn) == (0.0, 0.0, 0.0)
    assert interval(None, drawn).low is None
