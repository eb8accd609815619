"""The command line of jobs/machines.py: parameter machines with the current release."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from mim_ray.config import load_scenario, scenario_names
from mim_ray.errors import ConfigError
from mim_ray.pipeline.cli import told


def main(doc: str | None, argv: Sequence[str] | None = None) -> None:
    """Start, switch or stop; a user's mistake is a sentence and exit status 2."""
    with told("Stopped. The machines go on as they are; the same command goes on."):
        args = _parser(doc).parse_intermixed_args(argv)
        scenario = load_scenario(args.config, args.settings)
        from mim_ray.representation_center.machine_release import read_wanted
        from mim_ray.representation_center.parameter_machines import ParameterMachines
        from mim_ray.runtime.cluster import cluster
        from mim_ray.runtime.summary import format_summary
        from mim_ray.serving.machines import load_current

        state = scenario.machines.state
        if state is None:
            raise ConfigError("machines.state is not set. Give the URI of a small file that every node reaches.")
        _check_joined()
        with cluster(scenario.run):
            if args.stop:
                ParameterMachines.start(state, read_wanted(state)[1], scenario.machines).stop()
                print(f"The parameter machines of {state} are stopped.")
                return
            machines = load_current(scenario)
            serial, release = read_wanted(state)
            rows = [
                ("release", f"{release.release_id} (switch {serial})"),
                ("machines", f"{machines.settings.shards} shards × {machines.settings.replicas} replicas"),
                ("tables", ", ".join(release.tables)),
                ("networks", ", ".join(release.dense)),
            ]
            print(format_summary(f"Parameter machines of {state}", rows))


def _check_joined() -> None:
    import ray

    if not (ray.is_initialized() or os.environ.get("RAY_ADDRESS") or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ):
        raise ConfigError(
            "The machines would end with this command. Submit it to a Ray cluster (ray job submit), or set "
            "RAY_ADDRESS=auto beside one that `ray start` started."
        )


def _parser(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Shipped scenarios: {', '.join(scenario_names())}.",
    )
    parser.add_argument("--config", default="tiny", metavar="NAME|FILE", help="scenario name or YAML file (tiny)")
    parser.add_argument("--stop", action="store_true", help="stop the machines for good")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings that differ")
    return parser
