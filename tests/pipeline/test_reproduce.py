"""Which experiments a table needs, and what its rows say; the chain itself runs in test_chain.py."""

from __future__ import annotations

from typing import Any

import pytest

from mim_ray.config import load_scenario
from mim_ray.errors import ConfigError
from mim_ray.pipeline.reproduce.cli import numbers
from mim_ray.pipeline.reproduce.experiments import DEFAULT, Plan, make_plan
from mim_ray.pipeline.reproduce.pages import Pages, markdown_rows
from mim_ray.pipeline.reproduce.run import Outcome, Results, _scenario
from mim_ray.pipeline.reproduce.tables import auc_table, exchange_rate, slice_table

GIVEN = {"backbone": "sim", "true_styles": False, "supervision": "purchase", "vision": {}, "text": {}}


def estimate(value: float | None) -> dict[str, float | None]:
    return {
        "value": value,
        "low": None if value is None else value - 0.01,
        "high": None if value is None else value + 0.01,
    }


def outcome(base: float, mim: float, recall: float | None = None) -> Outcome:
    aucs = {"sim-base": base, "sim-mim": mim}
    entry = {
        "category": "Toys",
        "num_rows": 100,
        "auc": {name: estimate(auc) for name, auc in aucs.items()},
        "difference": {"sim-mim": estimate(mim - base)},
    }
    evaluation: dict[str, Any] = {
        "models": {name: {"auc": estimate(auc)} for name, auc in aucs.items()},
        "differences": {"sim-mim": {"over": "sim-base", "auc": estimate(mim - base)}},
        "categories": [entry, {**entry, "category": "a|b", "auc": {}, "difference": {}}],
    }
    return Outcome(evaluation, None if recall is None else {"levels": {"mm": {"recall@10": recall}}})


def test_tables_share_experiments() -> None:
    plan = make_plan([3, 5], [], **GIVEN)
    names = [experiment.name for experiment in plan.experiments]
    assert len(names) == len(set(names))
    assert names[0] == DEFAULT
    assert {row.experiment for rows in plan.rows.values() for row in rows} == set(names)
    assert [row.experiment for row in plan.rows["3"]].count("encoder-pretraining") == 1
    assert [row.experiment for row in plan.rows["5"]].count("encoder-pretraining") == 1


def test_the_default_is_its_own_row_of_table_4() -> None:
    of_default = {
        s: [
            row.label[:2]
            for row in make_plan([4], [], **{**GIVEN, "supervision": s}).rows["4"]
            if row.experiment == DEFAULT
        ]
        for s in ("purchase", "category")
    }
    assert of_default == {"purchase": ["ba", "v5"], "category": ["ba", "v1"]}


def test_every_setting_of_an_experiment_is_one_of_the_scenario() -> None:
    plan = make_plan([2, 3, 4, 5], [5], **{**GIVEN, "vision": {"resnet50": "/w"}, "text": {"bert": "/t"}})
    scenario = load_scenario("tiny", ["run.root=/r"])
    for experiment in plan.experiments:
        changed = _scenario(scenario, plan, experiment, seed=2)
        assert changed.run.seed == scenario.run.seed + 2
        assert changed.ciubm.variants == experiment.variants
        assert changed.run.root not in changed.run.reuse
        assert scenario.run.root in changed.run.reuse
    vision = next(e for e in plan.experiments if e.name == "vision-resnet50")
    assert _scenario(scenario, plan, vision, 0).encoders.vision.weights == "/w"


def test_figure_5_without_weights_says_what_to_provide() -> None:
    assert "--vision MODEL=FOLDER" in make_plan([], [5], **GIVEN).skipped[0]


@pytest.fixture
def results() -> tuple[Plan, Results]:
    plan = make_plan([3, 4], [], **GIVEN)
    found = Results(2, {DEFAULT: [outcome(0.60, 0.65, 0.1), outcome(0.62, 0.65, 0.2)]})
    found.outcomes["encoder-untrained"] = [outcome(0, 0.61, 0.0), outcome(0, 0.61, 0.01)]
    found.problems["csft-click"] = "there are no clicks"
    return plan, found


def test_differences_are_taken_within_seeds(results: tuple[Plan, Results]) -> None:
    plan, found = results
    rows = {row[0]: row for row in auc_table("t", plan.rows["3"], found, "").rows}
    assert rows["base"][1:3] == ["0.6100 [0.4829, 0.7371]", ""]  # mean 0.61, 12.706 * 0.01414 / sqrt(2)
    assert rows["without training"][2].startswith("+0.0000 [")
    assert rows["+ DDA + DMA + C-SFT (MIM)"][2].startswith("+0.0400 [")
    assert rows["+ DDA + DMA + C-SFT (MIM)"][3:] == ["0.7062", "+0.0038"]
    assert rows["+ DDA"][1] == "—"


def test_what_the_data_do_not_allow_is_said(results: tuple[Plan, Results]) -> None:
    plan, found = results
    table = auc_table("t", plan.rows["4"], found, "Note.")
    assert "there are no clicks" in table.note
    assert next(row for row in table.rows if row[0].startswith("v4"))[1] == "—"


def test_one_seed_keeps_the_interval_over_users() -> None:
    plan = make_plan([3], [], **GIVEN)
    rows = auc_table("t", plan.rows["3"], Results(1, {DEFAULT: [outcome(0.6, 0.65)]}), "").rows
    assert rows[0][1] == "0.6000 [0.5900, 0.6100]"
    assert rows[-1][2] == "+0.0500 [+0.0400, +0.0600]"


def test_slices_name_rows_and_the_papers_gain(results: tuple[Plan, Results]) -> None:
    table = slice_table("t", "categories", "category", *results, note="")
    assert table.rows[0][:2] == ["Toys", "100"]
    assert table.rows[0][-1] == "+0.0024"
    assert table.rows[1][2:] == ["—", "—", "—", "—"]
    assert [label for label, _ in table.gains] == ["Toys (100)"]


def test_exchange_rate_joins_encoders_and_their_models(results: tuple[Plan, Results]) -> None:
    points = exchange_rate(*results)
    assert (DEFAULT, 0.2, 0.65) in points
    assert ("encoder-untrained", 0.0, 0.61) in points
    pages = Pages("t", [], [], [], points)
    assert "least squares over 4 encoders" in pages.exchange_note
    assert "| default | 0.1000 | 0.6500 |" in pages.markdown()
    assert "<svg" in pages.html()
    assert "<script" not in pages.html()


def test_markdown_escapes_the_columns_sign() -> None:
    assert markdown_rows(["a"], [["x|y"]]) == ["| a |", "|---|", "| x\\|y |"]


@pytest.mark.parametrize(("value", "known"), [("2,9", (2, 3)), ("x", (1,))])
def test_unknown_tables_are_refused(value: str, known: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="is none of"):
        numbers(value, known, "--tables")
    assert numbers(" 3,2,2 ", (2, 3), "--tables") == [2, 3]
