"""The entry of every job: read the scenario, run what is missing, tell the user's mistakes in a sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from mim_ray.config import Scenario, scenario_from_cli
from mim_ray.pipeline.graph import pipeline
from mim_ray.runtime.cluster import user_error


def job_main(doc: str | None, prefix: str, argv: Sequence[str] | None = None) -> None:
    """Run the stage called `prefix`, or all stages below that folder, and whatever they need."""

    def job(scenario: Scenario) -> None:
        chain = pipeline(scenario)
        chain.run([name for name in chain.stages if name == prefix or name.startswith(prefix + "/")])

    run_job(doc, job, argv)


def run_job(doc: str | None, job: Callable[[Scenario], object], argv: Sequence[str] | None = None) -> None:
    """Call `job` with the scenario of the command line. A user's mistake prints a sentence and exits with 2."""
    try:
        job(scenario_from_cli(doc, argv))
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on after the last finished stage.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        cause = user_error(error)
        if cause is None:
            raise
        print(f"{type(cause).__name__}: {cause}", file=sys.stderr)
        sys.exit(2)
