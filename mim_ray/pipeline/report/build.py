"""report.html and report.json of a run, from what its stages left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mim_ray
from mim_ray import artifacts
from mim_ray.artifacts import Manifest
from mim_ray.config import Scenario
from mim_ray.pipeline.layout import Layout
from mim_ray.pipeline.report import page, plots
from mim_ray.pipeline.report.neighbors import NeighborFigure, neighbor_figure
from mim_ray.runtime.progress import format_seconds

NAMES = {"sim": "SIM", "din": "DIN", "dien": "DIEN", "bst": "BST", "twin": "TWIN", "average": "average pooling"}


def build(
    scenario: Scenario, layout: Layout, manifests: Mapping[str, Manifest], seconds_total: float
) -> dict[str, Any]:
    """Write report.html and report.json below the run's root; returns what report.json holds.

    Args:
        manifests: of all finished stages, by name. seconds_total: of the whole run.
    """
    evaluation = manifests["evaluation"].metrics
    figures = _figures(evaluation, manifests, seconds_total)
    neighbors = neighbor_figure(scenario, layout)
    figures["neighbors"] = {stage.title: stage.style_agreement for stage in neighbors.stages}
    artifacts.write_json(f"{layout.root}/report.json", figures)
    sections = [
        _headline(figures, evaluation),
        _ctr(evaluation),
        _ages(evaluation),
        _calibration(evaluation),
        _losses(manifests),
        _neighbors(neighbors),
        _stages(manifests),
    ]
    subtitle = f"{scenario.name}: {scenario.description}. mim_ray {mim_ray.__version__}, {artifacts.now()}."
    artifacts.write_bytes(f"{layout.root}/report.html", page.page("MIM report", subtitle, sections).encode())
    return figures


def _figures(evaluation: Mapping[str, Any], manifests: Mapping[str, Manifest], seconds_total: float) -> dict[str, Any]:
    main = _main_backbone(evaluation)
    models = evaluation["models"]
    oracle = evaluation["references"].get("oracle")
    closed = evaluation["closed_ratio"].get(main)
    ctr: dict[str, Any] = {
        content: {metric: models[f"{main}-{content}"][metric]["value"] for metric in ("auc", "gauc")}
        for content in ("base", "mim")
        if f"{main}-{content}" in models
    }
    ctr["oracle"] = {"auc": None if oracle is None else oracle["value"]}
    ctr["closed_ratio"] = None if closed is None else closed["value"]
    cold = [
        {
            "bucket": bucket["bucket"],
            "base_auc": bucket["auc"].get(f"{main}-base", {}).get("value"),
            "mim_auc": bucket["auc"].get(f"{main}-mim", {}).get("value"),
            "num_rows": bucket["num_rows"],
        }
        for bucket in evaluation["age_buckets"]
    ]
    serving = manifests["serving"].metrics if "serving" in manifests else {}
    return {
        "seconds_total": round(seconds_total, 1),
        "stages": {name: manifest.seconds for name, manifest in manifests.items()},
        "backbone": main,
        "ctr": ctr,
        "cold": cold,
        "http": {key: serving.get(key) for key in ("rank_ok", "new_item_rankable_s", "rank_p50_ms")},
    }


def _main_backbone(evaluation: Mapping[str, Any]) -> str:
    """SIM where it was trained (the paper's default), else the first model's."""
    backbones = [name.partition("-")[0] for name in evaluation["models"]]
    return "sim" if "sim" in backbones else backbones[0]


def _headline(figures: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    main = figures["backbone"]
    gain = evaluation["differences"].get(f"{main}-mim", {}).get("auc")
    shown = [(_number(figures["ctr"].get(c, {}).get("auc")), f"AUC, {NAMES[main]} {c}") for c in ("base", "mim")]
    shown.append((_number(None if gain is None else gain["value"], sign=True), f"AUC gain {_range(gain)}"))
    if figures["ctr"]["oracle"]["auc"] is not None:
        shown.append((_number(figures["ctr"]["oracle"]["auc"]), "AUC of the true probability"))
    if figures["ctr"]["closed_ratio"] is not None:
        shown.append((f"{figures['ctr']['closed_ratio']:.0%}", "closed ratio: part of what content could add"))
    if figures["http"]["new_item_rankable_s"] is not None:
        shown.append((f"{figures['http']['new_item_rankable_s']:.2f} s", "from posting a new item to ranking it"))
    shown.append((format_seconds(figures["seconds_total"]), "for all stages"))
    return page.cards(shown)


def _ctr(evaluation: Mapping[str, Any]) -> str:
    groups: dict[str, dict[str, tuple[float, float, float]]] = {}
    models = sorted(evaluation["models"].items(), key=_place)
    for name, metrics in models:
        backbone, _, content = name.partition("-")
        if _whole(metrics["auc"]):
            groups.setdefault(NAMES[backbone], {})[content] = _triple(metrics["auc"])
    references = {name.replace("_", " "): _triple(e) for name, e in evaluation["references"].items() if _whole(e)}
    if references:
        groups["no model"] = references
    rows = []
    for name, metrics in models:
        gain = evaluation["differences"].get(name, {}).get("auc")
        cells = [_estimate(metrics[metric]) for metric in ("auc", "gauc", "gauc_unweighted", "log_loss")]
        rows.append([name, *cells, "" if gain is None else _estimate(gain, sign=True)])
    note = (
        f"Test: {evaluation['num_rows']:,} rows of {evaluation['num_users']:,} users. 95 % intervals resample users. Base and mim "
        "share everything but the content; style is the same network fed the shop's true style vectors. 'No model': popularity "
        "in train, mean cosine of the behaviors' vectors to the target's, and the shop's true probability (oracle)."
    )
    header = ["model", "AUC", "GAUC (by rows)", "GAUC (by users)", "log loss", "AUC gain over base"]
    warnings = "".join(page.paragraph(f"Warning: {text}") for text in evaluation["warnings"])
    table = page.table(header, rows)
    return page.section("Click-through rate models", note, warnings, plots.bars(groups, "AUC (test)"), table)


def _ages(evaluation: Mapping[str, Any]) -> str:
    main = _main_backbone(evaluation)
    note = (
        "S1: targets without a positive in train. S2-S10: by the first positive in train, newest first. Then by category, and by "
        "the number of the target's positives in train. In brackets: test rows. Points are AUC differences of mim to base with "
        "95 % intervals; the paper's Figure 6 and Table 7 show the first two for its data."
    )
    parts = []
    for kind, key in (("age_buckets", "bucket"), ("categories", "category"), ("exposure", "bucket")):
        points = [
            (f"{row[key][:28]} ({row['num_rows']:,})", *_triple(row["difference"][f"{main}-mim"]))
            for row in evaluation[kind][:12]
            if _whole(row["difference"].get(f"{main}-mim"))
        ]
        if points:
            parts.append(plots.intervals(points, f"AUC gain, {NAMES[main]}"))
    return page.section("Gain by item age, category and exposure", note, *parts or [page.paragraph("Too few rows.")])


def _calibration(evaluation: Mapping[str, Any]) -> str:
    main = _main_backbone(evaluation)
    models = {name: metrics for name, metrics in evaluation["models"].items() if metrics["reliability"]["num_rows"]}
    curves = {
        name.partition("-")[2]: (metrics["reliability"]["mean_prob"], metrics["reliability"]["positive_ratio"])
        for name, metrics in models.items()
        if name.startswith(f"{main}-")
    }
    if not curves:
        return ""
    rows = [
        [name, _number(metrics["calibration"]), _number(metrics["reliability"]["expected_error"])]
        for name, metrics in sorted(models.items(), key=_place)
    ]
    note = (
        "Ten bins of equal numbers of test rows, by predicted probability. Ratio: sum of probabilities over positives, 1 is "
        "calibrated. Expected error: mean distance from the diagonal over rows."
    )
    table = page.table(["model", "ratio", "expected error"], rows)
    return page.section("Calibration", note, plots.reliability(curves), table)


def _losses(manifests: Mapping[str, Manifest]) -> str:
    curves: dict[str, Any] = {}
    for name, manifest in manifests.items():
        curves.update({title: points for title, points in _curves(name, manifest.metrics).items() if len(points) > 1})
    return page.section("Training", "Loss by step.", plots.loss_curves(curves)) if curves else ""


def _curves(stage: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    if stage == "pretraining":
        return {f"pre-training: {name}": phase["losses"] for name, phase in metrics["phases"].items()}
    if stage == "csft":
        columns = metrics["curve_columns"]
        return {
            f"C-SFT: {name}": [[point[0], point[place]] for point in metrics["curve"]]
            for place, name in enumerate(columns[1:], start=1)
        }
    if stage.startswith("ctr/"):
        first = next(iter(metrics["seeds"].values()))
        return {stage.removeprefix("ctr/"): first["loss"]}
    return {}


def _neighbors(figure: NeighborFigure) -> str:
    note = "Left of the line an item, right of it its nearest neighbors by cosine, after each stage, in a sample of the catalogue."
    if figure.stages[0].style_agreement is not None:
        note += " Style agreement: mean share of equal true style factors between items and their neighbors, over the sample."
    return page.section("What the embeddings find alike", note, page.neighbor_strips(figure))


def _stages(manifests: Mapping[str, Manifest]) -> str:
    rows = [[m.stage, f"{m.seconds:.1f}", str(sum(m.rejects.values())), m.created_at] for m in manifests.values()]
    summaries = [
        f"<h3>{name}</h3>" + page.table(["", ""], manifest.summary)
        for name, manifest in manifests.items()
        if manifest.summary
    ]
    return page.section(
        "Stages",
        "Seconds, unusable rows (reasons are in the rejects table), and when each stage finished.",
        page.table(["stage", "seconds", "rejected rows", "finished"], rows),
        *summaries,
    )


def _place(model: tuple[str, Any]) -> tuple[int, int]:
    """SIM first, and base before mim before style."""
    backbone, _, content = model[0].partition("-")
    return list(NAMES).index(backbone), ("base", "mim", "style").index(content)


def _whole(estimate: Mapping[str, Any] | None) -> bool:
    return estimate is not None and all(estimate[key] is not None for key in ("value", "low", "high"))


def _triple(estimate: Mapping[str, Any]) -> tuple[float, float, float]:
    return estimate["value"], estimate["low"], estimate["high"]


def _number(value: float | None, sign: bool = False) -> str:
    return "—" if value is None else f"{value:{'+' if sign else ''}.4f}"


def _range(estimate: Mapping[str, Any] | None) -> str:
    return "" if estimate is None or not _whole(estimate) else f"[{estimate['low']:+.4f}, {estimate['high']:+.4f}]"


def _estimate(estimate: Mapping[str, Any], sign: bool = False) -> str:
    value = _number(estimate["value"], sign)
    if not _whole(estimate):
        return value
    form = "+.4f" if sign else ".4f"
    return f"{value} [{estimate['low']:{form}}, {estimate['high']:{form}}]"
