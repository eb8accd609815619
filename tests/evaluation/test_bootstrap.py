"""Resampled metrics equal the metric of the resampled rows."""

from __future__ import annotations

import numpy as np
import pytest

from mim_ray.evaluation.bootstrap import (
    auc_resamples,
    difference,
    group_resamples,
    interval,
    mean_resamples,
    user_weights,
)
from mim_ray.evaluation.compare import Comparison
from mim_ray.evaluation.metrics import auc, group_auc


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    label = (generator.random(300) < 0.4).astype(np.int64)
    return label, np.round(generator.random(300) + 0.3 * label, 1), generator.integers(0, 40, 300)


def _repeated(user: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Row numbers of a resample, written out."""
    return np.repeat(np.arange(len(user)), drawn[user].astype(int))


def test_weighted_auc_equals_auc_of_the_repeated_rows(rows: tuple[np.ndarray, ...]) -> None:
    label, score, user = rows
    weights = user_weights(40, 5, seed=0)
    for value, drawn in zip(auc_resamples(label, score, user, weights), weights, strict=True):
        chosen = _repeated(user, drawn)
        assert value == pytest.approx(auc(label[chosen], score[chosen]), abs=1e-12)


def test_weighted_mean_equals_mean_of_the_repeated_rows(rows: tuple[np.ndarray, ...]) -> None:
    _, score, user = rows
    weights = user_weights(40, 5, seed=0)
    for value, drawn in zip(mean_resamples(score, user, weights), weights, strict=True):
        assert value == pytest.approx(score[_repeated(user, drawn)].mean(), abs=1e-6)


def test_weighted_gauc_equals_a_loop(rows: tuple[np.ndarray, ...]) -> None:
    label, score, user = rows
    groups, weights = group_auc(label, score, user), user_weights(40, 3, seed=0)
    for by_rows in (True, False):
        for value, drawn in zip(group_resamples(groups, weights, by_rows=by_rows), weights, strict=True):
            shares = [drawn[g] * (n if by_rows else 1) for g, n in zip(groups.group, groups.num_rows, strict=True)]
            assert value == pytest.approx(np.average(groups.auc, weights=shares), abs=1e-6)


def test_resamples_draw_as_many_users_as_there_are() -> None:
    weights = user_weights(50, 4, seed=1)
    assert weights.sum(axis=1).tolist() == [50.0] * 4
    assert np.array_equal(weights, user_weights(50, 4, seed=1))


def test_a_model_does_not_differ_from_itself(rows: tuple[np.ndarray, ...]) -> None:
    label, score, user = rows
    drawn = auc_resamples(label, score, user, user_weights(40, 20, seed=0))
    assert difference(0.7, 0.7, drawn, drawn) == (0.0, 0.0, 0.0)
    assert interval(None, drawn).low is None


def test_comparison_finds_the_better_model_and_refuses_small_slices() -> None:
    generator = np.random.default_rng(3)
    user = generator.integers(0, 200, 4000)
    prob = generator.random(4000)
    label = (generator.random(4000) < prob).astype(np.int64)
    scores = {"a-base": np.clip(prob + generator.normal(size=4000), 0.01, 0.99), "a-mim": prob}
    comparison = Comparison(label, user, scores, num_bootstrap=50, min_label_rows=20)
    models, differences = comparison.metrics(["a-base", "a-mim"], {"a-mim": "a-base"})
    assert differences["a-mim"]["auc"]["low"] > 0
    assert differences["a-mim"]["log_loss"]["high"] < 0
    assert models["a-mim"]["calibration"] == pytest.approx(1.0, abs=0.05)
    few = np.arange(4000) < 30
    assert comparison.slice(few, ["a-mim"], {})["auc"] == {}
    assert comparison.closed_ratio("a-base", "a-mim", "a-mim")["value"] == 1.0
