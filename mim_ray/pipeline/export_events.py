"""Posted events back into training: the log of POST /v1/events as files of the table `interactions`, for jobs/build_samples.py.

One Parquet file for each day of receipt (UTC). A day's file is written again until the day is over, whole or not at all, so
the job may be killed at any moment and run as often as you like. An event that was posted again within a day counts once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mim_ray import artifacts
from mim_ray.config import load_scenario, scenario_names
from mim_ray.data.schema import INTERACTIONS
from mim_ray.data.sources import find_table, is_delta
from mim_ray.errors import ConfigError, DataError
from mim_ray.pipeline.cli import told
from mim_ray.runtime.summary import format_summary
from mim_ray.serving.events import REMEMBERED, event_log, interactions, without_repeated
from mim_ray.serving.row_log_files import SEGMENT

PREFIX = "posted-events-"
DAY = timedelta(days=1)


def main(doc: str | None, argv: Sequence[str] | None = None) -> None:
    """Export, and print what was written; a user's mistake is a sentence and exit status 2."""
    with told("Stopped. Run it again: days that are written stay."):
        parser = argparse.ArgumentParser(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"Shipped scenarios: {', '.join(scenario_names())}. Settings that matter here: run.root, run.center, "
            "data.root.",
        )
        parser.add_argument("--config", default="tiny", metavar="NAME|FILE", help="scenario name or YAML file (tiny)")
        parser.add_argument("--to", metavar="URI", help="folder with the table interactions (default: data.root)")
        parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ")
        args = parser.parse_intermixed_args(argv)
        scenario = load_scenario(args.config, args.overrides)
        root = args.to or scenario.data.root
        if root is None:
            raise ConfigError("There is no data.root to export to. Say where with --to FOLDER.")
        written = export_events(artifacts.center_root(scenario), artifacts.absolute_uri(root))
        rows = [(uri.rpartition("/")[2], f"{num_rows:,} events") for uri, num_rows in written.items()]
        print(format_summary(f"Events in {root}", rows or [("none", "nothing was posted yet")]))


def export_events(center: str, root: str, now: datetime | None = None) -> dict[str, int]:
    """Write the days that are not there, and the last two that are, below `root`/interactions; {file: rows} of what was written.

    Raises:
        DataError: `interactions` is one file or a Delta table, or its columns have types that events do not fit.
    """
    folder = _folder(root)
    types = _types(folder)
    log = event_log(center)
    first = log.first_hour()
    if first is None:
        return {}
    there = [uri for uri in artifacts.list_files(folder, ".parquet") if PREFIX in uri]
    # The day before the last file once more: a process that was held up may have stored something after that file was made.
    start = max([first, *[_day_of(uri) - DAY for uri in there]])
    written = {}
    for day in _days(start, now or datetime.now(UTC)):
        rows = without_repeated(log.read(day - REMEMBERED, day + DAY))
        begin = f"{int(day.timestamp()) * 10**9:020d}"  # segment ids begin with their time
        rows = rows.filter(pc.greater_equal(rows[SEGMENT], begin))
        if rows.num_rows:
            uri = f"{folder}/{PREFIX}{day:%Y-%m-%d}.parquet"
            sink = pa.BufferOutputStream()
            pq.write_table(_as_table(rows, types, folder), sink, compression="zstd")
            artifacts.write_bytes(uri, sink.getvalue().to_pybytes())
            written[uri] = rows.num_rows
    return written


def _folder(root: str) -> str:
    uri = find_table(root, "interactions")
    if uri is None:
        return f"{root}/interactions"
    if is_delta(uri):
        raise DataError(f"{uri} is a Delta table. Append read_events(center) to it yourself (docs/serving-events.md).")
    if artifacts.list_files(uri) == [uri]:
        raise DataError(f"{uri} is one file. Move it into a folder {root}/interactions, beside which events can lie.")
    return uri


def _types(folder: str) -> dict[str, pa.DataType]:
    """Types of the other files' columns: all files of a table must be read alike."""
    for uri in artifacts.list_files(folder, ".parquet"):
        if PREFIX not in uri:
            fs, path = artifacts.filesystem(uri)
            return {field.name: field.type for field in pq.read_schema(path, filesystem=fs)}
    return {}


def _as_table(rows: pa.Table, types: dict[str, pa.DataType], folder: str) -> pa.Table:
    """All columns of `interactions`: the first of a folder's files says which columns the table has."""
    known = interactions(rows)
    columns = {}
    for field in INTERACTIONS.schema:
        wanted = types.get(field.name, field.type)
        column = known[field.name] if field.name in known.column_names else pa.nulls(rows.num_rows, field.type)
        try:
            columns[field.name] = column.cast(wanted)
        except pa.ArrowInvalid as error:
            raise DataError(
                f"Posted events do not fit the column {field.name!r} of {folder}, which is {wanted} ({error}). Write that "
                f"table with {field.type}, or export to another folder with --to."
            ) from None
    return pa.table(columns)


def _days(start: datetime, now: datetime) -> Iterator[datetime]:
    day = start.replace(hour=0, minute=0, second=0, microsecond=0)
    while day <= now:
        yield day
        day += DAY


def _day_of(uri: str) -> datetime:
    return datetime.strptime(uri.rpartition(PREFIX)[2], "%Y-%m-%d.parquet").replace(tzinfo=UTC)
