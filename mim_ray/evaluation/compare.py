"""Several models on the same test rows: each metric with its interval, and paired differences, over all rows or a slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mim_ray.evaluation.bootstrap import Estimate, difference, group_weights, interval, ratio_resamples, user_groups
from mim_ray.evaluation.metrics import group_auc
from mim_ray.evaluation.rows import Columns, Parts
from mim_ray.evaluation.tally import MAX_BINS, SAMPLE_ROWS, Score, ScoreBins, Tally, UserTally

Pairs = Mapping[str, tuple[str, str]]
"""Name of a difference -> the model and what it is compared with."""


class Comparison:
    """Scores of models and of model-free rows, judged with the same resamples of users.

    Args:
        rows: columns user (uint64 hash), item (number of the target), label (0, 1, or -1 for rows that are not judged)
            and one for each score.
        models: columns that are probabilities, with GAUC, log loss, calibration and slices.
        references: columns that are any score; of them only the AUC over all rows.
        slices: kinds of slices: for each, the slice of every item (-1 for none), counted over all kinds from 1.
        num_slices: of all kinds.
        folder: an empty scratch folder.
        min_label_rows: no AUC of a slice with fewer rows of either label.
    """

    def __init__(
        self,
        rows: Columns,
        *,
        models: Sequence[str],
        references: Sequence[str],
        slices: Sequence[np.ndarray],
        num_slices: int,
        folder: Path,
        num_bootstrap: int,
        min_label_rows: int,
        seed: int = 0,
        max_bins: int = MAX_BINS,
    ) -> None:
        self.models, self.min_label_rows = list(models), min_label_rows
        self.scores: dict[str, Score] = {}
        self.weights = np.zeros((0, 0))
        for name in [*models, *references]:  # a tally takes hundreds of MB: one at a time
            kinds, number = (slices, num_slices) if name in models else ((), 0)
            tally = Tally(_bins(rows, name, max_bins), 1 + number, is_prob=name in models)
            _count(rows, name, tally, kinds)
            if not len(self.weights):
                self.weights = group_weights(tally.occupied, num_bootstrap, seed)
            self.scores[name] = tally.score(self.weights)
        self.num_users, self.users = _by_user(rows, models, folder)

    def metrics(self, pairs: Pairs) -> tuple[dict[str, Any], dict[str, Any]]:
        """All metrics of the models over all rows, and the differences of pairs of them.

        Returns:
            model -> {auc, gauc, gauc_unweighted, log_loss, calibration, reliability, auc_error}; pair -> {model, over, auc,
            gauc, gauc_unweighted, log_loss}. GAUC is by user: weighted by rows, and the plain mean over users with both labels.
        """
        values = {model: self._values(model) for model in self.models}
        drawn = {model: self._resamples(model) for model in self.models}
        single = {
            model: {
                **{name: as_json(interval(values[model][name], drawn[model][name])) for name in values[model]},
                "auc_error": self.scores[model].auc_error[0],
                "calibration": self.scores[model].calibration[0],
                "reliability": self.scores[model].reliability,
            }
            for model in self.models
        }
        paired: dict[str, Any] = {
            pair: {
                "model": model,
                "over": base,
                **{
                    name: as_json(
                        difference(values[model][name], values[base][name], drawn[model][name], drawn[base][name])
                    )
                    for name in values[model]
                },
            }
            for pair, (model, base) in pairs.items()
        }
        return single, paired

    def auc(self, name: str) -> Estimate:
        """Of a model or reference over all rows."""
        return interval(self.scores[name].auc[0], self.scores[name].auc_resamples[0])

    def closed_ratio(self, base: str, model: str, ideal: str) -> dict[str, float | None]:
        """(model - base) / (ideal - base) in AUC, with its interval."""
        low, middle, high = (self.scores[name].auc[0] for name in (base, model, ideal))
        if low is None or middle is None or high is None:
            return as_json(Estimate(None, None, None))
        drawn = [self.scores[name].auc_resamples[0] for name in (base, model, ideal)]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = (drawn[1] - drawn[0]) / (drawn[2] - drawn[0])
        return as_json(interval((middle - low) / (high - low) if high != low else None, ratios))

    def slice(self, number: int, pairs: Pairs) -> dict[str, Any]:
        """Number of rows, AUC and calibration of each model and the AUC's difference of each pair in one slice."""
        negatives, positives = self.scores[self.models[0]].label_rows[number]
        result: dict[str, Any] = {
            "num_rows": negatives + positives,
            "num_positives": positives,
            "auc": {},
            "difference": {},
            "calibration": {model: self.scores[model].calibration[number] for model in self.models},
        }
        if min(positives, negatives) < self.min_label_rows:
            return result
        values = {model: self.scores[model].auc[number] for model in self.models}
        drawn = {model: self.scores[model].auc_resamples[number] for model in self.models}
        result["auc"] = {model: as_json(interval(values[model], drawn[model])) for model in self.models}
        result["difference"] = {
            pair: as_json(difference(values[model], values[base], drawn[model], drawn[base]))
            for pair, (model, base) in pairs.items()
        }
        return result

    def _values(self, model: str) -> dict[str, float | None]:
        score, users = self.scores[model], self.users[model]
        return {
            "auc": score.auc[0],
            "gauc": users.value(by_rows=True),
            "gauc_unweighted": users.value(by_rows=False),
            "log_loss": score.log_loss,
        }

    def _resamples(self, model: str) -> dict[str, np.ndarray]:
        score, users = self.scores[model], self.users[model]
        return {
            "auc": score.auc_resamples[0],
            "gauc": ratio_resamples(*users.sums(by_rows=True), self.weights),
            "gauc_unweighted": ratio_resamples(*users.sums(by_rows=False), self.weights),
            "log_loss": score.log_loss_resamples,
        }


