"""The command line of jobs/evaluate_ctr.py: judge the run's CTR models, and tables of predictions from elsewhere beside them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from mim_ray.config import Scenario, load_scenario, scenario_names
from mim_ray.errors import ConfigError
from mim_ray.pipeline.cli import pairs, told

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TAKEN = frozenset({"user", "impression", "item", "label", "popularity", "mean_cosine", "oracle"})


def main(doc: str | None, argv: Sequence[str] | None = None) -> None:
    """Run what is missing for the evaluation, or compare; a user's mistake is a sentence and exit status 2."""
    with told("Stopped. The same command goes on after the last finished stage."):
        args = _parser(doc).parse_intermixed_args(argv)
        scenario = load_scenario(args.config, args.overrides)
        given = _named(args.predictions or [])
        if args.only_predictions and not given:
            raise ConfigError("--only-predictions needs tables to judge. Name them with --predictions NAME=URI.")
        if given:
            compare(scenario, given, with_models=not args.only_predictions)
        else:
            from mim_ray.pipeline.graph import pipeline

            pipeline(scenario).run(["evaluation"])


def compare(scenario: Scenario, given: dict[str, str], *, with_models: bool) -> None:
    """Judge predictions by name -> URI, each against the run's models and those named before it; writes compared.json.

    Args:
        with_models: beside the run's models, which are trained where they are not; else the run's samples are enough.
    """
    from mim_ray import artifacts
    from mim_ray.ciubm.evaluate import compare as judge
    from mim_ray.pipeline.graph import pipeline, reference_snapshot
    from mim_ray.runtime.summary import format_summary

    chain = pipeline(scenario)
    chain.run(["evaluation" if with_models else "samples"])
    layout = chain.layout
    tables: dict[str, str] = {}
    if with_models:
        folder = f"{layout.stage('evaluation')}/predictions"
        tables = {variant: f"{folder}/{variant}.parquet" for variant in chain.scenario.ciubm.variants}
    if both := sorted(tables.keys() & given.keys()):
        raise ConfigError(f"--predictions {both[0]}=… has the name of one of the run's models. Give it another one.")
    output = f"{layout.root}/compared.json"
    result = judge(
        chain.scenario,
        samples=layout.samples,
        predictions=tables | {name: artifacts.absolute_uri(uri) for name, uri in given.items()},
        snapshot=reference_snapshot(layout),
        truth=layout.true_probs if scenario.data.root is None else None,
        output=output,
    )
    print(format_summary("Compared", [*result.rows, ("all figures", output)]))


def _named(options: Sequence[str]) -> dict[str, str]:
    given = pairs(options, "--predictions", "NAME=URI", "theirs=theirs.parquet")
    for name in given:
        if _NAME.fullmatch(name) is None:
            raise ConfigError(f"--predictions {name}=…: a name has letters, digits, '_', '.' and '-'.")
        if name in _TAKEN:
            raise ConfigError(f"--predictions {name}=…: the name {name} is taken. Give it another one.")
    return given


def _parser(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Shipped scenarios: {', '.join(scenario_names())}.",
    )
    parser.add_argument("--config", default="tiny", metavar="NAME|FILE", help="scenario name or YAML file (tiny)")
    parser.add_argument(
        "--predictions",
        action="append",
        metavar="NAME=URI",
        help="a table (impression_id, prob), Parquet or Delta, to judge beside the run's models; may be given several times",
    )
    parser.add_argument("--only-predictions", action="store_true", help="judge these tables without the run's models")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ")
    return parser
