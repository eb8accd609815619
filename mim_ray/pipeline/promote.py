"""The command line of jobs/promote.py: what is current in a representation center, and switching it."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence

from mim_ray.config import Scenario, load_scenario, scenario_names
from mim_ray.errors import ConfigError
from mim_ray.pipeline.cli import told

COMMANDS = {
    "show": "what is current, and what could be",
    "list": "all releases, newest first",
    "promote": "promote [VERSION]: make an encoder version current (default: the one that the run's extraction filled)",
    "back": "return to the release before the current one, or to --to NUMBER",
}


def main(doc: str | None, argv: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake is a sentence and exit status 2."""
    with told("Stopped. Nothing was switched."):
        parser = _parser(doc)
        args = parser.parse_intermixed_args(argv)
        words = [word for word in args.words if "=" not in word]
        scenario = load_scenario(args.config, [word for word in args.words if "=" in word])
        command, values = (words[0], words[1:]) if words else ("show", [])
        command = "back" if command == "roll-back" else command
        _check(command, values, args)
        if command == "show":
            show(scenario)
        elif command == "list":
            show_releases(scenario)
        elif command == "promote":
            promote(scenario, values[0] if values else None, args.snapshot, args.ctr)
        else:
            back(scenario, args.to)


def show(scenario: Scenario) -> None:
    """Print the current release and the snapshots of all encoder versions."""
    from mim_ray.representation_center.release import read_release
    from mim_ray.runtime.summary import format_summary
    from mim_ray.serving.promotion import Center

    center = Center.of(scenario)
    release, versions = read_release(center.uri), center.versions()
    print(format_summary(f"Release of {center.uri}", _rows(release)))
    rows = [
        (
            version if number == 0 else "",
            f"{state.snapshot_id}  {state.num_rows:,} × {state.width} {state.dtype}, Delta version {state.delta_version}"
            + ("  <- current release" if release is not None and release.snapshot == state.uri else ""),
        )
        for version, states in versions.items()
        for number, state in enumerate(states)
    ]
    print("\n" + format_summary("Snapshots", rows or [("none", "run jobs/extract.py first")]))


def show_releases(scenario: Scenario) -> None:
    """Print all releases."""
    from mim_ray.representation_center.release import releases
    from mim_ray.runtime.summary import format_summary
    from mim_ray.serving.promotion import Center

    center = Center.of(scenario)
    rows = [
        (
            f"{release.number}{' current' if number == 0 else ''}",
            f"{release.promoted_at}  {release.encoder_version}  {release.snapshot.rpartition('/')[2]}  "
            f"{release.ctr_model or 'no CTR model'}" + (f"  (again {release.same_as})" if release.same_as else ""),
        )
        for number, release in enumerate(reversed(releases(center.uri)))
    ]
    print(format_summary(f"Releases of {center.uri}", rows or [("none", "nothing was promoted yet")]))


def promote(scenario: Scenario, version: str | None, snapshot_id: str | None, ctr: str | None) -> None:
    """Check what belongs together, switch, print the new release."""
    from mim_ray.runtime.summary import format_summary
    from mim_ray.serving.promotion import promote_version

    before = _current_version(scenario)
    release = promote_version(scenario, version, snapshot_id=snapshot_id, ctr=ctr)
    print(format_summary("Promoted", _rows(release)))
    if release.ctr_model is None:
        print("\nNo CTR model is bound to it: ranking takes the run's, if that was trained on this encoder version.")
    if release.encoder is None:
        print("\nThe run's encoder is of another version: the new-item encoder will refuse to start with this release.")
    _tell_of_posted_items(before, release.encoder_version)


def back(scenario: Scenario, number: int | None) -> None:
    """Return to an earlier release, print it."""
    from mim_ray.runtime.summary import format_summary
    from mim_ray.serving.promotion import return_to

    before = _current_version(scenario)
    release = return_to(scenario, number)
    print(format_summary("Back", _rows(release)))
    _tell_of_posted_items(before, release.encoder_version)


def _current_version(scenario: Scenario) -> str | None:
    from mim_ray.representation_center.release import read_release
    from mim_ray.serving.promotion import Center

    release = read_release(Center.of(scenario).uri)
    return None if release is None else release.encoder_version


def _tell_of_posted_items(before: str | None, version: str) -> None:
    if before is not None and before != version:
        print(
            f"\nThe encoder version before was {before}. Items that were posted to /v1/items under it and are not in the catalogue "
            "are not encoded\nagain: they are ranked without content until they are posted again."
        )


def _parser(doc: str | None) -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:{width}}{text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Commands:\n{commands}\n\nShipped scenarios: {', '.join(scenario_names())}. Settings that matter here: "
        "run.root, run.center,\nserving.variant, ciubm.variants. Rankers that run take up a new release by themselves; "
        "parameter machines are switched by jobs/machines.py.",
    )
    parser.add_argument("--config", default="tiny", metavar="NAME|FILE", help="scenario name or YAML file (tiny)")
    parser.add_argument("--snapshot", metavar="ID", help="promote: this state of the snapshots, not the newest")
    parser.add_argument(
        "--ctr",
        metavar="URI|VARIANT|none",
        help="promote: the CTR model to bind (default: the run's model that serving would use)",
    )
    parser.add_argument("--to", type=int, metavar="NUMBER", help="back: to this release")
    parser.add_argument("words", nargs="*", metavar="COMMAND | section.key=value", help="see below")
    return parser


def _check(command: str, values: list[str], args: argparse.Namespace) -> None:
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ConfigError(f"{command!r} is no command{hint} Commands: {', '.join(COMMANDS)}.")
    if len(values) > (command == "promote"):
        raise ConfigError(f"{command} does not take {' '.join(values)!r}. `--help` shows what each command takes.")
    for option, owner in (("snapshot", "promote"), ("ctr", "promote"), ("to", "back")):
        if getattr(args, option) is not None and command != owner:
            raise ConfigError(f"--{option} belongs to the command {owner}, not to {command}.")


def _rows(release: object) -> list[tuple[str, str]]:
    from mim_ray.representation_center.release import Release

    if not isinstance(release, Release):
        return [("current", "nothing was promoted yet: serving takes what its run left")]
    again = f", again {release.same_as}" if release.same_as else ""
    return [
        ("release", f"{release.number}{again}, {release.promoted_at}"),
        ("encoder version", release.encoder_version),
        ("snapshot", release.snapshot),
        ("CTR model", release.ctr_model or "none"),
        ("encoder", release.encoder or "not known"),
    ]
