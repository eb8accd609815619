"""Sections of the report from an evaluation's figures."""

from __future__ import annotations

from typing import Any

import pytest

from mim_ray.pipeline.report import build


def _estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


@pytest.fixture
def evaluation() -> dict[str, Any]:
    model = {name: _estimate(0.6) for name in ("auc", "gauc", "gauc_unweighted", "log_loss")}
    reliability = {"mean_prob": [0.1, 0.3], "positive_ratio": [0.0, 0.4], "num_rows": [5, 5], "expected_error": 0.1}
    gain = {"difference": {"twin-mim": _estimate(0.02)}, "num_rows": 10}
    return {
        "num_rows": 10,
        "num_users": 3,
        "models": {
            name: {**model, "calibration": 1.25, "reliability": reliability} for name in ("twin-base", "twin-mim")
        },
        "differences": {"twin-mim": {"over": "twin-base", "auc": _estimate(0.02)}},
        "references": {"popularity": _estimate(0.55), "mean_cosine": _estimate(0.65)},
        "age_buckets": [{"bucket": "S1", **gain}, {"bucket": "S2", "difference": {}, "num_rows": 0}],
        "categories": [{"category": "shoes", **gain}],
        "exposure": [{"bucket": "1-5", **gain}],
        "warnings": ["twin-mim is < the mean cosine"],
    }


def test_gains_are_shown_by_age_category_and_exposure(evaluation: dict[str, Any]) -> None:
    section = build._ages(evaluation)
    assert section.count("<svg") == 3
    assert all(text in section for text in ("S1 (10)", "shoes (10)", "1-5 (10)"))
    assert "S2" not in section.partition("<svg")[2]


def test_calibration_has_a_curve_and_a_row_per_model_and_is_left_out_without_rows(evaluation: dict[str, Any]) -> None:
    section = build._calibration(evaluation)
    assert section.count("<svg") == 1
    assert section.count("1.2500") == 2
    for metrics in evaluation["models"].values():
        metrics["reliability"] = {"mean_prob": [], "positive_ratio": [], "num_rows": [], "expected_error": None}
    assert build._calibration(evaluation) == ""


def test_a_warning_stands_above_the_models(evaluation: dict[str, Any]) -> None:
    section = build._ctr(evaluation)
    assert section.index("Warning: twin-mim is &lt; the mean cosine") < section.index("<svg")
