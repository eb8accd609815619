"""The command line of jobs/refresh.py: rounds of the refresh, once or again and again, a line for each."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mim_ray.artifacts import now
from mim_ray.config import Scenario, load_scenario
from mim_ray.config.load import scenario_names
from mim_ray.errors import ConfigError
from mim_ray.pipeline.cli import duration_s, told
from mim_ray.pipeline.layout import Layout

if TYPE_CHECKING:
    from mim_ray.extraction.refresh import Refresher, Round


def main(doc: str | None, argv: Sequence[str] | None = None) -> None:
    """Refresh as the command line says; a user's mistake is a sentence and exit status 2."""
    with told("Stopped. The same command goes on with what is left."):
        args = _parser(doc).parse_intermixed_args(argv)
        every_s = None if args.every is None else duration_s(args.every, "--every")
        if every_s is not None and args.full:
            raise ConfigError("--full compares the whole catalogue, which is not for every round: run it once, alone.")
        refresh(load_scenario(args.config, args.settings), every_s=every_s, full=args.full)


def refresh(scenario: Scenario, *, every_s: float | None = None, full: bool = False) -> None:
    """One round, or one every `every_s` seconds until the process is interrupted. Leaves quietly when another is at work."""
    from mim_ray.runtime.cluster import cluster
    from mim_ray.runtime.lease import LeaseTakenError

    layout = Layout.of(scenario)
    again = True
    while again:
        refresher = _refresher(scenario, layout)  # a new encoder, a new refresher
        print(
            f"refresh of {layout.center}, encoder {refresher.encoder_version}, catalogue {refresher.items}", flush=True
        )
        try:
            with refresher, cluster(scenario.run):  # in this order: who has no lease starts no Ray
                signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has its own, which gives nothing back
                again = _rounds(refresher, scenario, layout, every_s, full)
        except LeaseTakenError as error:
            print(f"{error} This one leaves.", flush=True)
            return


def _rounds(refresher: Refresher, scenario: Scenario, layout: Layout, every_s: float | None, full: bool) -> bool:
    """Rounds of one encoder version; whether there is another version now, so that a new refresher is needed."""
    from mim_ray.errors import ArtifactError, DataError
    from mim_ray.runtime.lease import LeaseTakenError

    next_at = time.monotonic()
    while True:
        if every_s is None:
            _show(refresher.round(full=full))
            return False
        try:
            if _encoder_version(scenario, layout) != refresher.encoder_version:
                return True
            _show(refresher.round())
        except LeaseTakenError:
            raise
        except (ArtifactError, DataError) as error:  # the catalogue may be better in a minute
            print(f"{now()}  nothing done: {error}", file=sys.stderr, flush=True)
        next_at = max(next_at + every_s, time.monotonic())
        time.sleep(max(0.0, next_at - time.monotonic()))


def _refresher(scenario: Scenario, layout: Layout) -> Refresher:
    from mim_ray.extraction.refresh import open_refresher

    return open_refresher(
        scenario,
        data_root=layout.data_root,
        encoder=layout.encoder(scenario.extraction.encoder),
        center=layout.center,
        rejects=layout.rejects,
    )


def _encoder_version(scenario: Scenario, layout: Layout) -> str:
    from mim_ray.extraction.run import describe_encoder

    return describe_encoder(layout.encoder(scenario.extraction.encoder))[0]


def _show(done: Round) -> None:
    for note in done.notes:
        print(note, flush=True)
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in sorted(done.rejected.items())) or "0"
    older = f", {done.older:,} older than known" if done.older else ""
    print(
        f"{now()}  new {done.new:,}, changed {done.changed:,}, deleted {done.deleted:,}, unchanged {done.unchanged:,}"
        f"{older} | encoded {done.encoded:,}, copied {done.copied:,}, rejected {rejected} | {done.seconds:.2f} s | "
        f"snapshot {done.snapshot or 'none'}{' (new)' if done.built else ''}",
        flush=True,
    )


def _parser(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A round's line: what was found (new, changed, deleted, unchanged; older: a newer real-time item stays), what was\n"
        "done (encoded, copied from an item with the same content, rejected by reason), seconds, the newest snapshot.\n\n"
        f"Shipped scenarios: {', '.join(scenario_names())}. Settings that matter here: run.root, data.root, extraction.encoder,\n"
        "extraction.num_actors, refresh.warm_rows, refresh.max_deleted_ratio, refresh.snapshot_every_s (jobs/extract.py --keys).",
    )
    parser.add_argument("--config", default="tiny", metavar="NAME|FILE", help="scenario name or YAML file (tiny)")
    parser.add_argument(
        "--every", metavar="DURATION", help="again and again, a round every 60s, 5min, 2h; without: once"
    )
    parser.add_argument("--full", action="store_true", help="compare the whole catalogue, whatever was noted before")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings that differ")
    return parser
