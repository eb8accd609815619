"""The dashboard and the alert rules: well formed, and every metric, label and value in them is one that the apps export."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ConfigDict, Field

from mim_ray.serving.metrics import GAUGES, Metrics, Versions
from mim_ray.serving.metrics_hub import text_of

INFRA = Path(__file__).parents[2] / "infra"
WORDS = {
    "sum", "max", "min", "count", "by", "rate", "histogram_quantile", "abs", "absent", "offset", "or", "le",
}  # fmt: skip
TOKEN = re.compile(
    r"""(?P<space>\s+)|(?P<selector>\{[^{}]*\})|(?P<range>\[(?:\d+[smhd]|\$__rate_interval)\])|(?P<duration>\d+[smhd]\b)
    |(?P<number>\d+(?:\.\d+)?)|(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)|(?P<sign>==|!=|>=|<=|[-+*/><(),])""",
    re.VERBOSE,
)
MATCHER = re.compile(r'^(\w+)(=|!=|=~|!~)"([^"]*)"$')


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Annotations(Strict):
    summary: str = Field(min_length=20)
    action: str = Field(min_length=20)


class Severity(Strict):
    severity: str = Field(pattern="^(critical|warning)$")


class Rule(Strict):
    alert: str = Field(pattern="^MimRay[A-Z][A-Za-z]+$")
    expr: str
    for_: str = Field(alias="for", pattern=r"^\d+[smhd]$")
    labels: Severity
    annotations: Annotations


class Group(Strict):
    name: str
    rules: list[Rule] = Field(min_length=1)


class RuleFile(Strict):
    groups: list[Group]


@pytest.fixture(scope="module")
def exported() -> dict[str, dict[str, set[str]]]:
    """Sample name -> label -> values, of a process that has counted everything once."""
    found: dict[str, dict[str, set[str]]] = {}
    for app in ("ranking", "new_item_encoder"):
        metrics = Metrics(app, lambda: Versions("m", "e", 1))
        for gauge in GAUGES:
            metrics.watch(gauge, lambda: 0.0)
        metrics.ranked(candidates=1, unknown=1, without_content=1, default_features=["device"], degraded=["content"])
        for status in ("2xx", "4xx", "5xx"):
            with metrics.request("/v1/rank") as outcome:
                outcome["status"] = status
        for stage in ("parse", "lookup", "network"):
            metrics.stage("/v1/rank", stage, 0.001)
        for family in text_string_to_metric_families(text_of(metrics.families()).decode()):
            for sample in family.samples:
                labels = found.setdefault(sample.name, {})
                for label, value in sample.labels.items():
                    labels.setdefault(label, set()).add(value)
    return found


def rules() -> list[Rule]:
    return [
        rule
        for group in RuleFile.model_validate(yaml.safe_load((INFRA / "prometheus-rules.yaml").read_text())).groups
        for rule in group.rules
    ]


def dashboard() -> dict[str, Any]:
    return json.loads((INFRA / "grafana-dashboard.json").read_text())


def expressions() -> list[str]:
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    return [rule.expr for rule in rules()] + panels


def check(expression: str, exported: dict[str, dict[str, set[str]]]) -> None:
    """Raise AssertionError where the expression could not be read, or asks for what is not exported."""
    place, depth, metric, grouping, seen = 0, 0, None, False, set()
    all_labels = {label for labels in exported.values() for label in labels}
    while place < len(expression):
        token = TOKEN.match(expression, place)
        assert token, f"not PromQL from here: {expression[place:]}"
        place, kind, text = token.end(), token.lastgroup, token.group()
        if kind == "name" and text in exported:
            metric = text
            seen.add(text)
            continue
        if kind == "name":
            assert text in WORDS or (grouping and text in all_labels), f"{text} is not exported"
            grouping = grouping or text == "by"
        elif kind == "selector":
            assert metric is not None, f"{text} selects from nothing"
            for part in filter(None, (part.strip() for part in text[1:-1].split(","))):
                label, sign, value = MATCHER.match(part).groups()
                assert label in exported[metric], f"{metric} has no label {label}"
                assert sign != "=" or value in exported[metric][label], f"{label} of {metric} is never {value}"
        elif kind == "sign":
            depth += {"(": 1, ")": -1}.get(text, 0)
            assert depth >= 0, "a bracket too many"
            grouping = grouping and text != ")"
        if kind not in ("space", "selector"):
            metric = None
    assert depth == 0, "a bracket too few"
    assert seen, "no metric"


@pytest.mark.parametrize("expression", expressions())
def test_each_expression_asks_for_what_the_apps_export(expression, exported):
    check(expression, exported)


@pytest.mark.parametrize(
    "expression",
    [
        "rate(mim_ray_request_total[5m])",  # no such metric
        "sum(rate(mim_ray_requests_total[5m])",
        'mim_ray_requests_total{code="5xx"}',
        'mim_ray_requests_total{status="500"}',
        "sum by (shop) (mim_ray_ongoing_requests)",
        "mim_ray_ongoing_requests[5 minutes]",
        "1 > 0",
    ],
)
def test_the_check_refuses_what_is_wrong(expression, exported):
    with pytest.raises(AssertionError):
        check(expression, exported)


def test_every_metric_that_the_apps_export_is_on_the_dashboard(exported):
    shown = " ".join(target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ()))
    bases = {re.sub(r"_(sum|count|bucket)$", "", name) for name in exported}
    assert {name for name in bases if name not in shown} == set()


def test_the_dashboard_is_laid_out_without_gaps_or_overlaps():
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) == 24 * (max(y for _, y in cells) + 1)
    (variable,) = dashboard()["templating"]["list"]
    assert variable["type"] == "datasource"
    assert all(t["datasource"]["uid"] == "${source}" for panel in panels for t in panel.get("targets", ()))


def test_alerts_cover_what_pages_somebody_and_their_names_are_unique():
    names = [rule.alert for rule in rules()]
    assert len(set(names)) == len(names)
    assert {"MimRayNotFresh", "MimRayErrors", "MimRayDegraded", "MimRayVersionSkew", "MimRayQueue"} <= set(names)


def test_texts_of_alerts_use_labels_that_their_expression_keeps():
    for rule in rules():
        for label in re.findall(r"\$labels\.(\w+)", rule.annotations.summary):
            assert f"by ({label})" in rule.expr, rule.alert
