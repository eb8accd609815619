"""From outcomes to the rows of the paper's tables: means and intervals over seeds, differences within seeds."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from mim_ray.config import Scenario
from mim_ray.evaluation.bootstrap import Estimate
from mim_ray.evaluation.seeds import mean_interval
from mim_ray.pipeline.efficiency import PHASES, TITLES, measure
from mim_ray.pipeline.reproduce import paper
from mim_ray.pipeline.reproduce.experiments import DEFAULT, Plan, Row
from mim_ray.pipeline.reproduce.run import Results

NONE = Estimate(None, None, None)


@dataclass(frozen=True)
class Table:
    """A table as a person reads it.

    Attributes:
        gains: (label, estimate) of what a plot would show, empty for none.
    """

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    gains: Sequence[tuple[str, Estimate]] = ()


def auc_table(title: str, rows: Sequence[Row], results: Results, note: str) -> Table:
    """AUC by row, and its difference to the row's reference within each seed."""
    cells, gains = [], []
    for row in rows:
        if row.experiment in results.problems:
            cells.append([row.label, "—", "—", _paper(row.paper_auc), _paper(row.paper_gain, sign=True)])
            continue
        auc, gain = auc_of(row, results), gain_of(row, results)
        cells.append(
            [
                row.label,
                text(auc),
                "" if row.over is None else text(gain, sign=True),
                _paper(row.paper_auc),
                _paper(row.paper_gain, sign=True),
            ]
        )
        if row.over is not None and gain.value is not None:
            gains.append((row.label, gain))
    reasons = [f"{row.label}: {results.problems[row.experiment]}" for row in rows if row.experiment in results.problems]
    header = ["", "AUC", "difference", "paper: AUC", "paper: difference"]
    return Table(title, " ".join([note, *(f"Left out: {reason}" for reason in reasons)]), header, cells, gains)


def auc_of(row: Row, results: Results) -> Estimate:
    """Mean AUC over the seeds; with one seed the interval resamples its users."""
    outcomes = results.outcomes.get(row.experiment, [])
    if len(outcomes) == 1:
        model = outcomes[0].evaluation["models"].get(row.variant)
        return NONE if model is None else Estimate(**model["auc"])
    return mean_interval([auc for outcome in outcomes if (auc := outcome.auc(row.variant)) is not None])


def gain_of(row: Row, results: Results) -> Estimate:
    """Mean over the seeds of AUC less that of `row.over` in the default experiment of the same seed."""
    if row.over is None:
        return NONE
    outcomes = results.outcomes.get(row.experiment, [])
    if len(outcomes) == 1 and row.experiment == DEFAULT:
        found = outcomes[0].evaluation["differences"].get(row.variant)
        return NONE if found is None or found["over"] != row.over else Estimate(**found["auc"])
    return mean_interval(
        [
            ours - theirs
            for outcome, default in zip(outcomes, results.outcomes.get(DEFAULT, []), strict=False)
            if (ours := outcome.auc(row.variant)) is not None and (theirs := default.auc(row.over)) is not None
        ]
    )


def slice_table(title: str, kind: str, key: str, plan: Plan, results: Results, note: str) -> Table:
    """AUC of base and +MIM, and the gain, in each slice of the test rows.

    Args:
        kind: of evaluation.json: categories, age_buckets. key: what names a slice there.
    """
    base, mim = f"{plan.backbone}-base", f"{plan.backbone}-mim"
    outcomes = results.outcomes[DEFAULT]
    found: dict[str, list[dict[str, Any]]] = {}
    for outcome in outcomes:
        for entry in outcome.evaluation[kind]:
            found.setdefault(entry[key], []).append(entry)
    rows, gains = [], []
    for name, entries in found.items():
        gain = _slice_gain(entries, mim)
        cells = [_slice_auc(entries, model) for model in (base, mim)]
        num_rows = round(sum(entry["num_rows"] for entry in entries) / len(entries))
        known = key == "category" and name in paper.TABLE_7
        rows.append(
            [name, f"{num_rows:,}", *cells, text(gain, sign=True), _paper(paper.TABLE_7[name] if known else None, True)]
        )
        if gain.value is not None:
            gains.append((f"{name} ({num_rows:,})", gain))
    return Table(title, note, [key, "test rows", base, mim, "difference", "paper: difference"], rows, gains)


def efficiency_table(scenario: Scenario, backbone: str, num_rows: int = 16) -> Table:
    """Table 6: what content costs with and without the representation center; measured in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        report = pool.submit(measure, scenario, backbone, num_rows, "cpu", 1).result()
    rows = []
    for mode, title in TITLES.items():
        found, memory = report["rows"][mode], paper.TABLE_6_MEMORY.get(mode)
        cells = [title]
        for number, phase in enumerate(PHASES):
            cells += [f"{found['gflops'][phase]:.6f}", f"{paper.TABLE_6_GFLOPS[mode][number]:g}"]
        for number, phase in enumerate(PHASES):
            cells += [f"{found['peak_mb'][phase]:.1f}", "—" if memory is None else f"+{memory[number]:g}×"]
        rows.append(cells)
    ratio = report["mim_over_base_flops"]
    note = (
        f"Per sample of {report['num_behaviors']} behaviors, MM width {report['content_width']}; peak memory of {num_rows} rows on a "
        f"CPU. +MIM needs {ratio['train']:.2f} times the FLOPs of base in training, {ratio['inference']:.2f} times in inference "
        "(the paper: 1.59, 1.387)."
    )
    header = [""]
    header += [cell for phase in PHASES for cell in (f"GFLOPs, {phase}", "paper")]
    header += [cell for phase in PHASES for cell in (f"MB, {phase}", "paper: more than base")]
    return Table("Table 6: efficiency", note, header, rows)


def exchange_rate(plan: Plan, results: Results) -> list[tuple[str, float, float]]:
    """(experiment, recall@10, AUC of +MIM) of every encoder that was measured, one per seed.

    Experiments whose CTR model differs from the default one have no part in it.
    """
    return [
        (experiment.name, outcome.recall, auc)
        for experiment in plan.experiments
        if experiment.encoder
        for outcome in results.outcomes.get(experiment.name, [])
        if outcome.recall is not None and (auc := outcome.auc(f"{plan.backbone}-mim")) is not None
    ]


def text(estimate: Estimate, sign: bool = False) -> str:
    """0.6541 [0.6485, 0.6606]."""
    form = "+.4f" if sign else ".4f"
    if estimate.value is None:
        return "—"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _slice_auc(entries: Sequence[dict[str, Any]], model: str) -> str:
    values = [entry["auc"][model]["value"] for entry in entries if model in entry["auc"]]
    return text(mean_interval([value for value in values if value is not None]))


def _slice_gain(entries: Sequence[dict[str, Any]], model: str) -> Estimate:
    found = [entry["difference"][model] for entry in entries if model in entry["difference"]]
    if len(entries) == 1 and found:
        return Estimate(**found[0])
    return mean_interval([entry["value"] for entry in found if entry["value"] is not None])


def _paper(value: float | None, sign: bool = False) -> str:
    return "—" if value is None else f"{value:{'+' if sign else ''}.4f}"
