"""The command line of jobs/ab_report.py: the result of an A/B test as a table, JSON and one HTML file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mim_ray import artifacts
from mim_ray.config import load_scenario, scenario_names
from mim_ray.errors import ConfigError
from mim_ray.evaluation.bootstrap import Estimate
from mim_ray.pipeline.ab import METRICS, NUM_RESAMPLES, AbResult, analyse
from mim_ray.pipeline.cli import told

HEADER = ("arm", "users", "requests", "exposed items", "CTR", "RPM")
TITLES = {"ctr": "CTR", "rpm": "RPM"}


def main(doc: str | None, argv: Sequence[str] | None = None) -> None:
    """Print the report, and write what was asked for; a user's mistake is a sentence and exit status 2."""
    with told("Stopped. Nothing was changed."):
        args = _parser(doc).parse_intermixed_args(argv)
        scenario = load_scenario(args.config, args.overrides)
        result = analyse(
            artifacts.center_root(scenario),
            {name: arm.weight for name, arm in scenario.serving.arms.items()},
            since=_time(args.since, "--since"),
            until=_time(args.until, "--until"),
            click_events=args.clicks,
            base=args.base,
        )
        print(as_text(result))
        if args.json is not None:
            Path(args.json).write_text(json.dumps(as_json(result), indent=1, allow_nan=False) + "\n")
        if args.html is not None:
            Path(args.html).write_text(as_html(result, f"A/B test {scenario.serving.experiment}"))


def as_text(result: AbResult) -> str:
    """Two aligned tables and what is to be heeded."""
    comparisons = [("against " + result.base, *(f"{TITLES[metric]}" for metric in METRICS)), *_comparisons(result)]
    return "\n".join([*_aligned([HEADER, *_arms(result)]), "", *_aligned(comparisons), "", *_notes(result)])


def as_json(result: AbResult) -> dict[str, Any]:
    """All figures."""
    return {
        "base": result.base,
        "arms": {
            name: {
                "users": len(arm.users),
                "requests": arm.num_requests,
                "expected_user_ratio": result.expected.get(name),
                "models": dict(arm.models),
                **{key: arm.total(key) for key in ("exposures", "clicks", "revenue")},
                **{metric: result.values[name][metric]._asdict() for metric in METRICS},
            }
            for name, arm in result.arms.items()
        },
        "comparisons": {
            one.arm: {
                metric: {"difference": one.difference[metric]._asdict(), "percent": one.percent[metric]._asdict()}
                for metric in METRICS
            }
            for one in result.comparisons
        },
        "sample_ratio_mismatch": {"p_value": result.mismatch_p, "mismatched": result.mismatched},
        "users_in_several_arms": result.num_users_in_several_arms,
        "unmatched_outcomes": result.num_unmatched,
        "num_resamples": NUM_RESAMPLES,
    }


def as_html(result: AbResult, title: str) -> str:
    """One file that needs nothing outside itself."""
    from mim_ray.pipeline.report.page import page, paragraph, section, table
    from mim_ray.pipeline.report.plots import intervals

    rows = [
        (f"{one.arm}: {TITLES[metric]}", value, low, high)
        for one in result.comparisons
        for metric in METRICS
        for value, low, high in [one.percent[metric]]
        if value is not None and low is not None and high is not None
    ]
    picture = intervals(rows, f"difference to {result.base}, %, with its 95 % interval") if rows else ""
    header = [f"against {result.base}", *(TITLES[metric] for metric in METRICS)]
    sections = [
        section("Arms", "Values with their 95 % intervals, from resampling users.", table(HEADER, _arms(result))),
        section(
            "Differences",
            "An interval that contains 0 is no difference that this test can see.",
            picture,
            table(header, _comparisons(result)),
        ),
        section("To be heeded", "What could make these numbers wrong.", *map(paragraph, _notes(result))),
    ]
    users = sum(len(arm.users) for arm in result.arms.values())
    return page(title, f"{users:,} users, {NUM_RESAMPLES:,} resamples of them. Made {artifacts.now()}.", sections)


def _arms(result: AbResult) -> list[tuple[str, ...]]:
    return [
        (
            name,
            f"{len(arm.users):,}",
            f"{arm.num_requests:,}",
            f"{arm.total('exposures'):,.0f}",
            _text(result.values[name]["ctr"], ".4f"),
            _text(result.values[name]["rpm"], ",.2f"),
        )
        for name, arm in result.arms.items()
    ]


def _comparisons(result: AbResult) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for one in result.comparisons:
        rows.append((one.arm, _text(one.difference["ctr"], "+.4f"), _text(one.difference["rpm"], "+,.2f")))
        rows.append((f"{one.arm}, %", *(_text(one.percent[metric], "+.2f") for metric in METRICS)))
    return rows


def _notes(result: AbResult) -> list[str]:
    notes = []
    if result.mismatched:
        counts = ", ".join(
            f"{name} {len(result.arms[name].users) if name in result.arms else 0:,} ({share:.1%} intended)"
            for name, share in result.expected.items()
        )
        notes.append(
            f"SAMPLE RATIO MISMATCH (p = {result.mismatch_p:.1e}): {counts}. Something makes users of one arm appear or vanish; "
            "find it before you believe any number above."
        )
    elif result.mismatch_p is not None:
        notes.append(f"The users are split over the arms as intended (chi-square p = {result.mismatch_p:.2f}).")
    for name, arm in result.arms.items():
        if len(arm.models) > 1:
            shares = ", ".join(f"{model} {count:,}" for model, count in arm.models.most_common())
            notes.append(
                f"{name} was ranked by {len(arm.models)} model versions (exposed items: {shares}): its figures are a mixture. "
                "Give --since the time of the change."
            )
    if result.num_users_in_several_arms:
        notes.append(
            f"{result.num_users_in_several_arms:,} users were in several arms: the arms or the experiment's name changed in "
            "this time. Give --since the time of the change."
        )
    if result.num_unmatched:
        notes.append(
            f"{result.num_unmatched:,} requests' items with clicks or revenue are not among the exposures and do not count: "
            "below serving.exposed_items, shown before --since, or a request_id of no answer."
        )
    return notes


def _text(estimate: Estimate, form: str) -> str:
    if estimate.value is None:
        return "—"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["   ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _time(text: str | None, option: str) -> datetime | None:
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{option} {text} is no time. Give it as 2026-03-02 or 2026-03-02T12:00:00+00:00.") from None
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)


def _parser(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Shipped scenarios: {', '.join(scenario_names())}. Settings that matter here: run.root, run.center, "
        "serving.arms,\nserving.experiment. docs/serving-events.md explains the figures.",
    )
    parser.add_argument("--config", default="tiny", metavar="NAME|FILE", help="scenario name or YAML file (tiny)")
    parser.add_argument("--since", metavar="TIME", help="exposures from this time on, UTC unless it has a zone")
    parser.add_argument("--until", metavar="TIME", help="exposures before this time; clicks count whenever they came")
    parser.add_argument("--base", metavar="ARM", help="compare with this arm (default: the first of serving.arms)")
    parser.add_argument(
        "--clicks", nargs="+", default=["click"], metavar="EVENT", help="events that are clicks (click)"
    )
    parser.add_argument("--json", metavar="PATH", help="where to write all figures")
    parser.add_argument("--html", metavar="PATH", help="where to write the report with its picture")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ")
    return parser
