"""Metrics against scikit-learn, loops and cases by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from mim_ray.evaluation.metrics import auc, calibration, group_auc, log_loss, mrr, recall_at_k


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores with many ties, groups; some groups have one label only."""
    generator = np.random.default_rng(0)
    label = (generator.random(500) < 0.3).astype(np.int64)
    score = np.round(generator.random(500) + 0.2 * label, 1) / 2
    return label, score, generator.integers(0, 120, 500)


def test_auc_equals_scikit_learn(rows: tuple[np.ndarray, ...]) -> None:
    label, score, _ = rows
    assert auc(label, score) == pytest.approx(roc_auc_score(label, score), abs=1e-12)


def test_auc_counts_pairs_and_ties_as_half() -> None:
    label, score = np.array([1, 0, 1, 0]), np.array([0.4, 0.4, 0.9, 0.1])
    assert auc(label, score) == pytest.approx((0.5 + 1 + 1 + 1) / 4)


def test_auc_needs_both_labels() -> None:
    assert auc(np.ones(3), np.arange(3.0)) is None
    assert auc(np.zeros(0), np.zeros(0)) is None


def test_gauc_equals_a_loop_over_users(rows: tuple[np.ndarray, ...]) -> None:
    label, score, group = rows
    values, weights = [], []
    for number in np.unique(group):
        chosen = group == number
        if 0 < label[chosen].sum() < chosen.sum():
            values.append(roc_auc_score(label[chosen], score[chosen]))
            weights.append(chosen.sum())
    found = group_auc(label, score, group)
    assert found.weighted == pytest.approx(np.average(values, weights=weights), abs=1e-12)
    assert found.unweighted == pytest.approx(np.mean(values), abs=1e-12)
    assert found.num_rows.tolist() == weights


def test_gauc_without_any_usable_user_is_none() -> None:
    found = group_auc(np.array([1, 0]), np.array([0.5, 0.5]), np.array([0, 1]))
    assert found.weighted is None
    assert found.unweighted is None
    assert group_auc(np.zeros(0), np.zeros(0), np.zeros(0, np.int64)).weighted is None


def test_log_loss_equals_scikit_learn(rows: tuple[np.ndarray, ...]) -> None:
    label, score, _ = rows
    assert log_loss(label, np.clip(score, 0.01, 0.99)) == pytest.approx(
        sklearn_log_loss(label, np.clip(score, 0.01, 0.99)), abs=1e-9
    )
    assert np.isfinite(log_loss(np.array([1]), np.array([0.0])) or 0.0)


def test_calibration_and_retrieval_by_hand() -> None:
    assert calibration(np.array([1, 0]), np.array([0.5, 0.25])) == pytest.approx(0.75)
    assert calibration(np.zeros(2), np.ones(2)) is None
    ranks = np.array([1, 2, 10])
    assert recall_at_k(ranks, 2) == pytest.approx(2 / 3)
    assert mrr(ranks) == pytest.approx((1 + 0.5 + 0.1) / 3)
    assert mrr(np.zeros(0)) is None
