"""What an A/B test says: CTR and RPM by arm, their differences with 95 % intervals, and whether the split is as intended.

    CTR = clicked exposed items / exposed items             an item that was clicked twice in one answer counts once
    RPM = 1,000 · revenue of exposed items / exposed items  any event's revenue; refunds are negative

Exposures and events meet by (request_id, item_id). Both metrics are ratios of sums over users, and one user's exposures are
alike, so intervals come from resampling users, never rows (evaluation/bootstrap.py): whole users, by their hash, with
replacement. Arms hold different users, but are resampled together: the difference of a resample is one number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from mim_ray.errors import DataError
from mim_ray.evaluation.bootstrap import NUM_GROUPS, Estimate, group_weights, interval, ratio_resamples, user_groups
from mim_ray.serving.events import event_log, without_repeated
from mim_ray.serving.exposures import exposure_log

NUM_RESAMPLES = 2_000
MISMATCH = 0.001  # below this p-value the split is not the intended one: an error, not chance
METRICS = ("ctr", "rpm")
_SUMS = ("exposures", "clicks", "revenue")


@dataclass
class ArmSums:
    """What one arm adds up to, by group of users.

    Attributes:
        models: model version -> exposed items that it ranked.
    """

    sums: np.ndarray = field(default_factory=lambda: np.zeros((len(_SUMS), NUM_GROUPS)))
    users: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    num_requests: int = 0
    models: Counter[str] = field(default_factory=Counter)

    def total(self, name: str) -> float:
        return float(self.sums[_SUMS.index(name)].sum())

    def ratio(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Numerator and denominator by group, (G,) each."""
        exposures, clicks, revenue = self.sums
        return (clicks, exposures) if metric == "ctr" else (1_000.0 * revenue, exposures)


@dataclass(frozen=True)
class Comparison:
    """An arm against the base: metric -> arm - base, and the same in percent of the base."""

    arm: str
    difference: Mapping[str, Estimate]
    percent: Mapping[str, Estimate]


@dataclass(frozen=True)
class AbResult:
    """
    Attributes:
        values: arm -> metric -> value with its interval. comparisons: of each arm but the base.
        mismatch_p: chance of a split at least as uneven as this one where all is right; None where there is one arm.
        expected: share of the users that each arm should have. num_users_in_several_arms: their arm changed meanwhile.
        num_unmatched: clicks and revenue events whose request and item were not among the exposures.
    """

    base: str
    arms: Mapping[str, ArmSums]
    values: Mapping[str, Mapping[str, Estimate]]
    comparisons: Sequence[Comparison]
    expected: Mapping[str, float]
    mismatch_p: float | None
    num_users_in_several_arms: int
    num_unmatched: int

    @property
    def mismatched(self) -> bool:
        return self.mismatch_p is not None and self.mismatch_p < MISMATCH


def analyse(
    center: str,
    weights: Mapping[str, float],
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    click_events: Sequence[str] = ("click",),
    base: str | None = None,
    seed: int = 0,
) -> AbResult:
    """Compare the arms of the exposures that were shown from `since` to before `until`.

    Args:
        weights: of the arms, as configured; where it lacks an arm that was logged, or there are none, equal shares are expected.
        base: the arm that others are compared with. Default: the first of `weights`, else by name.

    Raises:
        DataError: no exposures with an arm in that time, or none of the arm `base`.
    """
    outcomes = _outcomes(without_repeated(event_log(center).read(since)), click_events)
    arms: dict[str, ArmSums] = {}
    num_matched = 0
    for rows in exposure_log(center).read_newest_first(since, until):
        num_matched += _add(rows.filter(rows["arm"].is_valid()), outcomes, arms)
    if not arms:
        raise DataError(
            f"{center}/exposures has none of an A/B test in that time. Set serving.arms, and wait until rankings are asked for."
        )
    order = [*[name for name in weights if name in arms], *sorted(arms.keys() - weights.keys())]
    base = order[0] if base is None else base
    if base not in arms:
        raise DataError(f"No exposures of the arm {base!r} in that time; there are those of {', '.join(order)}.")
    even = not arms.keys() <= weights.keys()
    return compare(
        {name: arms[name] for name in order},
        {name: 1.0 if even else weight for name, weight in (dict.fromkeys(order, 1.0) if even else weights).items()},
        base=base,
        num_unmatched=outcomes.num_rows - num_matched,
        seed=seed,
    )


