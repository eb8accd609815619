"""Checks before a release: do snapshot, CTR model and encoder belong together, and are they there?

    release = promote_version(scenario, "csft-…", snapshot_id=None, ctr="sim-mim")
    release = return_to(scenario, number=None)

Both end in one commit (representation_center/release.py); what serving is told changes in that moment and in no other.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow.fs as pafs

from mim_ray import artifacts
from mim_ray.config import Scenario
from mim_ray.config.scenario import ENCODER_FOLDERS
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.release import Release, check_versions, promote, releases, roll_back
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.snapshot_line import SnapshotState, keep_snapshot, kept_snapshots, list_snapshots
from mim_ray.serving.served import Served

NO_MODEL = "none"
KEPT_RELEASES = 3  # their snapshots are not pruned: current, and two to go back to
_OWNER = "release-"


@dataclass(frozen=True)
class Center:
    """A representation center and the run whose models may be bound to its embeddings.

    Attributes:
        uri: of the center. root: of the run.
    """

    uri: str
    root: str

    @classmethod
    def of(cls, scenario: Scenario) -> Center:
        return cls(artifacts.center_root(scenario), artifacts.run_root(scenario))

    def line(self, version: str) -> str:
        """URI of an encoder version's snapshots."""
        return f"{self.uri}/snapshots/{version}"

    def versions(self) -> dict[str, list[SnapshotState]]:
        """Encoder version -> its snapshots, newest first; versions without any are left out."""
        fs, path = artifacts.filesystem(f"{self.uri}/snapshots")
        found = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        names = sorted(entry.base_name for entry in found if entry.type == pafs.FileType.Directory)
        states = {name: list_snapshots(self.line(name)) for name in names}
        return {name: known for name, known in states.items() if known}


def promote_version(
    scenario: Scenario, version: str | None = None, *, snapshot_id: str | None = None, ctr: str | None = None
) -> Release:
    """Make an encoder version current.

    Args:
        version: None: the one that the run's extraction filled.
        snapshot_id: one state of its snapshots. Default: the line's current one.
        ctr: URI of the CTR model, or a variant's name (ctr/<name> below the run's root), or "none". Default: the run's
            model that serving would use, where the run has one.

    Raises:
        ArtifactError: the snapshot is missing or damaged, or the model is.
        VersionMismatchError: the model was trained on another encoder version.
    """
    center = Center.of(scenario)
    if version is None:
        version = _version_of_run(center)
    state = _state(center, version, snapshot_id)
    _check_snapshot(state)
    model = _model(scenario, center, ctr)
    if model is not None:
        _check_model(model, version, state.uri)
    keep_snapshot(center.line(version), state.snapshot_id, owner=f"{_OWNER}{state.snapshot_id}")
    release = promote(
        center.uri,
        encoder_version=version,
        snapshot=state.uri,
        ctr_model=model,
        encoder=_encoder(scenario, center, version),
    )
    _keep_only_recent(center)
    return release


def return_to(scenario: Scenario, number: int | None = None) -> Release:
    """Make an earlier release current again, when all that it names is still there.

    Args:
        number: of that release. Default: the one before current.

    Raises:
        ArtifactError: there is none, or its snapshot or model is gone.
    """
    center = Center.of(scenario)
    known = releases(center.uri)
    wanted = known[-2:-1] if number is None else [release for release in known if release.number == number]
    for release in wanted:
        line, _, snapshot_id = release.snapshot.rpartition("/")
        _check_snapshot(_state(center, release.encoder_version, snapshot_id))
        if release.ctr_model is not None:
            _check_model(release.ctr_model, release.encoder_version, release.snapshot)
        keep_snapshot(line, snapshot_id, owner=f"{_OWNER}{snapshot_id}")
    release = roll_back(center.uri, wanted[0].number if wanted else number)
    _keep_only_recent(center)
    return release


