"""The entry of every job: read the scenario, run what is missing, tell the user's mistakes in a sentence.

Libraries are imported when the command line has been read, so that `--help` and a misspelt setting answer at once.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence

from mim_ray.config import Scenario, scenario_from_cli
from mim_ray.errors import ConfigError, MimRayError
from mim_ray.object_store import storage_error

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3_600, "d": 86_400}


def job_main(doc: str | None, prefix: str, argv: Sequence[str] | None = None) -> None:
    """Run the stage called `prefix`, or all stages below that folder, and whatever they need."""

    def job(scenario: Scenario) -> None:
        from mim_ray.pipeline.graph import pipeline

        chain = pipeline(scenario)
        chain.run([name for name in chain.stages if name == prefix or name.startswith(prefix + "/")])

    _run(doc, job, argv)


def run_all_main(doc: str | None, argv: Sequence[str] | None = None) -> None:
    """Run all stages, then the report."""

    def job(scenario: Scenario) -> None:
        from mim_ray.pipeline.run_all import run_all

        run_all(scenario)

    _run(doc, job, argv)


def serve_main(doc: str | None, argv: Sequence[str] | None = None) -> None:
    """Serve what a finished run left until Ctrl-C."""

    def job(scenario: Scenario) -> None:
        from mim_ray.pipeline.serve_run import serve_run

        serve_run(scenario)

    _run(doc, job, argv, "Stopped before the apps were up.")


def duration_s(text: str, option: str) -> float:
    """Seconds of a duration on the command line: 60s, 5min, 2h, 1d.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or (match[2] or "s") not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"{option} {text} is no duration. Give a number with a unit: 60s, 5min, 2h.")
    return float(match[1]) * _UNITS[match[2] or "s"]


def pairs(values: Sequence[str], option: str, form: str, example: str) -> dict[str, str]:
    """What an option that may be repeated says: {name: value} of each NAME=VALUE.

    Args:
        form, example: told to a user whose value is none.

    Raises:
        ConfigError: something that is no pair, or a name twice.
    """
    found: dict[str, str] = {}
    for text in values:
        name, sign, value = text.partition("=")
        if not sign or not name or not value:
            raise ConfigError(f"{option} {text} is not of the form {form}, for example {option} {example}.")
        if name in found:
            raise ConfigError(f"{option} {text}: {name} is named twice. Give another name.")
        found[name] = value
    return found


@contextlib.contextmanager
def told(stopped: str) -> Iterator[None]:
    """A user's mistake in the block is a sentence and exit status 2; Ctrl-C says `stopped`."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)
    except MimRayError as error:
        _tell(error)
    except Exception as error:
        from mim_ray.runtime.cluster import user_error

        cause = user_error(error) or storage_error(error)
        if cause is None:
            raise
        _tell(cause)


def _run(
    doc: str | None,
    job: Callable[[Scenario], None],
    argv: Sequence[str] | None,
    stopped: str = "Stopped. The same command goes on after the last finished stage.",
) -> None:
    with told(stopped):
        job(scenario_from_cli(doc, argv))


def _tell(error: MimRayError) -> None:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(2)
