"""All upkeep of a representation center in one round: fold, compact, purge, vacuum.

A round may be killed at any moment and run again, beside writers, readers and other rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from mim_ray.errors import ArtifactError
from mim_ray.representation_center.compaction import Compacted, compact, purge
from mim_ray.representation_center.snapshot_line import list_snapshots
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import FoldResult, fold
from mim_ray.representation_center.vacuum import Vacuumed, vacuum, vacuum_window


@dataclass(frozen=True)
class Upkeep:
    """What a round did. num_files, num_rows: of the log afterwards, all encoder versions together."""

    folded: FoldResult
    compacted: Compacted
    purged: Compacted
    vacuumed: Vacuumed
    num_window_leftovers: int
    num_files: int
    num_rows: int
    num_bytes: int
    version: int


def maintain(
    center: str,
    *,
    retention: timedelta,
    deleted_retention: timedelta | None,
    purge_every: timedelta,
    now: datetime | None = None,
) -> Upkeep:
    """One round for the center at this URI.

    Args:
        retention: replaced files, leftovers and marks of folded segments stay this long. Longer than the longest job that
            reads or writes the log.
        deleted_retention: deletions stay at least this long, then they and the rows that they hide are dropped; None: forever.
        purge_every: a deletion may stay longer by this, so that the log is rewritten no more often.

    Raises:
        ArtifactError: there is no table, a retention is too short, or a segment is damaged (all else is done before).
    """
    now = datetime.now(UTC) if now is None else now
    table, window = EmbeddingTable(f"{center}/table"), f"{center}/window"
    folded, damaged = FoldResult(), None
    try:
        folded = fold(window, table)
    except ArtifactError as error:
        table.open()  # a missing table is the end of it
        damaged = error
    compacted, purged = Compacted(), Compacted()
    for version in table.encoder_versions():
        shown = [state.delta_version for state in list_snapshots(f"{center}/snapshots/{version}")]
        if deleted_retention is not None:
            purged += purge(
                table,
                version,
                before=now - deleted_retention,
                committed_before=now - retention,
                until=min(shown, default=None),
                overdue_before=now - deleted_retention - purge_every,
            )
        compacted += compact(table, version, keep_apart=shown, forget_segments_before=now - retention)
    vacuumed = vacuum(table, retention=retention)
    leftovers = vacuum_window(window, retention=retention)
    if damaged is not None:
        raise damaged
    files = table.files()
    return Upkeep(
        folded,
        compacted,
        purged,
        vacuumed,
        leftovers,
        len(files),
        sum(file.num_rows for file in files),
        sum(file.num_bytes for file in files),
        table.version,
    )
