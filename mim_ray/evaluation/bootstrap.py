"""95 % intervals by resampling users: rows of one user stand or fall together, and all models see the same resamples.

Users are put into NUM_GROUPS groups by their hash, and whole groups are drawn with replacement. Of up to a few hundred
users nearly each is a group of its own; of a billion, a group is a random thousandth of them. Drawing random groups of users has the same variance as
drawing users (only the estimate of that variance is noisier, by 2 % with a thousand groups, less than by a few
hundred resamples), and sums by group are all that has to be kept, whatever the number of users, rows and resamples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mim_ray.evaluation.metrics import binned_auc

CONFIDENCE = 0.95
NUM_GROUPS = 1_024


class Estimate(NamedTuple):
    """A value with the ends of its 95 % interval; all None when it cannot be computed."""

    value: float | None
    low: float | None
    high: float | None


def user_groups(user_hash: np.ndarray) -> np.ndarray:
    """(N,) group of each user's 64-bit hash."""
    return (user_hash % np.uint64(NUM_GROUPS)).astype(np.int64)


def group_weights(occupied: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """(R, G) float64: how often each group was drawn in each resample, as many draws as groups have users.

    Args:
        occupied: (G,) bool, whether a group has a user.
    """
    groups = np.flatnonzero(occupied)
    generator = np.random.default_rng(seed)
    weights = np.zeros((num_resamples, len(occupied)))
    for row in weights if len(groups) else ():
        row += np.bincount(groups[generator.integers(0, len(groups), len(groups))], minlength=len(occupied))
    return weights


def auc_resamples(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,) AUC of every resample, rows of one bin counting as ties; NaN where one lacks a label.

    Args:
        counts: (G, B, 2) rows of each group by score bin, ascending, and label.
        weights: (R, G) from group_weights.
    """
    drawn = (weights @ counts.reshape(len(counts), -1)).reshape(len(weights), *counts.shape[1:])
    return binned_auc(drawn)


def ratio_resamples(numerator: np.ndarray, denominator: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,) ratio of sums (a mean over rows or users) of every resample, from the sums by group (G,)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ numerator) / (weights @ denominator)


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
