"""Ranking and probability metrics as functions of arrays. Each states its grouping and weights: public ones disagree."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


def auc(label: np.ndarray, score: np.ndarray) -> float | None:
    """Chance that a random positive scores above a random negative, ties counting one half, over the whole set.

    None when there are no positives or no negatives.
    """
    positive = label.astype(bool)
    num_positives = int(positive.sum())
    num_negatives = len(positive) - num_positives
    if num_positives == 0 or num_negatives == 0:
        return None
    ranks = tied_ranks(score)
    return float((ranks[positive].sum() - num_positives * (num_positives + 1) / 2) / (num_positives * num_negatives))


def binned_auc(counts: np.ndarray) -> np.ndarray:
    """(...) AUC of rows counted by score bin and label; rows of one bin count as ties. NaN where a label is missing.

    Args:
        counts: (..., B, 2) rows by bin, lowest scores first, and label.
    """
    negatives, positives = counts[..., 0].astype(np.float64), counts[..., 1].astype(np.float64)
    below = np.cumsum(negatives, axis=-1) - 0.5 * negatives
    pairs = positives.sum(axis=-1) * negatives.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, (positives * below).sum(axis=-1) / pairs, np.nan)


class GroupAuc(NamedTuple):
    """AUC within each group that has both labels. Arrays by group, in order of the group's number."""

    group: np.ndarray
    auc: np.ndarray
    num_rows: np.ndarray

    @property
    def weighted(self) -> float | None:
        """Mean weighted by the group's rows (GAUC by impressions)."""
        return float(np.average(self.auc, weights=self.num_rows)) if len(self.auc) else None

    @property
    def unweighted(self) -> float | None:
        """Plain mean over groups."""
        return float(self.auc.mean()) if len(self.auc) else None


def group_auc(label: np.ndarray, score: np.ndarray, group: np.ndarray) -> GroupAuc:
    """AUC of each group (a user): over the whole set, ties one half, groups without both labels left out.

    Args:
        group: (N,) integer number of each row's group.
    """
    order = np.lexsort((score, group))
    of_row, scores, positive = group[order], score[order], label[order].astype(np.float64)
    starts = np.flatnonzero(np.r_[True, of_row[1:] != of_row[:-1]]) if len(of_row) else np.zeros(0, np.int64)
    num_rows = np.diff(np.r_[starts, len(of_row)])
    ranks = _sorted_ranks(scores, np.r_[True, (of_row[1:] != of_row[:-1]) | (scores[1:] != scores[:-1])])
    ranks -= np.repeat(starts, num_rows)  # rank inside the group
    num_positives = np.add.reduceat(positive, starts) if len(starts) else np.zeros(0)
    rank_sum = np.add.reduceat(ranks * positive, starts) if len(starts) else np.zeros(0)
    both = (num_positives > 0) & (num_positives < num_rows)
    pairs = num_positives[both] * (num_rows[both] - num_positives[both])
    values = (rank_sum[both] - num_positives[both] * (num_positives[both] + 1) / 2) / pairs
    return GroupAuc(of_row[starts][both], values, num_rows[both])


def log_loss(label: np.ndarray, prob: np.ndarray) -> float | None:
    """Mean negative log-likelihood in nats; probabilities are kept 1e-7 away from 0 and 1. None without rows."""
    return float(row_log_loss(label, prob).mean()) if len(label) else None


def row_log_loss(label: np.ndarray, prob: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each row."""
    prob = np.clip(prob.astype(np.float64), 1e-7, 1 - 1e-7)
    return -np.where(label.astype(bool), np.log(prob), np.log1p(-prob))


def calibration(label: np.ndarray, prob: np.ndarray) -> float | None:
    """Mean predicted probability divided by the share of positives; 1 is calibrated, None without positives."""
    mean = float(label.mean()) if len(label) else 0.0
    return float(prob.mean()) / mean if mean > 0 else None


def recall_at_k(rank: np.ndarray, k: int) -> float | None:
    """Share of queries whose positive is among the first k; `rank` counts from 1. None without queries."""
    return float((rank <= k).mean()) if len(rank) else None


def mrr(rank: np.ndarray) -> float | None:
    """Mean of 1 / rank of the positive; `rank` counts from 1. None without queries."""
    return float((1.0 / rank).mean()) if len(rank) else None


def tied_ranks(score: np.ndarray) -> np.ndarray:
    """(N,) rank from 1, lowest first; equal scores share their mean rank."""
    order = np.argsort(score, kind="stable")
    ordered = score[order]
    ranks = np.empty(len(score))
    ranks[order] = _sorted_ranks(ordered, np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)])
    return ranks


def _sorted_ranks(ordered: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Mean rank from 1 of each row of a sorted array; `first` marks where a run of equal values starts."""
    if not len(ordered):
        return np.zeros(0)
    starts = np.flatnonzero(first)
    lengths = np.diff(np.r_[starts, len(ordered)])
    return np.repeat(starts + (lengths + 1) / 2, lengths)
