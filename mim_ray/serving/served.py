"""What the apps serve: the CTR model, encoder, embeddings and behaviors that a run left, and the arguments that name it.

serve run serve.ranking:app config=tiny run.root=/data/runs/tiny serving.variant=din-mim
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from mim_ray import artifacts
from mim_ray.config import Scenario, load_scenario
from mim_ray.config.scenario import ENCODER_FOLDERS
from mim_ray.errors import ArtifactError, ConfigError


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
    """

    ctr: str
    encoder: str
    snapshot: str
    center: str
    behaviors: str

    @classmethod
    def of(cls, scenario: Scenario) -> Served:
        """Where the scenario's run left them.

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
            encoder=f"{root}/{ENCODER_FOLDERS[scenario.extraction.encoder]}",
            snapshot=str(manifest.metrics["snapshot"]),
            center=f"{root}/center",
            behaviors=f"{root}/samples/behaviors",
        )


def _variant(scenario: Scenario) -> str:
    variants = scenario.ciubm.variants
    return scenario.serving.variant or next((name for name in variants if name.endswith("-mim")), variants[0])


def _root(scenario: Scenario) -> str:
    given = scenario.run.root
    relative = given is None or ("://" not in given and not given.startswith(("/", "~")))
    if relative and "working_dir_files" in Path.cwd().parts:
        raise ConfigError(
            f"run.root = {given} is relative, but this app is built in an uploaded copy of your folder. Give an absolute "
            "path or a URI that every node reaches, as run.root in the app's args."
        )
    return artifacts.run_root(scenario)
