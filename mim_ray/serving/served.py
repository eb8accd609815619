"""What the apps serve: the CTR model, encoder, embeddings and behaviors that a release names or a run left, and the arguments.

serve run serve.ranking:app config=tiny run.root=/data/runs/tiny serving.variant=din-mim
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from mim_ray import artifacts
from mim_ray.ciubm.machine_export import MM_TABLE, NEWER_TABLE, networks_of
from mim_ray.config import Scenario, load_scenario
from mim_ray.config.scenario import ENCODER_FOLDERS, Arm
from mim_ray.errors import ArtifactError, ConfigError
from mim_ray.representation_center.machine_release import read_wanted
from mim_ray.representation_center.release import Release, read_release, releases


class AppArgs(BaseModel):
    """Arguments of a Serve app: `config`, and `section.key` for each setting that differs from the scenario's."""

    model_config = ConfigDict(extra="allow")

    config: str = "tiny"

    def scenario(self) -> Scenario:
        """
        Raises:
            ConfigError: an unknown or wrong setting.
        """
        overrides = [
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in (self.model_extra or {}).items()
        ]
        return load_scenario(self.config, overrides)


@dataclass(frozen=True)
class Served:
    """URIs.

    Attributes:
        ctr: the CTR model. snapshot: MM embeddings. center: their table and the window of new items.
        release: number of the release that names them, None where nothing was promoted.
        encoder_version: that the release names. serial: of the release as the parameter machines count; None where tables are
            read from files.
    """

    ctr: str
    encoder: str
    snapshot: str
    center: str
    behaviors: str
    release: int | None = None
    encoder_version: str | None = None
    serial: int | None = None

    @classmethod
    def of(cls, scenario: Scenario) -> Served:
        """The current release of the scenario's representation center; what its run left where nothing was promoted.

        Raises:
            ArtifactError: nothing was promoted and the run has no snapshot yet.
            ConfigError: a relative root on a cluster's node; or serving.variant is not the release's model.
        """
        release = read_release(_center(scenario))
        return cls.of_run(scenario) if release is None else cls._of_release(scenario, release)

    @classmethod
    def for_ranking(cls, scenario: Scenario) -> Served:
        """The release that the parameter machines hold, where machines.state names some; else as `of`.

        Raises:
            ArtifactError: the machines hold no promoted release, or it is not all there.
            ConfigError: as of `of`.
        """
        state = scenario.machines.state
        if state is None:
            return cls.of(scenario)
        serial, held = read_wanted(state)
        known = {str(release.number): release for release in releases(_center(scenario))}
        release = known.get(held.release_id)
        if release is None:
            raise ArtifactError(
                f"The parameter machines of {state} hold {held.release_id}, which is no release of {_center(scenario)}. "
                "Load the current one with jobs/machines.py."
            )
        served = replace(cls._of_release(scenario, release), serial=serial)
        line, held_line = (uri.rpartition("/")[0] for uri in (release.snapshot, held.tables[MM_TABLE].snapshot))
        if held.dense != networks_of(served.ctr) or held_line != line or NEWER_TABLE not in held.tables:
            raise ArtifactError(
                f"The parameter machines of {state} hold a release {release.number} of another model than {served.ctr} on "
                f"{line}. Load the current one with jobs/machines.py."
            )
        return served

    @classmethod
    def of_arm(cls, scenario: Scenario, arm: Arm, current: Served) -> Served:
        """What an arm of an A/B test serves.

        Raises:
            ArtifactError: there is no release of that number. ConfigError: as `of`.
        """
        if arm.release is not None:
            found = [release for release in releases(_center(scenario)) if release.number == arm.release]
            if not found:
                raise ArtifactError(f"There is no release {arm.release}. `jobs/promote.py list` shows those there are.")
            return cls._of_release(scenario, found[0])
        if arm.variant is None:
            return current
        # its tables are in the replica, wherever those of the release are
        return replace(current, ctr=f"{_root(scenario)}/ctr/{arm.variant}", serial=None)

    @classmethod
    def of_run(cls, scenario: Scenario) -> Served:
        """What the scenario's run left, promoted or not.

        Raises:
            ArtifactError: the run has no snapshot yet.
            ConfigError: a relative root on a cluster's node.
        """
        root = _root(scenario)
        extraction = f"{root}/extraction"
        manifest = artifacts.read_manifest(extraction)
        if manifest is None:
            raise ArtifactError(
                f"{extraction} holds no finished extraction, so there is nothing to serve. Run jobs/run_all.py with the "
                "same config and run.root first, or give the run.root of a finished run."
            )
        return cls(
            ctr=f"{root}/ctr/{_variant(scenario)}",
            encoder=_encoder(scenario),
            snapshot=str(manifest.metrics["snapshot"]),
            center=_center(scenario),
            behaviors=f"{root}/samples/behaviors",
        )

    @classmethod
    def _of_release(cls, scenario: Scenario, release: Release) -> Served:
        ctr = release.ctr_model or f"{_root(scenario)}/ctr/{_variant(scenario)}"
        asked = scenario.serving.variant
        found = artifacts.read_json(f"{ctr}/ctr.json")["variant"] if asked is not None else None
        if asked != found:
            raise ConfigError(
                f"serving.variant = {asked}, but release {release.number} names {ctr}, which is {found}. Leave "
                "serving.variant out, or promote the other model with jobs/promote.py."
            )
        return cls(
            ctr=ctr,
            encoder=release.encoder or _encoder(scenario),
            snapshot=release.snapshot,
            center=_center(scenario),
            behaviors=f"{_root(scenario)}/samples/behaviors",
            release=release.number,
            encoder_version=release.encoder_version,
        )


def _variant(scenario: Scenario) -> str:
    variants = scenario.ciubm.variants
    return scenario.serving.variant or next((name for name in variants if name.endswith("-mim")), variants[0])


def _encoder(scenario: Scenario) -> str:
    return f"{_root(scenario)}/{ENCODER_FOLDERS[scenario.extraction.encoder]}"


def _root(scenario: Scenario) -> str:
    _check_absolute("run.root", scenario.run.root, default=True)
    return artifacts.run_root(scenario)


def _center(scenario: Scenario) -> str:
    if scenario.run.center is None:
        return f"{_root(scenario)}/center"
    _check_absolute("run.center", scenario.run.center, default=False)
    return artifacts.center_root(scenario)


def _check_absolute(key: str, given: str | None, *, default: bool) -> None:
    relative = default if given is None else "://" not in given and not given.startswith(("/", "~"))
    if relative and "working_dir_files" in Path.cwd().parts:
        raise ConfigError(
            f"{key} = {given} is relative, but this app is built in an uploaded copy of your folder. Give an absolute "
            f"path or a URI that every node reaches, as {key} in the app's args."
        )
