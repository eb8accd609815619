"""Every stage of a scenario, then the report."""

from __future__ import annotations

import time
from typing import Any

from mim_ray.config import Scenario
from mim_ray.pipeline import live_check
from mim_ray.pipeline.graph import pipeline
from mim_ray.pipeline.report.build import build
from mim_ray.pipeline.stages import Pipeline, Stage
from mim_ray.runtime.progress import format_seconds
from mim_ray.runtime.summary import format_summary


def run_all(scenario: Scenario) -> dict[str, Any]:
    """Run what is not finished yet, serve the result once, write report.html and report.json below the run's root.

    Returns:
        what report.json holds. `seconds_total` is the time of this run, or of the stages it reuses where that is longer.
    """
    start = time.monotonic()
    chain = full_pipeline(scenario)
    manifests = chain.run(list(chain.stages))
    spent = sum(manifest.seconds for manifest in manifests.values())
    figures = build(chain.scenario, chain.layout, manifests, max(spent, time.monotonic() - start))
    print("\n" + format_summary("Result", _rows(figures, chain.layout.root)))
    return figures


def full_pipeline(scenario: Scenario) -> Pipeline:
    """All stages, serving included."""
    chain = pipeline(scenario)
    with_content = [variant for variant in chain.scenario.ciubm.variants if variant.endswith("-mim")]
    if with_content:
        parents = ("extraction", *(f"ctr/{variant}" for variant in with_content))
        serving = Stage("serving", "Serving over HTTP", ("serving",), parents, live_check.run)
        return Pipeline(chain.scenario, [*chain.stages.values(), serving])
    return chain


def _rows(figures: dict[str, Any], root: str) -> list[tuple[str, str]]:
    ctr = figures["ctr"]
    rows = [
        (f"AUC {figures['backbone']}-{content}", f"{ctr[content]['auc']:.4f}   GAUC {_number(ctr[content]['gauc'])}")
        for content in ("base", "mim")
        if content in ctr and ctr[content]["auc"] is not None
    ]
    if ctr["oracle"]["auc"] is not None:
        rows.append(("AUC of the truth", f"{ctr['oracle']['auc']:.4f}"))
    if ctr["closed_ratio"] is not None:
        rows.append(("closed ratio", f"{ctr['closed_ratio']:.0%} of what the true styles add to the base"))
    if figures["http"]["rank_ok"]:
        rows.append(("new item over HTTP", f"rankable after {figures['http']['new_item_rankable_s']:.2f} s"))
    rows.append(("time", format_seconds(figures["seconds_total"])))
    rows.append(("report", f"{root}/report.html"))
    return rows


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}"
