"""The command line of jobs/maintain.py: upkeep of the embedding log, once or again and again."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from mim_ray.artifacts import now
from mim_ray.config import Scenario, load_scenario
from mim_ray.config.load import scenario_names
from mim_ray.errors import ArtifactError, StorageError
from mim_ray.object_store import storage_errors
from mim_ray.pipeline.cli import duration_s, told
from mim_ray.pipeline.layout import Layout

if TYPE_CHECKING:
    from mim_ray.representation_center.maintenance import Upkeep


def main(doc: str | None, argv: Sequence[str] | None = None) -> None:
    """Maintain as the command line says; a user's mistake is a sentence and exit status 2."""
    with told("Stopped. Nothing is half done; the same command goes on."):
        args = _parser(doc).parse_intermixed_args(argv)
        every_s = None if args.every is None else duration_s(args.every, "--every")
        run(load_scenario(args.config, args.settings), every_s=every_s)


def run(scenario: Scenario, *, every_s: float | None = None) -> None:
    """One round with a summary, or one every `every_s` seconds, a line each, until the process is interrupted.

    Raises:
        ArtifactError: there is no table. StorageError: the store does not answer. With `every_s` they are told, and the next
            round tries again.
    """
    from mim_ray.representation_center.maintenance import maintain
    from mim_ray.runtime.summary import format_summary

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    center, settings = Layout.of(scenario).center, scenario.maintenance
    deleted_days = settings.deleted_retention_days
    next_at = time.monotonic()
    while True:
        start = time.monotonic()
        try:
            with storage_errors(center):
                done = maintain(
                    center,
                    retention=timedelta(hours=settings.retention_h),
                    deleted_retention=None if deleted_days is None else timedelta(days=deleted_days),
                    purge_every=timedelta(hours=settings.purge_every_h),
                )
        except (ArtifactError, StorageError) as error:
            if every_s is None:
                raise
            print(f"{now()}  {error}", file=sys.stderr, flush=True)
        else:
            rows = _rows(done, scenario)
            if every_s is None:
                print(
                    format_summary(f"Maintenance of {center}", [*rows, ("took", f"{time.monotonic() - start:.1f} s")])
                )
            else:
                print(f"{now()}  {' | '.join(f'{name} {text}' for name, text in rows)}", flush=True)
        if every_s is None:
            return
        next_at = max(next_at + every_s, time.monotonic())
        time.sleep(max(0.0, next_at - time.monotonic()))


def _rows(done: Upkeep, scenario: Scenario) -> list[tuple[str, str]]:
    merged, purged, vacuumed = done.compacted, done.purged, done.vacuumed
    busy = ", another compaction was at work" if merged.lost or purged.lost else ""
    compacted = (
        f"{merged.num_files_read:,} files into {merged.num_files_written:,}, "
        f"{merged.num_rows_read:,} rows into {merged.num_rows_written:,}"
    )
    gone = f"{vacuumed.num_files:,} files ({_size(vacuumed.num_bytes)}), {vacuumed.num_log_files:,} of the Delta log"
    return [
        ("folded", f"{done.folded.num_segments:,} messages, {done.folded.num_rows:,} rows"),
        ("compacted", (compacted if merged.num_merges else "nothing") + busy),
        ("purged", f"{purged.num_purged:,} deleted items"),
        (
            "vacuumed",
            f"{gone}, {done.num_window_leftovers:,} of the window, older than {scenario.maintenance.retention_h:g} h",
        ),
        (
            "log now",
            f"{done.num_files:,} files, {done.num_rows:,} rows, {_size(done.num_bytes)}, version {done.version:,}",
        ),
    ]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _parser(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="What a round says:\n"
        "  folded     window messages that no serving process had brought into the table yet\n"
        "  compacted  small files merged into larger ones; older rows of the same items are left out\n"
        "  purged     deletions older than maintenance.deleted_retention_days, with all rows of these items\n"
        "  vacuumed   files older than maintenance.retention_h that nothing names any more\n\n"
        f"Shipped scenarios: {', '.join(scenario_names())}. Settings that matter here: run.root,\n"
        "maintenance.retention_h, maintenance.deleted_retention_days, maintenance.purge_every_h.",
    )
    parser.add_argument("--config", default="tiny", metavar="NAME|FILE", help="scenario name or YAML file (tiny)")
    parser.add_argument(
        "--every", metavar="DURATION", help="again and again, a round every 60s, 10min, 2h; without: once"
    )
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings that differ")
    return parser
