"""The command line of jobs/plan.py."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mim_ray.config import load_scenario, scenario_names
from mim_ray.errors import ConfigError
from mim_ray.pipeline.cli import told
from mim_ray.pipeline.plan import Figure, Needs, check, plan
from mim_ray.pipeline.rates import Rate, load_rates, save_rates


def main(doc: str | None, argv: Sequence[str] | None = None) -> None:
    """Print the plan; a user's mistake is a sentence and exit status 2."""
    with told("Stopped."):
        parser = _parser(doc)
        args = parser.parse_intermixed_args(argv)
        needs = _needs(args)
        if problems := check(needs):
            raise ConfigError("\n".join(problems))
        rates = load_rates(args.rates)
        figures, used = plan(needs, rates)
        print(format_plan(needs, figures, used))
        if args.json is not None:
            report = {"needs": asdict(needs), "figures": [asdict(figure) for figure in figures]}
            report["rates"] = {name: asdict(rate) for name, rate in used.items()}
            Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
        if args.save_rates is not None:
            save_rates(args.save_rates, rates)
            print(f"\n{len(rates)} rates are in {args.save_rates}")


def format_plan(needs: Needs, figures: Sequence[Figure], used: dict[str, Rate]) -> str:
    """The plan as a person reads it: figures by group, then the rates behind them."""
    lines = [f"{needs.items:,.0f} items, width {needs.width}, {needs.dtype}"]
    group = ""
    width = max(len(figure.name) for figure in figures)
    for figure in figures:
        if figure.group != group:
            group = figure.group
            lines += ["", f"── {group} " + "─" * max(0, 76 - len(group))]
        lines.append(f"   {figure.name:<{width}}  {_number(figure):>16}   {figure.basis}")
    lines += ["", "── Measured rates used " + "─" * 56]
    by_source: dict[str, list[str]] = {}
    for name, rate in used.items():
        by_source.setdefault(rate.source, []).append(f"      {name} = {rate.value:,.4g} {rate.unit}   ({rate.note})")
    for source, rows in by_source.items():
        lines += [f"   {source}", *rows]
    return "\n".join(lines if used else lines[:-2])


def _number(figure: Figure) -> str:
    value = figure.value
    if value is None:
        return "missing"
    text = f"{value:,.0f}" if value >= 1_000 else f"{value:,.3g}"
    return f"{text} {figure.unit}".strip()


def _parser(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Width, dtype, shard_rows and commit_every_s come from the scenario unless given. Shipped scenarios: "
        f"{', '.join(scenario_names())}.\ndocs/scale.md explains the model and how to measure rates on your own machines.",
    )
    add = parser.add_argument
    add("--items", type=float, required=True, metavar="N", help="items of the catalogue, such as 1.42e9")
    add("--config", default="mim", metavar="NAME|FILE", help="scenario name or YAML file (mim)")
    add("--width", type=int, help="of an embedding")
    add("--dtype", choices=["float32", "float16", "int8"], help="of the snapshot")
    add("--core-rate", type=float, metavar="ITEMS/S", help="of one core with your encoder (default: the measured one)")
    add("--gpu-rate", type=float, metavar="ITEMS/S", help="of one GPU with your encoder (there is no measured one)")
    add("--cores", type=float, metavar="N", help="that encode")
    add("--gpus", type=float, metavar="N", help="that encode")
    add("--change-ratio", type=float, metavar="PART", help="of the items, new or changed in a day (0.01)")
    add("--kept-snapshots", type=int, metavar="N", help="states that stay for a roll-back (3)")
    add("--replicas", type=int, metavar="N", help="of the parameter machines (2)")
    add("--machine-memory-gb", type=float, metavar="GB", help="of one parameter machine")
    add("--commit-s", type=float, metavar="S", help="of a commit to your store (default: measured on a local disk)")
    add("--price", type=float, metavar="MONEY", help="of a GB stored for a month")
    add("--gpu-price", type=float, metavar="MONEY", help="of a GPU for an hour")
    add("--core-price", type=float, metavar="MONEY", help="of a core for an hour")
    add(
        "--rates",
        nargs="+",
        default=[],
        metavar="FILE",
        help="--json results of benchmarks; they replace shipped rates",
    )
    add("--json", metavar="PATH", help="where to write the figures")
    add("--save-rates", metavar="PATH", help="where to write all rates, shipped ones and those of --rates")
    add("overrides", nargs="*", metavar="section.key=value", help="settings that differ")
    return parser


def _needs(args: argparse.Namespace) -> Needs:
    scenario = load_scenario(args.config, args.overrides)
    values = {name: value for name in Needs.__dataclass_fields__ if (value := getattr(args, name, None)) is not None}
    from_scenario = {
        "width": scenario.encoders.width,
        "dtype": scenario.extraction.snapshot_dtype,
        "shard_rows": scenario.extraction.shard_rows,
        "commit_every_s": scenario.extraction.commit_every_s,
    }
    return Needs(**(from_scenario | values))
