"""Slices of a test set: the ten age buckets of the paper's Figure 6, buckets by creation time, categories."""

from __future__ import annotations

import numpy as np

NUM_BUCKETS = 10


def age_buckets(target: np.ndarray, first_positive_at: np.ndarray) -> np.ndarray:
    """(N,) bucket 1-10 of each row by its target's age in train.

    S1: targets without a positive in train. S2-S10: nine bins by first positive in train, newest first, nearly equal
    in rows; an item is in one bin only.

    Args:
        target: (N,) number of the target item.
        first_positive_at: (N,) time of the target's first positive in train; a negative number without one.
    """
    bucket = np.ones(len(target), np.int64)
    seen = first_positive_at >= 0
    bucket[seen] = 2 + newest_first_bins(target[seen], first_positive_at[seen], NUM_BUCKETS - 1)
    return bucket


def created_buckets(target: np.ndarray, created_at: np.ndarray) -> np.ndarray:
    """(N,) bucket 1-10 by the target's creation time, newest first, nearly equal in rows; 0 where it is unknown (< 0)."""
    bucket = np.zeros(len(target), np.int64)
    known = created_at >= 0
    bucket[known] = 1 + newest_first_bins(target[known], created_at[known], NUM_BUCKETS)
    return bucket


def newest_first_bins(item: np.ndarray, time: np.ndarray, num_bins: int) -> np.ndarray:
    """(N,) bin 0.. of each row: items ordered by time, newest first, cut where the rows are nearly equal.

    An item goes to the bin in which the middle of its rows falls.
    """
    if not len(item):
        return np.zeros(0, np.int64)
    items, first, inverse, counts = np.unique(item, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((items, -time[first]))
    before = np.cumsum(counts[order]) - counts[order]
    middle = before + counts[order] / 2
    bins = np.empty(len(items), np.int64)
    bins[order] = np.minimum((middle * num_bins / len(item)).astype(np.int64), num_bins - 1)
    return bins[inverse]
