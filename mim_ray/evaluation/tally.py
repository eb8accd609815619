"""What is counted of one model's scores while the test rows pass by once: enough for all metrics and their intervals.

Nothing here grows with the rows. The AUC comes from a histogram of scores with up to MAX_BINS bins: exact as long as
every bin holds one distinct score (always so up to MAX_BINS rows), else within `auc_error`, which counts the pairs of a positive and a
negative that share a bin of several scores; with bins of equal mass it is about 1 / (2 MAX_BINS) = 2e-6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mim_ray.evaluation.bootstrap import NUM_GROUPS, auc_resamples, ratio_resamples
from mim_ray.evaluation.metrics import GroupAuc, binned_auc, row_log_loss

SAMPLE_ROWS = 2**20
MAX_BINS = 2**18
_COARSE_BINS = 256
_RELIABILITY_BINS = 10


class ScoreBins:
    """Where the axis of scores is cut: into F fine bins for values, and coarse ones (sets of fine bins) for resamples.

    Args:
        sample: scores of a random sample of the rows, or of all.
        complete: whether it is all of them.
    """

    def __init__(self, sample: np.ndarray, complete: bool, max_bins: int = MAX_BINS) -> None:
        distinct = np.unique(sample)
        if complete and len(distinct) <= max_bins:
            self.edges = distinct[1:]
            self.single = np.ones(len(distinct), bool)
        else:
            quantiles = np.sort(sample)[np.arange(1, max_bins) * len(sample) // max_bins]
            cuts, repeats = np.unique(quantiles, return_counts=True)
            frequent = cuts[repeats > 1]  # such a score gets a bin of its own
            self.edges = np.union1d(cuts, np.nextafter(frequent, np.inf))
            self.single = np.concatenate([[False], np.isin(self.edges, frequent)])
        counts = np.bincount(self.of(sample), minlength=len(self.edges) + 1)
        if len(counts) <= _COARSE_BINS:
            self.coarse = np.arange(len(counts))
        else:
            middle = np.cumsum(counts) - counts / 2
            self.coarse = np.minimum((middle * _COARSE_BINS / counts.sum()).astype(np.int64), _COARSE_BINS - 1)

    def __len__(self) -> int:
        return len(self.edges) + 1

    def of(self, score: np.ndarray) -> np.ndarray:
        """(N,) fine bin of each score."""
        return np.searchsorted(self.edges, score, side="right")


@dataclass(frozen=True)
class Score:
    """What a tally comes to: lists and rows by slice, slice 0 being all rows.

    Attributes:
        label_rows: negatives and positives. auc: None without both. auc_error: most that it can be wrong by.
        auc_resamples: (slices, R). calibration: sum of probabilities over positives, None without positives.
        log_loss, log_loss_resamples, reliability: over all rows.
    """

    label_rows: list[tuple[int, int]]
    auc: list[float | None]
    auc_error: list[float]
    auc_resamples: np.ndarray
    calibration: list[float | None]
    log_loss: float | None
    log_loss_resamples: np.ndarray
    reliability: dict[str, Any]


class Tally:
    """Counts of one score by slice, bin, group of users and label. Slice 0 is all rows.

    Args:
        is_prob: whether log loss and calibration are asked for.
    """

    def __init__(self, bins: ScoreBins, num_slices: int, *, is_prob: bool) -> None:
        self.bins, self.is_prob = bins, is_prob
        self._fine = np.zeros((num_slices, len(bins), 2), np.uint32)
        self._grouped = np.zeros((num_slices, NUM_GROUPS, int(bins.coarse[-1]) + 1, 2), np.uint32)
        self._rows_by_group = np.zeros(NUM_GROUPS)
        self._loss_by_group = np.zeros(NUM_GROUPS)
        self._prob_by_slice = np.zeros(num_slices)
        self._prob_by_bin = np.zeros(len(bins))

    def add(self, label: np.ndarray, score: np.ndarray, group: np.ndarray, slices: Sequence[np.ndarray]) -> None:
        """
        Args:
            label: (N,) 0 or 1. group: (N,) from user_groups.
            slices: kinds of slices beside all rows, each (N,) with the slice of each row, -1 for none.
        """
        fine = self.bins.of(score)
        coarse = self.bins.coarse[fine]
        self._rows_by_group += np.bincount(group, minlength=NUM_GROUPS)
        if self.is_prob:
            self._loss_by_group += np.bincount(group, row_log_loss(label, score), NUM_GROUPS)
            self._prob_by_bin += np.bincount(fine, score, len(self.bins))
        for number in (np.zeros(len(label), np.int64), *slices):
            kept = slice(None) if number.min(initial=0) >= 0 else number >= 0
            of, labels = number[kept], label[kept]
            place = (of * self._fine.shape[1] + fine[kept]) * 2 + labels
            np.add.at(self._fine.reshape(-1), place, 1)
            place = ((of * NUM_GROUPS + group[kept]) * self._grouped.shape[2] + coarse[kept]) * 2 + labels
            np.add.at(self._grouped.reshape(-1), place, 1)
            if self.is_prob:
                self._prob_by_slice += np.bincount(of, score[kept], len(self._prob_by_slice))

    @property
    def occupied(self) -> np.ndarray:
        """(G,) bool: groups that have rows."""
        return self._rows_by_group > 0

    def score(self, weights: np.ndarray) -> Score:
        """
        Args:
            weights: (R, G) from group_weights.
        """
        numbers = range(len(self._fine))
        rows = self._rows_by_group.sum()
        return Score(
            label_rows=[self._label_rows(number) for number in numbers],
            auc=[self.auc(number) for number in numbers],
            auc_error=[self._auc_error(number) for number in numbers],
            auc_resamples=np.stack([self._auc_resamples(weights, number) for number in numbers]),
            calibration=[self._calibration(number) for number in numbers],
            log_loss=float(self._loss_by_group.sum() / rows) if rows else None,
            log_loss_resamples=ratio_resamples(self._loss_by_group, self._rows_by_group, weights),
            reliability=self._reliability(),
        )

    def auc(self, number: int = 0) -> float | None:
        """Of a slice; None without both labels."""
        value = float(binned_auc(self._fine[number]))
        return None if np.isnan(value) else value

    def _label_rows(self, number: int) -> tuple[int, int]:
        negatives, positives = self._fine[number].sum(axis=0, dtype=np.int64).tolist()
        return negatives, positives

    def _auc_error(self, number: int) -> float:
        """Half of the pairs of both labels that share a bin of several scores, as a part of all pairs."""
        several = self._fine[number][~self.bins.single].astype(np.float64)
        negatives, positives = self._label_rows(number)
        return float(several.prod(axis=1).sum() / 2 / max(1, negatives * positives))

    def _auc_resamples(self, weights: np.ndarray, number: int) -> np.ndarray:
        """From coarse bins, moved by what these take from the AUC of all rows: a bin's own order hardly varies."""
        counts = self._grouped[number]
        coarse = binned_auc(counts.sum(axis=0, dtype=np.int64))
        if np.isnan(coarse):
            return np.full(len(weights), np.nan)
        return auc_resamples(counts, weights) + (binned_auc(self._fine[number]) - coarse)

    def _calibration(self, number: int) -> float | None:
        _, positives = self._label_rows(number)
        return float(self._prob_by_slice[number] / positives) if positives else None

    def _reliability(self) -> dict[str, Any]:
        """Mean probability and share of positives in ten bins of about equal numbers of rows, lowest first, and the mean
        distance of the two over rows (expected calibration error)."""
        rows = self._fine[0].sum(axis=1, dtype=np.int64)
        before = np.cumsum(rows) - rows
        of_bin = before * _RELIABILITY_BINS // max(1, int(rows.sum()))
        count = np.bincount(of_bin, rows, _RELIABILITY_BINS)
        filled = count > 0
        prob = np.bincount(of_bin, self._prob_by_bin, _RELIABILITY_BINS)[filled] / count[filled]
        positive = np.bincount(of_bin, self._fine[0][:, 1], _RELIABILITY_BINS)[filled] / count[filled]
        error = float((np.abs(prob - positive) * count[filled]).sum() / max(1, count.sum()))
        return {
            "mean_prob": prob.tolist(),
            "positive_ratio": positive.tolist(),
            "num_rows": count[filled].astype(int).tolist(),
            "expected_error": error if filled.any() else None,
        }


class UserTally:
    """Sums over users of the AUC within each, by group of users; users without both labels are left out."""

    def __init__(self) -> None:
        self._sums = np.zeros((4, NUM_GROUPS))  # AUC times rows, rows, AUC, users

    def add(self, users: GroupAuc, group: np.ndarray) -> None:
        """
        Args:
            group: (U,) group of each of the users.
        """
        for row, values in zip(self._sums, (users.auc * users.num_rows, users.num_rows, users.auc, None), strict=True):
            row += np.bincount(group, values, NUM_GROUPS)

    def sums(self, *, by_rows: bool) -> tuple[np.ndarray, np.ndarray]:
        """Numerator and denominator of GAUC by group: weighted by the users' rows, or the plain mean over users."""
        first = 0 if by_rows else 2
        return self._sums[first], self._sums[first + 1]

    def value(self, *, by_rows: bool) -> float | None:
        numerator, denominator = self.sums(by_rows=by_rows)
        return float(numerator.sum() / denominator.sum()) if denominator.sum() else None
