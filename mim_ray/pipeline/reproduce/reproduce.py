"""Tables 1-7 and Figures 5 and 6 of the paper for one scenario: run what is missing, then write Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from mim_ray import artifacts
from mim_ray.ciubm import backbones
from mim_ray.config import Scenario
from mim_ray.errors import ConfigError
from mim_ray.evaluation.seeds import mean_interval
from mim_ray.pipeline.reproduce import paper
from mim_ray.pipeline.reproduce.experiments import DEFAULT, Plan, make_plan
from mim_ray.pipeline.reproduce.pages import Pages
from mim_ray.pipeline.reproduce.run import Results, reproduce_root, run_experiments
from mim_ray.pipeline.reproduce.statistics import data_table
from mim_ray.pipeline.reproduce.tables import Table, auc_table, efficiency_table, exchange_rate, slice_table, text

TITLES = {
    2: "Table 2: base and + MIM around each user behavior model",
    3: "Table 3: what each stage of the encoder adds",
    4: "Table 4: kinds of supervision",
    5: "Table 5: ablations, and what is beyond the paper",
}


def reproduce(
    scenario: Scenario,
    *,
    tables: Sequence[int],
    figures: Sequence[int],
    backbone: str = "sim",
    num_seeds: int = 1,
    vision: Mapping[str, str] | None = None,
    text: Mapping[str, str] | None = None,
) -> Pages:
    """Write reproduce/tables.md, tables.html and tables.json below the run's root, and print the tables.

    Args:
        tables: 1-7. figures: 5, 6. backbone: of all tables but Table 2.
        vision, text: towers of Figure 5, model name -> folder with weights.

    Raises:
        ConfigError: there is no such backbone.
        MimRayError: the scenario itself cannot be run.
    """
    if backbone not in backbones.NAMES:
        raise ConfigError(f"--backbone {backbone} is none of {', '.join(backbones.NAMES)}.")
    plan = make_plan(
        tables,
        figures,
        backbone=backbone,
        true_styles=scenario.data.root is None,
        supervision=scenario.csft.supervision,
        vision=vision or {},
        text=text or {},
    )
    for sentence in plan.skipped:
        print(sentence)
    efficiency = efficiency_table(scenario, backbone) if 6 in tables else None
    results = run_experiments(scenario, plan, num_seeds)
    pages = _pages(scenario, plan, results, tables, figures, efficiency)
    root = reproduce_root(scenario)
    artifacts.write_bytes(f"{root}/tables.md", pages.markdown().encode())
    artifacts.write_bytes(f"{root}/tables.html", pages.html().encode())
    artifacts.write_json(
        f"{root}/tables.json", {"tables": [asdict(t) for t in pages.tables], "exchange": pages.exchange}
    )
    print(f"\n{pages.markdown()}\n{root}/tables.html has the plots")
    return pages


def _pages(
    scenario: Scenario,
    plan: Plan,
    results: Results,
    tables: Sequence[int],
    figures: Sequence[int],
    efficiency: Table | None,
) -> Pages:
    found: list[Table] = [data_table(results.samples)] if 1 in tables else []
    for number, title in TITLES.items():
        if number in tables:
            found.append(auc_table(title, plan.rows[str(number)], results, _note(number)))
    if efficiency is not None:
        found.append(efficiency)
    if 7 in tables:
        found.append(
            slice_table(
                "Table 7: gains by category",
                "categories",
                "category",
                plan,
                results,
                "The largest categories of the test rows. The paper's gain over all of its data is "
                f"{paper.TABLE_7['all']:+.4f}.",
            )
        )
    shown = []
    if 6 in figures:
        ages = slice_table(
            "Figure 6: gains by item age",
            "age_buckets",
            "bucket",
            plan,
            results,
            "S1: targets without a positive in train; S2 to S10 by their first positive in train, newest first. "
            f"The paper: {paper.FIGURE_6}.",
        )
        found.append(ages)
    if plan.rows.get("figure 5"):
        table = auc_table("Figure 5: encoders", plan.rows["figure 5"], results, f"The paper: {paper.FIGURE_5}.")
        shown.append((table.title, table.note, table.gains))
    return Pages(
        title=f"The paper's tables on {scenario.name}",
        remarks=[*_remarks(plan, results), *plan.skipped],
        tables=found,
        figures=shown,
        exchange=exchange_rate(plan, results),
    )


def _note(number: int) -> str:
    if number == 2:
        return "Difference: + MIM less its base."
    if number == 5:
        return "Difference: to MIM. Rows after the fusion module are not in the paper."
    return "Difference: to the base. Encoders without public weights start from random ones."


def _remarks(plan: Plan, results: Results) -> list[str]:
    outcomes = results.outcomes[DEFAULT]
    seeds = (
        "One seed; intervals (95 %) resample the users of the test rows, differences between experiments have none."
        if results.num_seeds == 1
        else f"{results.num_seeds} seeds (encoders, batches and CTR models start anew); means with 95 % intervals by "
        "Student's t over the seeds, differences within seeds."
    )
    rows = outcomes[0].evaluation
    remarks = [seeds, f"{rows['num_rows']:,} test rows of {rows['num_users']:,} users."]
    references = {
        name: mean_interval([o.evaluation["references"][name]["value"] for o in outcomes])
        for name in rows["references"]
        if all(o.evaluation["references"].get(name, {}).get("value") is not None for o in outcomes)
    }
    if references:
        named = ", ".join(f"{name.replace('_', ' ')} {text(value)}" for name, value in references.items())
        remarks.append(f"AUC without a model: {named}.")
    closed = [
        value
        for o in outcomes
        if (value := o.evaluation["closed_ratio"].get(plan.backbone, {}).get("value")) is not None
    ]
    if closed:
        remarks.append(f"Closed ratio, of what the true styles add to the base: {text(mean_interval(closed))}.")
    return remarks
