"""Where each stage of a run leaves its artifact, below one root."""

from __future__ import annotations

from dataclasses import dataclass, field

from mim_ray.artifacts import absolute_uri, center_root, run_root
from mim_ray.config import Scenario
from mim_ray.config.scenario import ENCODER_FOLDERS, Encoding


@dataclass(frozen=True)
class Layout:
    """URIs of a run.

    Attributes:
        own_data: the user's folder, None for the synthetic shop. center: may be shared with other runs.
        elsewhere: stages that another run made (run.reuse), by name.
    """

    root: str
    own_data: str | None
    center: str
    elsewhere: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, scenario: Scenario) -> Layout:
        """
        Raises:
            ConfigError: a relative root in a submitted job.
        """
        root = run_root(scenario)
        own_data = None if scenario.data.root is None else absolute_uri(scenario.data.root)
        return cls(root, own_data, center_root(scenario))

    def stage(self, name: str) -> str:
        """Folder of the artifact of the stage called `name`."""
        return self.elsewhere.get(name, f"{self.root}/{name}")

    @property
    def data_root(self) -> str:
        """Where items and interactions are."""
        return self.stage("shop") if self.own_data is None else self.own_data

    @property
    def samples(self) -> str:
        return self.stage("samples")

    @property
    def rejects(self) -> str:
        return f"{self.root}/rejects"

    @property
    def true_styles(self) -> str:
        """Snapshot of the synthetic shop's true style vectors."""
        return f"{self.stage('shop')}/truth/styles"

    @property
    def true_probs(self) -> str:
        """The synthetic shop's true click probabilities, by impression."""
        return f"{self.stage('shop')}/truth/impressions.parquet"

    def encoder(self, stage: Encoding) -> str:
        """The encoder that a stage left: untrained, dda, pretraining (DDA and DMA) or csft."""
        name, _, folder = ENCODER_FOLDERS[stage].partition("/")
        return f"{self.stage(name)}/{folder}"
