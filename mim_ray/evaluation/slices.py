"""Slices of a test set by its target items: the ten age buckets of the paper's Figure 6, creation time, exposure.

All functions are by item: they take what is known of I items and return the bucket of each.
"""

from __future__ import annotations

import numpy as np

NUM_BUCKETS = 10
EXPOSURES = ("0", "1-5", "6-20", "21 or more")
"""Positives of the target in train."""


def age_buckets(num_rows: np.ndarray, first_positive_at: np.ndarray) -> np.ndarray:
    """(I,) bucket 0-9 of each item by its age in train: S1 to S10.

    S1: items without a positive in train. S2-S10: nine bins by first positive in train, newest first, nearly equal in
    test rows; an item is in one bin only.

    Args:
        num_rows: (I,) test rows with this target.
        first_positive_at: (I,) time of the first positive in train; a negative number without one.
    """
    bucket = np.zeros(len(num_rows), np.int64)
    seen = first_positive_at >= 0
    bucket[seen] = 1 + newest_first_bins(num_rows[seen], first_positive_at[seen], NUM_BUCKETS - 1)
    return bucket


def created_buckets(num_rows: np.ndarray, created_at: np.ndarray) -> np.ndarray:
    """(I,) bucket 0-9 by creation time, newest first, nearly equal in test rows; -1 where it is unknown (< 0)."""
    bucket = np.full(len(num_rows), -1, np.int64)
    known = created_at >= 0
    bucket[known] = newest_first_bins(num_rows[known], created_at[known], NUM_BUCKETS)
    return bucket


def exposure_buckets(num_train_positives: np.ndarray) -> np.ndarray:
    """(I,) place in EXPOSURES of each item."""
    return np.searchsorted([1, 6, 21], num_train_positives, side="right")


def newest_first_bins(num_rows: np.ndarray, time: np.ndarray, num_bins: int) -> np.ndarray:
    """(I,) bin 0.. of each item: items ordered by time, newest first, cut where the rows are nearly equal.

    An item goes to the bin in which the middle of its rows falls.
    """
    total = int(num_rows.sum())
    order = np.argsort(-time, kind="stable")
    before = np.cumsum(num_rows[order]) - num_rows[order]
    middle = before + num_rows[order] / 2
    bins = np.zeros(len(num_rows), np.int64)
    bins[order] = np.minimum((middle * num_bins / max(1, total)).astype(np.int64), num_bins - 1)
    return bins
