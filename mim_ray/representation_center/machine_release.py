"""What the parameter machines hold: the tables and dense parameters of one release, and where that is written down.

release = MachineRelease("2026-11-21", {"mm": TableSource(snapshot, table=…, window=…)}, dense={"ctr": uri})
write_wanted(state, release, shape=(2, 2))     # a small file; a machine that comes back reads it
serial, release = read_wanted(state)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mim_ray import artifacts
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.release import Release
from mim_ray.representation_center.snapshot_line import current_snapshot, keep_snapshot


@dataclass(frozen=True)
class TableSource:
    """URIs of one embedding table: MM embeddings, or an ID table (a snapshot with encoder version "none").

    Attributes:
        snapshot: the exact one. table, window: the Delta log and the window folder with newer rows; None: there are none.
    """

    snapshot: str
    table: str | None = None
    window: str | None = None


@dataclass(frozen=True)
class MachineRelease:
    """
    Attributes:
        release_id: names it in answers. tables: by the name that lookups give.
        dense: safetensors files by name.
    """

    release_id: str
    tables: Mapping[str, TableSource]
    dense: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        center: str,
        release: Release,
        *,
        id_tables: Mapping[str, str] | None = None,
        dense: Mapping[str, str] | None = None,
    ) -> MachineRelease:
        """What a promoted release needs: its MM embeddings as table "mm", with the center's log and window above them.

        Args:
            id_tables: snapshots of ID tables by name. dense: safetensors files by name.
        """
        tables = {"mm": TableSource(release.snapshot, f"{center}/table", f"{center}/window")}
        tables |= {name: TableSource(snapshot) for name, snapshot in (id_tables or {}).items()}
        return cls(str(release.number), tables, dense or {})

    def exact(self) -> MachineRelease:
        """The same with one state in the place of every line of snapshots: machines that open it later must see the same."""
        tables = {}
        for name, source in self.tables.items():
            state = current_snapshot(source.snapshot)
            tables[name] = source if state is None else replace(source, snapshot=f"{source.snapshot}/{state}")
        return replace(self, tables=tables)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MachineRelease:
        tables = {name: TableSource(**source) for name, source in value["tables"].items()}
        return cls(value["release_id"], tables, dict(value["dense"]))


def keep_states(release: MachineRelease | None, *, owner: str, before: MachineRelease | None) -> None:
    """Keep a release's snapshots from being pruned while machines hold it, and no longer those of the one before."""
    lines = {} if release is None else _states_by_line(release)
    for line, state in lines.items():
        keep_snapshot(line, state, owner=owner)
    for line in {} if before is None else _states_by_line(before):
        if line not in lines:
            keep_snapshot(line, None, owner=owner)


def write_wanted(
    state: str,
    release: MachineRelease,
    *,
    shape: tuple[int, int] | None = None,
    prepare: Callable[[int, MachineRelease], None] | None = None,
) -> int:
    """Make this the release that machines open when they start; its serial number, which grows with every call.

    Args:
        shape: (shards, replicas) of the machines that are going to start; None: as they were.
        prepare: is called with the serial number before anything is written.
    """
    before = artifacts.read_json(state) if artifacts.exists(state) else {"serial": 0}
    serial = int(before["serial"]) + 1
    if prepare is not None:
        prepare(serial, release)
    shards, replicas = shape or (before["shards"], before["replicas"])
    value = {"serial": serial, "shards": shards, "replicas": replicas, "release": release.to_json()}
    artifacts.write_json(state, value)
    return serial


def read_wanted(state: str) -> tuple[int, MachineRelease]:
    """
    Raises:
        ArtifactError: missing or damaged.
    """
    value = artifacts.read_json(state)
    try:
        return int(value["serial"]), MachineRelease.from_json(value["release"])
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ArtifactError(f"{state} is damaged. Start the parameter machines again, with a release.") from None


def read_shape(state: str) -> tuple[int, int]:
    """Shards and replicas of the machines that were started last."""
    value = artifacts.read_json(state)
    return int(value["shards"]), int(value["replicas"])


def _states_by_line(release: MachineRelease) -> dict[str, str]:
    found = {}
    for source in release.tables.values():
        line, _, state = source.snapshot.rpartition("/")
        found[line] = state
    return found
