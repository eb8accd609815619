"""Counting while rows pass by gives what the metrics of all rows at once give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from mim_ray.data.ids import hash_ids
from mim_ray.evaluation import rows as rows_module
from mim_ray.evaluation.bootstrap import user_groups
from mim_ray.evaluation.compare import Comparison, streamed_auc
from mim_ray.evaluation.metrics import auc, group_auc
from mim_ray.evaluation.rows import Columns
from mim_ray.evaluation.tally import ScoreBins

NUM_ROWS, NUM_USERS, NUM_ITEMS = 6_000, 300, 40


class Rows:
    """Rows of two models, the better one with a probability that is true, and a popularity with many ties."""

    def __init__(self) -> None:
        generator = np.random.default_rng(3)
        self.user = generator.integers(0, NUM_USERS, NUM_ROWS)
        self.item = generator.integers(0, NUM_ITEMS, NUM_ROWS)
        taste = generator.normal(size=NUM_USERS)[self.user]
        self.prob = 1 / (1 + np.exp(-(taste + generator.normal(size=NUM_ROWS) - 1)))
        self.noisy = np.clip(self.prob + 0.3 * generator.normal(size=NUM_ROWS), 0.01, 0.99)
        self.label = (generator.random(NUM_ROWS) < self.prob).astype(np.int8)
        self.popularity = (self.item % 4).astype(float)
        self.hash = hash_ids([f"user-{number}" for number in range(NUM_USERS)])[self.user]

    def columns(self, folder: Path) -> Columns:
        columns = Columns(folder)
        named = {"user": self.hash, "item": self.item, "label": self.label, "popularity": self.popularity}
        for name, values in {**named, "a-base": self.noisy, "a-mim": self.prob}.items():
            columns.append(name, values)
        return columns


@pytest.fixture(scope="module")
def data() -> Rows:
    return Rows()


def _comparison(data: Rows, folder: Path, **changes: Any) -> Comparison:
    of_item = np.where(np.arange(NUM_ITEMS) < 10, -1, 1 + np.arange(NUM_ITEMS) % 3)
    arguments: dict[str, Any] = {
        "models": ["a-base", "a-mim"],
        "references": ["popularity"],
        "slices": [of_item],
        "num_slices": 4,  # the last is empty
        "folder": folder,
        "num_bootstrap": 200,
        "min_label_rows": 20,
    }
    return Comparison(data.columns(folder), **{**arguments, **changes})


def test_streamed_metrics_equal_those_of_all_rows_at_once(
    data: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "CHUNK_ROWS", 1_000)
    monkeypatch.setattr(rows_module, "PART_ROWS", 500)
    comparison = _comparison(data, tmp_path)
    models, _ = comparison.metrics({})
    found = group_auc(data.label, data.prob, data.user)
    metrics = models["a-mim"]
    assert comparison.num_users == NUM_USERS
    assert metrics["auc"]["value"] == pytest.approx(roc_auc_score(data.label, data.prob), abs=1e-12)
    assert metrics["auc_error"] == 0.0
    assert metrics["gauc"]["value"] == pytest.approx(found.weighted, abs=1e-12)
    assert metrics["gauc_unweighted"]["value"] == pytest.approx(found.unweighted, abs=1e-12)
    assert metrics["log_loss"]["value"] == pytest.approx(sklearn_log_loss(data.label, data.prob), abs=1e-12)
    assert metrics["calibration"] == pytest.approx(data.prob.sum() / data.label.sum(), abs=1e-12)
    assert comparison.auc("popularity").value == pytest.approx(roc_auc_score(data.label, data.popularity), abs=1e-12)


def test_a_slice_holds_the_rows_of_its_items(data: Rows, tmp_path: Path) -> None:
    comparison = _comparison(data, tmp_path)
    for number in (1, 2, 3):
        chosen = (data.item >= 10) & (data.item % 3 == number - 1)
        found = comparison.slice(number, {"gain": ("a-mim", "a-base")})
        exact = auc(data.label[chosen], data.prob[chosen])
        assert (found["num_rows"], found["num_positives"]) == (chosen.sum(), data.label[chosen].sum())
        assert found["auc"]["a-mim"]["value"] == pytest.approx(exact, abs=1e-12)
        assert found["calibration"]["a-mim"] == pytest.approx(data.prob[chosen].sum() / data.label[chosen].sum())
        assert found["difference"]["gain"]["value"] == pytest.approx(
            exact - auc(data.label[chosen], data.noisy[chosen]), abs=1e-12
        )
    empty = comparison.slice(4, {})
    assert (empty["num_rows"], empty["auc"], empty["calibration"]["a-mim"]) == (0, {}, None)


@pytest.mark.parametrize("max_bins", [64, 1_000])
def test_a_coarse_histogram_keeps_the_auc_within_its_stated_error(data: Rows, tmp_path: Path, max_bins: int) -> None:
    comparison = _comparison(data, tmp_path, max_bins=max_bins)
    for name, score in (("a-mim", data.prob), ("a-base", data.noisy), ("popularity", data.popularity)):
        value, error = comparison.scores[name].auc[0], comparison.scores[name].auc_error[0]
        assert value is not None
        assert abs(value - auc(data.label, score)) <= error + 1e-12
        assert error < 0.6 / max_bins
    assert comparison.scores["popularity"].auc_error[0] == 0.0  # four values: each has its bin


def test_frequent_scores_have_bins_of_their_own_in_a_sample() -> None:
    generator = np.random.default_rng(0)
    sample = np.concatenate([np.zeros(500), np.full(300, 0.5), generator.random(1_000)])
    bins = ScoreBins(sample, complete=False, max_bins=32)
    zero, half = bins.of(np.array([0.0, 0.5]))
    assert bins.single[[zero, half]].all()
    assert bins.of(np.array([np.nextafter(0.0, 1), np.nextafter(0.5, 1)])).tolist() == [zero + 1, half + 1]
    assert bins.of(np.array([np.nextafter(0.5, 0)])).tolist() == [half - 1]


def test_intervals_are_those_of_resampling_the_rows_of_whole_users(data: Rows, tmp_path: Path) -> None:
    comparison = _comparison(data, tmp_path)
    drawn = comparison.scores["a-mim"].auc_resamples[0]
    groups = user_groups(data.hash)
    for value, weights in zip(drawn[:20], comparison.weights[:20], strict=True):
        chosen = np.repeat(np.arange(NUM_ROWS), weights[groups].astype(int))
        assert value == pytest.approx(auc(data.label[chosen], data.prob[chosen]), abs=1e-4)  # the interval is 0.03 wide
    # the width of the interval against users drawn one by one
    generator = np.random.default_rng(5)
    of_user = [np.flatnonzero(data.user == user) for user in range(NUM_USERS)]
    plain = []
    for _ in range(200):
        chosen = np.concatenate([of_user[user] for user in generator.integers(0, NUM_USERS, NUM_USERS)])
        plain.append(auc(data.label[chosen], data.prob[chosen]))
    assert np.std(drawn) == pytest.approx(np.std(np.array(plain, float)), rel=0.25)


def test_reliability_equals_scikit_learn(data: Rows, tmp_path: Path) -> None:
    found = _comparison(data, tmp_path).metrics({})[0]["a-mim"]["reliability"]
    positive, prob = calibration_curve(data.label, data.prob, n_bins=10, strategy="quantile")
    assert found["mean_prob"] == pytest.approx(prob, abs=1e-3)
    assert found["positive_ratio"] == pytest.approx(positive, abs=5e-3)
    assert sum(found["num_rows"]) == NUM_ROWS
    gaps = np.abs(np.array(found["mean_prob"]) - np.array(found["positive_ratio"]))
    assert found["expected_error"] == pytest.approx(np.average(gaps, weights=found["num_rows"]))
    assert found["expected_error"] < 0.03  # the probabilities are true


def test_the_better_model_is_found_with_an_interval(data: Rows, tmp_path: Path) -> None:
    comparison = _comparison(data, tmp_path)
    gain = comparison.metrics({"a-mim": ("a-mim", "a-base")})[1]["a-mim"]
    assert (gain["model"], gain["over"]) == ("a-mim", "a-base")
    assert gain["auc"]["low"] > 0
    assert gain["log_loss"]["high"] < 0
    assert comparison.closed_ratio("a-base", "a-mim", "a-mim")["value"] == 1.0


def test_rows_without_a_label_are_not_judged_and_none_at_all_is_no_error(data: Rows, tmp_path: Path) -> None:
    hidden = Rows()
    hidden.label = np.where(np.arange(NUM_ROWS) < 3_000, -1, data.label).astype(np.int8)
    (tmp_path / "half").mkdir()
    (tmp_path / "none").mkdir()
    value = streamed_auc(hidden.columns(tmp_path / "half"), "a-mim")
    assert value == pytest.approx(auc(data.label[3_000:], data.prob[3_000:]), abs=1e-12)
    hidden.label[:] = -1
    models, differences = _comparison(hidden, tmp_path / "none").metrics({"a-mim": ("a-mim", "a-base")})
    assert models["a-mim"]["auc"] == {"value": None, "low": None, "high": None}
    assert models["a-mim"]["reliability"]["expected_error"] is None
    assert differences["a-mim"]["gauc"]["value"] is None