def _version_of_run(center: Center) -> str:
    manifest = artifacts.read_manifest(f"{center.root}/extraction")
    if manifest is None:
        known = ", ".join(center.versions()) or "none"
        raise ArtifactError(
            f"{center.root}/extraction holds no finished extraction. Name the encoder version to promote; {center.uri} has "
            f"snapshots of: {known}."
        )
    return str(manifest.metrics["encoder_version"])


def _state(center: Center, version: str, snapshot_id: str | None) -> SnapshotState:
    states = list_snapshots(center.line(version)) if "/" not in version else []
    if not states:
        known = ", ".join(center.versions()) or "none"
        raise ArtifactError(
            f"{center.uri} has no snapshot of encoder version {version} (it has: {known}). Run jobs/extract.py for it first."
        )
    wanted = [state for state in states if (state.current if snapshot_id is None else state.snapshot_id == snapshot_id)]
    if not wanted:
        there = ", ".join(state.snapshot_id for state in states)
        raise ArtifactError(
            f"{center.line(version)} has no snapshot {snapshot_id or 'marked as current'} (it has: {there}). Name one of "
            "them, or build one with jobs/extract.py."
        )
    return wanted[0]


def _check_snapshot(state: SnapshotState) -> None:
    """A local one is read whole. Of a remote one the manifest was read; who maps it checks what he downloads."""
    version = state.uri.rpartition("/")[0].rpartition("/")[2]
    check_versions(version, state.encoder_version, expected_by=f"The line of snapshots {version}", found_in=state.uri)
    if artifacts.local_path(state.uri) is not None:
        Snapshot.open(state.uri)


def _model(scenario: Scenario, center: Center, ctr: str | None) -> str | None:
    if ctr == NO_MODEL:
        return None
    if ctr is None:
        if not artifacts.exists(f"{center.root}/extraction/{artifacts.MANIFEST}"):
            return None
        model = Served.of_run(scenario).ctr
        return model if artifacts.exists(f"{model}/ctr.json") else None
    if "/" not in ctr:
        return f"{center.root}/ctr/{ctr}"
    return artifacts.absolute_uri(ctr)


def _check_model(model: str, version: str, snapshot: str) -> None:
    info = artifacts.read_json(f"{model}/ctr.json")
    trained_on = info.get("encoder_version") if isinstance(info, dict) else None
    if trained_on is not None:  # None: it uses no embeddings and goes with any
        check_versions(trained_on, version, expected_by=f"The CTR model {model}", found_in=f"the snapshot {snapshot}")


def _encoder(scenario: Scenario, center: Center, version: str) -> str | None:
    """The run's encoder if it is the one that made the embeddings; else that of an earlier release of this version."""
    uri = f"{center.root}/{ENCODER_FOLDERS[scenario.extraction.encoder]}"
    if (
        artifacts.exists(f"{uri}/encoder.json")
        and artifacts.read_json(f"{uri}/encoder.json")["encoder_version"] == version
    ):
        return uri
    earlier = [release.encoder for release in releases(center.uri) if release.encoder_version == version]
    return next((encoder for encoder in reversed(earlier) if encoder is not None), None)


def _keep_only_recent(center: Center) -> None:
    """Let the snapshots of older releases be pruned. Another promoter may have done so while ours was not in the list yet:
    current is kept once more."""
    needed: list[str] = []
    for release in reversed(releases(center.uri)):
        if release.snapshot not in needed:
            needed.append(release.snapshot)
    needed = needed[:KEPT_RELEASES]
    for version in center.versions():
        line = center.line(version)
        for owner, snapshot_id in kept_snapshots(line).items():
            if owner.startswith(_OWNER) and f"{line}/{snapshot_id}" not in needed:
                keep_snapshot(line, None, owner=owner)
    for uri in needed[:1]:
        line, _, snapshot_id = uri.rpartition("/")
        if kept_snapshots(line).get(f"{_OWNER}{snapshot_id}") != snapshot_id:
            keep_snapshot(line, snapshot_id, owner=f"{_OWNER}{snapshot_id}")
