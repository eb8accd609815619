"""95 % intervals by resampling users: rows of one user stand or fall together, and two models see the same resamples."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mim_ray.evaluation.metrics import GroupAuc

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A value with the ends of its 95 % interval; all None when it cannot be computed."""

    value: float | None
    low: float | None
    high: float | None


def user_weights(num_users: int, num_resamples: int, seed: int) -> np.ndarray:
    """(R, users) float32: how often each user was drawn in each resample of `num_users` draws with replacement."""
    generator = np.random.default_rng(seed)
    weights = np.zeros((num_resamples, num_users), np.float32)
    for row in weights:
        row += np.bincount(generator.integers(0, num_users, num_users), minlength=num_users)
    return weights


def auc_resamples(label: np.ndarray, score: np.ndarray, user: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,) AUC, ties one half, of every resample; NaN where one lacks a label.

    Args:
        user: (N,) number of each row's user, a column of `weights`.
        weights: (R, users) from user_weights.
    """
    order = np.argsort(score, kind="stable")
    ordered, positive, of_user = score[order], label[order].astype(bool), user[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, np.int64)
    values = np.full(len(weights), np.nan)
    if not len(starts):
        return values
    for number, drawn in enumerate(weights):
        weight = drawn[of_user].astype(np.float64)
        of_positives = np.add.reduceat(np.where(positive, weight, 0.0), starts)  # by distinct score
        of_negatives = np.add.reduceat(np.where(positive, 0.0, weight), starts)
        total = of_positives.sum() * of_negatives.sum()
        if total > 0:
            below = np.cumsum(of_negatives) - 0.5 * of_negatives
            values[number] = (of_positives * below).sum() / total
    return values


def group_resamples(groups: GroupAuc, weights: np.ndarray, *, by_rows: bool) -> np.ndarray:
    """(R,) GAUC of every resample, groups being users: weighted by rows, or the plain mean."""
    if not len(groups.auc):
        return np.full(len(weights), np.nan)
    share = weights[:, groups.group] * (groups.num_rows if by_rows else 1.0)
    with np.errstate(invalid="ignore"):
        return (share @ groups.auc) / share.sum(axis=1)


def mean_resamples(row_values: np.ndarray, user: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,) mean over rows (a log loss) of every resample."""
    num_users = weights.shape[1]
    sums = np.bincount(user, row_values, num_users)
    counts = np.bincount(user, minlength=num_users)
    with np.errstate(invalid="ignore"):
        return (weights @ sums) / (weights @ counts)


def interval(value: float | None, resamples: np.ndarray) -> Estimate:
    """The value with the 2.5 % and 97.5 % quantiles of its resamples."""
    kept = resamples[np.isfinite(resamples)]
    if value is None or not len(kept):
        return Estimate(value, None, None)
    low, high = np.quantile(kept, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high))


def difference(value: float | None, base: float | None, resamples: np.ndarray, base_resamples: np.ndarray) -> Estimate:
    """value - base with the interval of the paired difference: both have the same resamples of users."""
    if value is None or base is None:
        return Estimate(None, None, None)
    return interval(value - base, resamples - base_resamples)
