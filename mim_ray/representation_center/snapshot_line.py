"""A line of snapshots: one folder per encoder version, in it immutable states and a pointer to the current one.

<line>/current.json                  which state is current; replaced in one step
<line>/<snapshot_id>/                a state; ids sort by the time they were made
<line>/kept/<owner>.json             a state that `owner` needs, such as a release

list_snapshots(line)                 # newest first
switch_snapshot(line, snapshot_id)   # roll back, or forward again
newer_state(f"{line}/{snapshot_id}") # what has come after it
keep_snapshot(line, snapshot_id, owner="release")
prune_snapshots(line, keep=3)        # never the current one, nor one that an owner keeps
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.fs as pafs

from mim_ray import artifacts
from mim_ray.errors import ArtifactError
from mim_ray.object_store import storage_errors
from mim_ray.representation_center.snapshot_files import MANIFEST, read_manifest

POINTER = "current.json"
BUILDING = ".building-"
KEPT = "kept"
ABANDONED_AFTER = timedelta(days=1)
_ID_TIME = "%Y%m%dT%H%M%S%fZ"


@dataclass(frozen=True)
class SnapshotState:
    """One state of a line. `uri` opens exactly it; `created_at` is UTC text; `kept_by` names the owners that need it."""

    snapshot_id: str
    uri: str
    encoder_version: str
    delta_version: int
    num_rows: int
    width: int
    dtype: str
    created_at: str
    current: bool
    kept_by: tuple[str, ...]


def new_snapshot_id() -> str:
    """Sorts by time; unique."""
    return f"{datetime.now(UTC):{_ID_TIME}}-{uuid.uuid4().hex[:8]}"


def list_snapshots(line: str) -> list[SnapshotState]:
    """The complete states of a line, newest first; damaged manifests are left out."""
    line = line.rstrip("/")
    current, kept = current_snapshot(line), kept_snapshots(line)
    states = []
    for name in snapshot_ids(line):
        try:
            manifest = read_manifest(f"{line}/{name}")
        except ArtifactError:
            continue
        owners = tuple(sorted(owner for owner, state in kept.items() if state == name))
        states.append(
            SnapshotState(
                name,
                f"{line}/{name}",
                manifest["encoder_version"],
                manifest["delta_version"],
                manifest["rows"],
                manifest["width"],
                manifest["dtype"],
                manifest["created_at"],
                name == current,
                owners,
            )
        )
    return states


def current_snapshot(line: str) -> str | None:
    """Id of the line's current state; None where nothing was built yet.

    Raises:
        ArtifactError: the pointer is damaged.
    """
    uri = f"{line}/{POINTER}"
    if not artifacts.exists(uri):
        return None
    try:
        return str(artifacts.read_json(uri)["snapshot"])
    except (KeyError, TypeError, ValueError):
        raise ArtifactError(f"{uri} is damaged. Write it again with switch_snapshot.") from None


def newer_state(uri: str) -> str | None:
    """URI of the current state of a state's line, where that shows later commits of the table; else None.

    Raises:
        ArtifactError: the line's pointer, or one of the manifests, is missing or damaged.
    """
    line, _, snapshot_id = uri.rpartition("/")
    current = current_snapshot(line)
    if current is None or current == snapshot_id:
        return None
    newer = f"{line}/{current}"
    return newer if read_manifest(newer)["delta_version"] > read_manifest(uri)["delta_version"] else None


def switch_snapshot(line: str, snapshot_id: str) -> None:
    """Make a state current, in one step. Readers that have another one mapped keep it until they open the line again.

    Raises:
        ArtifactError: there is no complete state of this id.
    """
    line = line.rstrip("/")
    try:
        manifest = read_manifest(f"{line}/{snapshot_id}")
    except ArtifactError as error:
        known = ", ".join(snapshot_ids(line)) or "none"
        raise ArtifactError(f"{line} cannot be switched to {snapshot_id!r}: {error} States here: {known}.") from None
    pointer = {"snapshot": snapshot_id, "delta_version": manifest["delta_version"], "switched_at": artifacts.now()}
    artifacts.write_json(f"{line}/{POINTER}", pointer)


def keep_snapshot(line: str, snapshot_id: str | None, *, owner: str) -> None:
    """Note that `owner` needs this state, in the place of the one it needed before; None: needs none any more.

    Raises:
        ArtifactError: there is no complete state of this id.
    """
    uri = f"{line}/{KEPT}/{owner}.json"
    if snapshot_id is None:
        artifacts.remove(uri)
        return
    artifacts.write_json(uri, {"snapshot": snapshot_id, "kept_at": artifacts.now()})
    read_manifest(f"{line}/{snapshot_id}")


def kept_snapshots(line: str) -> dict[str, str]:
    """Owner -> id of the state that it needs."""
    found = {}
    for uri in artifacts.list_files(f"{line}/{KEPT}", ".json"):
        try:
            value = artifacts.read_json(uri)
        except ArtifactError:
            if artifacts.exists(uri):
                raise
            continue  # given up meanwhile
        if isinstance(value, dict) and "snapshot" in value:
            found[uri.rpartition("/")[2].removesuffix(".json")] = str(value["snapshot"])
    return found


def prune_snapshots(line: str, *, keep: int = 3, kept: Collection[str] = ()) -> list[str]:
    """Delete all but the newest `keep` states, the current one, those that owners keep, and the ids in `kept`.

    What builders that died left behind is deleted too. Returns the deleted ids.
    """
    line = line.rstrip("/")
    states = snapshot_ids(line)
    safe = {*states[: max(keep, 1)], current_snapshot(line), *kept_snapshots(line).values(), *kept}
    old = [state for state in states if state not in safe]
    for state in old:
        artifacts.remove(f"{line}/{state}/{MANIFEST}")  # first, so that half a folder is never taken for a state
        artifacts.remove(f"{line}/{state}")
    for folder in set(_folders(line)) - set(states):
        if _is_old(folder):  # without a manifest: an upload, or a deletion, that ended half-way
            artifacts.remove(f"{line}/{folder}")
    local = artifacts.local_path(line)
    for building in () if local is None else local.glob(f"{BUILDING}*"):
        _remove_if_abandoned(building)
    return old


def snapshot_ids(line: str) -> list[str]:
    """Ids of the complete states, newest first."""
    return sorted((name for name in _folders(line) if artifacts.exists(f"{line}/{name}/{MANIFEST}")), reverse=True)


class BuildingFolder:
    """A local folder for a state in the making. Its lock is freed by the system when the builder dies, so that the next
    build can delete what is left."""

    def __init__(self, parent: Path | None, snapshot_id: str) -> None:
        if parent is None:
            parent = Path(os.environ.get("TMPDIR", "/tmp"))
        parent.mkdir(parents=True, exist_ok=True)
        self.path = parent / f"{BUILDING}{snapshot_id}"
        self.path.mkdir()
        self._lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def publish(self, target: Path) -> None:
        """Rename it, without the lock."""
        (self.path / "lock").unlink()
        self.path.rename(target)

    def close(self) -> None:
        """Delete it, if it was not published."""
        os.close(self._lock)
        shutil.rmtree(self.path, ignore_errors=True)


def _folders(line: str) -> list[str]:
    fs, path = artifacts.filesystem(line)
    with storage_errors(line):
        found = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return [
        entry.base_name
        for entry in found
        if entry.type == pafs.FileType.Directory and not entry.base_name.startswith(".") and entry.base_name != KEPT
    ]


def _is_old(name: str) -> bool:
    """Whether a folder has the name of a state that was begun more than `ABANDONED_AFTER` ago."""
    try:
        begun = datetime.strptime(name.partition("-")[0], _ID_TIME).replace(tzinfo=UTC)
    except ValueError:
        return False
    return datetime.now(UTC) - begun > ABANDONED_AFTER


def _remove_if_abandoned(folder: Path) -> None:
    try:
        lock = os.open(folder / "lock", os.O_RDWR)
    except FileNotFoundError:
        return  # being published just now, or just begun
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
