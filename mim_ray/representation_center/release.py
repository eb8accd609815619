"""Which encoder version, snapshot and CTR model are current, in one small file that changes atomically.

promote(center, encoder_version="csft-…", snapshot=uri, ctr_model=uri)      # center/current.json
release = read_release(center)                                             # None before the first promotion
roll_back(center)                                                          # to the release before

check_versions("csft-a", "csft-b", expected_by="CTR model …", found_in="snapshot …")   # raises, naming both
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from mim_ray import artifacts
from mim_ray.errors import ArtifactError, VersionMismatchError


@dataclass(frozen=True)
class Release:
    """What serving and offline training should use. `ctr_model` is None where no model is bound to it yet."""

    encoder_version: str
    snapshot: str
    ctr_model: str | None
    promoted_at: str


def promote(center: str, *, encoder_version: str, snapshot: str, ctr_model: str | None = None) -> Release:
    """Make this the current release; the one before is kept for `roll_back`."""
    release = Release(encoder_version, snapshot, ctr_model, artifacts.now())
    previous = read_release(center)
    _write(center, release, previous)
    return release


def read_release(center: str) -> Release | None:
    """The current release, or None when nothing was promoted.

    Raises:
        ArtifactError: current.json is damaged.
    """
    return _read(center, "current")


def roll_back(center: str) -> Release:
    """Make the release before current again; a second call returns.

    Raises:
        ArtifactError: there is none before.
    """
    previous = _read(center, "previous")
    if previous is None:
        raise ArtifactError(f"{center}/current.json names no release before the current one, so there is no way back.")
    _write(center, previous, read_release(center))
    return previous


def check_versions(expected: str | None, found: str | None, *, expected_by: str, found_in: str) -> None:
    """
    Raises:
        VersionMismatchError: the two encoder versions differ (None = uses no embeddings).
    """
    if expected != found:
        raise VersionMismatchError(
            f"{expected_by} was made with encoder version {expected}, but {found_in} holds {found}. "
            f"Use embeddings of {expected}, or train the model again with those of {found}."
        )


def _read(center: str, key: str) -> Release | None:
    uri = f"{center}/current.json"
    if not artifacts.exists(uri):
        return None
    try:
        value = artifacts.read_json(uri)[key]
        return None if value is None else Release(**value)
    except (KeyError, TypeError):
        raise ArtifactError(f"{uri} is damaged. Promote a release again.") from None


def _write(center: str, current: Release, previous: Release | None) -> None:
    value = {"current": asdict(current), "previous": None if previous is None else asdict(previous)}
    artifacts.write_json(f"{center}/current.json", value)
