"""Where each stage of a run leaves its artifact, below one root."""

from __future__ import annotations

from dataclasses import dataclass

from mim_ray.artifacts import absolute_uri, center_root, run_root
from mim_ray.config import Scenario
from mim_ray.config.scenario import ENCODER_FOLDERS, Encoding


@dataclass(frozen=True)
class Layout:
    """URIs of a run. `data_root` is the user's folder, or the synthetic shop's; `center` may be shared with other runs."""

    root: str
    data_root: str
    center: str

    @classmethod
    def of(cls, scenario: Scenario) -> Layout:
        """
        Raises:
            ConfigError: a relative root in a submitted job.
        """
        root = run_root(scenario)
        data_root = f"{root}/shop" if scenario.data.root is None else absolute_uri(scenario.data.root)
        return cls(root, data_root, center_root(scenario))

    def stage(self, name: str) -> str:
        """Folder of the artifact of the stage called `name`."""
        return f"{self.root}/{name}"

    @property
    def samples(self) -> str:
        return f"{self.root}/samples"

    @property
    def rejects(self) -> str:
        return f"{self.root}/rejects"

    @property
    def true_styles(self) -> str:
        """Snapshot of the synthetic shop's true style vectors."""
        return f"{self.root}/shop/truth/styles"

    @property
    def true_probs(self) -> str:
        """The synthetic shop's true click probabilities, by impression."""
        return f"{self.root}/shop/truth/impressions.parquet"

    def encoder(self, stage: Encoding) -> str:
        """The encoder that a stage left: untrained, dda, pretraining (DDA and DMA) or csft."""
        return f"{self.root}/{ENCODER_FOLDERS[stage]}"