def streamed_auc(rows: Columns, name: str) -> float | None:
    """AUC of one score over all judged rows."""
    tally = Tally(_bins(rows, name, MAX_BINS), 1, is_prob=False)
    _count(rows, name, tally, ())
    return tally.auc()


def as_json(estimate: Estimate) -> dict[str, float | None]:
    """{"value", "low", "high"}."""
    return estimate._asdict()


def _bins(rows: Columns, name: str, max_bins: int) -> ScoreBins:
    num_rows = rows.num_rows(name)
    complete = num_rows <= SAMPLE_ROWS
    chosen = np.arange(num_rows)
    if not complete:
        chosen = np.unique(np.random.default_rng(0).integers(0, num_rows, SAMPLE_ROWS))
    return ScoreBins(rows.take(name, chosen)[rows.take("label", chosen) >= 0], complete, max_bins)


def _count(rows: Columns, name: str, tally: Tally, slices: Sequence[np.ndarray]) -> None:
    for user, item, label, score in rows.chunks("user", "item", "label", name):
        judged = label >= 0
        tally.add(
            label[judged].astype(np.int64),
            score[judged],
            user_groups(user[judged]),
            [of_item[item[judged]] for of_item in slices],
        )


def _by_user(rows: Columns, models: Sequence[str], folder: Path) -> tuple[int, dict[str, UserTally]]:
    """Number of users of the judged rows and each model's AUC within users: all rows of a user are met together."""
    fields = [(f"score{number}", "f8") for number in range(len(models))]
    parts = Parts(folder / "by-user", [("user", "u8"), ("label", "i1"), *fields], rows.num_rows("user"))
    for user, label, *scores in rows.chunks("user", "label", *models):
        judged = label >= 0
        values = {field: score[judged] for (field, _), score in zip(fields, scores, strict=True)}
        parts.add(user[judged], user=user[judged], label=label[judged], **values)
    tallies = {model: UserTally() for model in models}
    num_users = 0
    for records in parts.read():
        users, number = np.unique(records["user"], return_inverse=True)
        num_users += len(users)
        for model, (field, _) in zip(models, fields, strict=True):
            found = group_auc(records["label"], records[field], number)
            tallies[model].add(found, user_groups(users[found.group]))
    return num_users, tallies