def compare(
    arms: Mapping[str, ArmSums], weights: Mapping[str, float], *, base: str, num_unmatched: int = 0, seed: int = 0
) -> AbResult:
    """The result of sums by arm."""
    occupied = np.zeros(NUM_GROUPS, bool)
    for arm in arms.values():
        occupied[user_groups(arm.users)] = True
    drawn = group_weights(occupied, NUM_RESAMPLES, seed)  # (R, G)
    resamples = {
        name: {metric: ratio_resamples(*arm.ratio(metric), drawn) for metric in METRICS} for name, arm in arms.items()
    }
    values = {
        name: {metric: interval(_ratio(arm, metric), resamples[name][metric]) for metric in METRICS}
        for name, arm in arms.items()
    }
    comparisons = []
    for name in arms:
        if name != base:
            difference, percent = {}, {}
            for metric in METRICS:
                ours, theirs = values[name][metric].value, values[base][metric].value
                one, other = resamples[name][metric], resamples[base][metric]
                known = ours is not None and theirs is not None
                difference[metric] = interval(ours - theirs if known else None, one - other)  # type: ignore[operator]
                with np.errstate(invalid="ignore", divide="ignore"):
                    relative = 100.0 * (one / other - 1.0)
                percent[metric] = interval(100.0 * (ours / theirs - 1.0) if known and theirs else None, relative)  # type: ignore[operator]
            comparisons.append(Comparison(name, difference, percent))
    total = sum(weights.values())
    expected = {name: weight / total for name, weight in weights.items()}
    counts = {name: len(arms[name].users) if name in arms else 0 for name in expected}
    everyone = np.concatenate([arm.users for arm in arms.values()])
    return AbResult(
        base,
        arms,
        values,
        comparisons,
        expected,
        mismatch_p_value([counts[name] for name in expected], list(expected.values())),
        int((np.unique(everyone, return_counts=True)[1] > 1).sum()),
        num_unmatched,
    )


def mismatch_p_value(counts: Sequence[int], expected: Sequence[float]) -> float | None:
    """Chi-square test of the number of users by arm against the intended shares; None for a single arm."""
    if len(counts) < 2 or not sum(counts):
        return None
    wanted = np.array(expected) * sum(counts)
    statistic = float(((np.array(counts) - wanted) ** 2 / wanted).sum())
    half = torch.tensor([(len(counts) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def _outcomes(events: pa.Table, click_events: Sequence[str]) -> pa.Table:
    """(request_id, item_id, clicked, revenue), one row for each request and item with a click or revenue."""
    click = pc.fill_null(pc.is_in(events["event"], pa.array(list(click_events), pa.string())), False)
    table = pa.table(
        {
            "request_id": events["request_id"],
            "item_id": events["item_id"],
            "clicked": pc.cast(click, pa.int8()),
            "revenue": pc.fill_null(events["revenue"], 0.0),
        }
    )
    counts = pc.and_(events["request_id"].is_valid(), pc.or_(click, events["revenue"].is_valid()))
    by = table.filter(counts).group_by(["request_id", "item_id"]).aggregate([("clicked", "max"), ("revenue", "sum")])
    return by.rename_columns(["request_id", "item_id", "clicked", "revenue"])


def _add(exposures: pa.Table, outcomes: pa.Table, arms: dict[str, ArmSums]) -> int:
    """Add exposures, each with what became of it, to the sums of their arms; how many outcomes they met."""
    shown = exposures.select(["request_id", "item_id", "user_hash", "arm", "release"])  # an answer ranks an item once
    joined = shown.join(outcomes, ["request_id", "item_id"])
    num_matched = 0
    for name in pc.unique(joined["arm"]).to_pylist():
        rows = joined.filter(pc.equal(joined["arm"], name))
        hashes = _hashes(rows["user_hash"])
        group = user_groups(hashes)
        arm = arms.setdefault(name, ArmSums())
        columns = (np.ones(len(group)), _filled(rows["clicked"]), _filled(rows["revenue"]))
        arm.sums += [np.bincount(group, column, NUM_GROUPS) for column in columns]
        arm.users = np.union1d(arm.users, hashes)
        arm.num_requests += pc.count_distinct(rows["request_id"]).as_py()
        for met in pc.value_counts(rows["release"]).to_pylist():
            model, _, _ = str(met["values"]).partition("@")  # another release of it is no other model
            arm.models[model] += met["counts"]
        num_matched += rows.num_rows - rows["clicked"].null_count
    return num_matched


def _hashes(column: pa.ChunkedArray) -> np.ndarray:
    """(n,) uint64: the first 16 hexadecimal digits."""
    codes = column.combine_chunks().dictionary_encode()
    codes = codes.combine_chunks() if isinstance(codes, pa.ChunkedArray) else codes
    numbers = np.array([int(text[:16], 16) for text in codes.dictionary.to_pylist()], np.uint64)
    return numbers[codes.indices.to_numpy()]


def _filled(column: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(column.cast(pa.float64()), 0.0).to_numpy()


def _ratio(arm: ArmSums, metric: str) -> float | None:
    numerator, denominator = arm.ratio(metric)
    return float(numerator.sum() / denominator.sum()) if denominator.sum() else None
