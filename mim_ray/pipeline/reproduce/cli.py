"""The command line of jobs/reproduce.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mim_ray.config import load_scenario, scenario_names
from mim_ray.errors import ConfigError
from mim_ray.pipeline.cli import pairs, told

TABLES = (1, 2, 3, 4, 5, 6, 7)
FIGURES = (5, 6)


def main(doc: str | None, argv: Sequence[str] | None = None) -> None:
    """Run what is missing and write the pages; a user's mistake is a sentence and exit status 2."""
    with told("Stopped. The same command goes on with the experiments that are left."):
        args = _parser(doc).parse_intermixed_args(argv)
        if args.seeds < 1:
            raise ConfigError(f"--seeds {args.seeds} is out of range (1 or more).")
        tables = numbers(args.tables, TABLES, "--tables")
        figures = numbers(args.figures, FIGURES, "--figures")
        if not tables and not figures:
            raise ConfigError("Nothing is asked for. Name --tables or --figures.")
        vision = pairs(args.vision, "--vision", "MODEL=FOLDER", "resnet50=/models/resnet50")
        text = pairs(args.text, "--text", "MODEL=FOLDER", "BAAI/bge-base-en-v1.5=/models/bge")
        scenario = load_scenario(args.config, args.overrides)
        from mim_ray.pipeline.reproduce.reproduce import reproduce

        reproduce(
            scenario,
            tables=tables,
            figures=figures,
            backbone=args.backbone,
            num_seeds=args.seeds,
            vision=vision,
            text=text,
        )


def numbers(value: str, known: Sequence[int], option: str) -> list[int]:
    """The numbers of a list such as 2,3,5.

    Raises:
        ConfigError: one that is no such table or figure.
    """
    parts = [part.strip() for part in value.split(",") if part.strip()]
    unknown = [part for part in parts if not part.isdecimal() or int(part) not in known]
    if unknown:
        raise ConfigError(f"{option} {value}: {', '.join(unknown)} is none of {', '.join(map(str, known))}.")
    return sorted({int(part) for part in parts})


def _parser(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Shipped scenarios: " + ", ".join(scenario_names()) + ".",
    )
    parser.add_argument("--config", default="tiny", metavar="NAME|FILE", help="scenario name or YAML file (tiny)")
    parser.add_argument("--tables", default="1,2,3,4,5,6,7", help="of the paper, with commas (1,2,3,4,5,6,7)")
    parser.add_argument("--figures", default="5,6", help="of the paper (5,6)")
    parser.add_argument("--backbone", default="sim", help="user behavior model of all tables but Table 2 (sim)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of every experiment; the paper's tables need 3 (1)")
    parser.add_argument(
        "--vision",
        action="append",
        default=[],
        metavar="MODEL=FOLDER",
        help="an image tower of Figure 5 and its weights (a folder, or hub); may be repeated",
    )
    parser.add_argument(
        "--text", action="append", default=[], metavar="MODEL=FOLDER", help="a language tower of Figure 5, the same"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ")
    return parser
