"""Several models on the same rows: each metric with its interval, and paired differences, over all rows or a slice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mim_ray.evaluation.bootstrap import (
    Estimate,
    auc_resamples,
    difference,
    group_resamples,
    interval,
    mean_resamples,
    user_weights,
)
from mim_ray.evaluation.metrics import auc, calibration, group_auc, row_log_loss


class Comparison:
    """Scores of several models on N rows, judged with the same resamples of users.

    Args:
        label: (N,) 0 or 1. user: (N,) number of the row's user, 0 .. U - 1.
        scores: model -> (N,) score; a probability where log loss and calibration are asked for.
        min_label_rows: no AUC of a slice with fewer rows of either label.
    """

    def __init__(
        self,
        label: np.ndarray,
        user: np.ndarray,
        scores: Mapping[str, np.ndarray],
        *,
        num_bootstrap: int,
        min_label_rows: int,
        seed: int = 0,
    ) -> None:
        self.label, self.user, self.scores = label, user, scores
        self.min_label_rows = min_label_rows
        self._weights = user_weights(int(user.max(initial=-1)) + 1, num_bootstrap, seed)

    def metrics(self, models: list[str], pairs: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """All metrics of `models` over all rows, and the differences of each model in `pairs` to its base.

        Returns:
            model -> {auc, gauc, gauc_unweighted, log_loss, calibration}; model -> {over, auc, gauc, gauc_unweighted,
            log_loss}. GAUC is by user: weighted by rows, and the plain mean over users with both labels.
        """
        values: dict[str, dict[str, float | None]] = {}
        resamples: dict[str, dict[str, np.ndarray]] = {}
        for model in models:
            score = self.scores[model]
            groups = group_auc(self.label, score, self.user)
            losses = row_log_loss(self.label, score)
            values[model] = {
                "auc": auc(self.label, score),
                "gauc": groups.weighted,
                "gauc_unweighted": groups.unweighted,
                "log_loss": float(losses.mean()) if len(losses) else None,
            }
            resamples[model] = {
                "auc": auc_resamples(self.label, score, self.user, self._weights),
                "gauc": group_resamples(groups, self._weights, by_rows=True),
                "gauc_unweighted": group_resamples(groups, self._weights, by_rows=False),
                "log_loss": mean_resamples(losses, self.user, self._weights),
            }
        single = {
            model: {
                **{name: as_json(interval(values[model][name], resamples[model][name])) for name in values[model]},
                "calibration": calibration(self.label, self.scores[model]),
            }
            for model in models
        }
        paired: dict[str, Any] = {
            model: {
                "over": base,
                **{
                    name: as_json(
                        difference(
                            values[model][name], values[base][name], resamples[model][name], resamples[base][name]
                        )
                    )
                    for name in values[model]
                },
            }
            for model, base in pairs.items()
        }
        return single, paired

    def closed_ratio(self, base: str, model: str, ideal: str) -> dict[str, float | None]:
        """(model - base) / (ideal - base) in AUC, with its interval."""
        found = [auc(self.label, self.scores[name]) for name in (base, model, ideal)]
        if any(value is None for value in found):
            return as_json(Estimate(None, None, None))
        low, middle, high = (float(value) for value in found if value is not None)
        drawn = [
            auc_resamples(self.label, self.scores[name], self.user, self._weights) for name in (base, model, ideal)
        ]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = (drawn[1] - drawn[0]) / (drawn[2] - drawn[0])
        return as_json(interval((middle - low) / (high - low) if high != low else None, ratios))

    def slice(self, rows: np.ndarray, models: list[str], pairs: Mapping[str, str]) -> dict[str, Any]:
        """Number of rows, AUC of each model and of each pair's difference where `rows` (bool) is True."""
        label, user = self.label[rows], self.user[rows]
        num_positives = int(label.sum())
        result: dict[str, Any] = {"num_rows": len(label), "num_positives": num_positives, "auc": {}, "difference": {}}
        if min(num_positives, len(label) - num_positives) < self.min_label_rows:
            return result
        values = {model: auc(label, self.scores[model][rows]) for model in models}
        drawn = {model: auc_resamples(label, self.scores[model][rows], user, self._weights) for model in models}
        result["auc"] = {model: as_json(interval(values[model], drawn[model])) for model in models}
        result["difference"] = {
            model: as_json(difference(values[model], values[base], drawn[model], drawn[base]))
            for model, base in pairs.items()
        }
        return result


def as_json(estimate: Estimate) -> dict[str, float | None]:
    """{"value", "low", "high"}."""
    return estimate._asdict()
