"""C-SFT from samples to a saved encoder, in one process and on Ray workers."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from mim_ray import artifacts
from mim_ray.config import Scenario
from mim_ray.csft import train as csft_train
from mim_ray.csft.purchases import Purchases
from mim_ray.csft.train import Trainer
from mim_ray.data.catalogue import Catalogue
from mim_ray.encoders import ItemEncoder
from mim_ray.errors import ArtifactError, DataError, NonFiniteLossError


def make_trainer(scenario: Scenario, samples: str, encoder: str, output: str) -> Trainer:
    pairs = f"{samples}/interest_pairs"
    Purchases.of_pairs(pairs, Catalogue.open(f"{samples}/catalogue")).save(f"{output}/train/purchases")
    config: dict[str, Any] = {"scenario": scenario.model_dump(mode="json"), "samples": samples, "encoder": encoder}
    return Trainer({**config, "output": output, "num_pairs": 240})


def with_csft(scenario: Scenario, **values: Any) -> Scenario:
    data = scenario.model_dump()
    data["csft"].update(values)
    return Scenario.model_validate(data)


def test_a_resumed_run_ends_where_an_undisturbed_one_ends(
    scenario: Scenario, samples: str, encoder_uri: str, tmp_path: Path
) -> None:
    whole = make_trainer(scenario, samples, encoder_uri, str(tmp_path))
    metrics = whole.train()
    resumed = make_trainer(scenario, samples, encoder_uri, str(tmp_path))
    resumed.resume()  # from step 6 of 8, in the middle of an epoch
    assert resumed.step == 6
    again = resumed.train()
    assert again["curve"] == metrics["curve"]
    assert again["encoder_version"] == metrics["encoder_version"]  # a hash of the weights
    assert metrics["num_negatives"] > 8 * 2 * 2
    assert metrics["retrieval"]["before"]["num_items"] == 60


def test_training_lowers_the_loss_and_finds_more_purchases(
    scenario: Scenario, samples: str, encoder_uri: str, tmp_path: Path
) -> None:
    longer = with_csft(scenario, steps=60, batch_size=24, checkpoint_every_steps=1_000)
    metrics = make_trainer(longer, samples, encoder_uri, str(tmp_path)).train()
    before, after = (metrics["retrieval"][when]["levels"]["image"]["mrr"] for when in ("before", "after"))
    assert after > before
    assert set(metrics["past_cosine_by_age"]) == {"1", "2"}
    assert metrics["temperatures"]["mm"] != pytest.approx(0.07)


def test_a_non_finite_loss_stops_before_the_optimizer_moves(
    scenario: Scenario, samples: str, encoder_uri: str, tmp_path: Path
) -> None:
    trainer = make_trainer(scenario, samples, encoder_uri, str(tmp_path))
    with torch.no_grad():
        trainer.encoder.image_projection.weight[0, 0] = float("nan")
    before = trainer.encoder.text_projection.weight.detach().clone()
    trainer.held_out = None
    with pytest.raises(NonFiniteLossError, match="C-SFT loss is nan at step 0"):
        trainer.train()
    assert torch.equal(trainer.encoder.text_projection.weight, before)


def test_missing_pairs_and_a_wrong_encoder_are_refused(
    scenario: Scenario, samples: str, encoder_uri: str, tmp_path: Path
) -> None:
    (tmp_path / "catalogue").symlink_to(f"{samples}/catalogue")
    with pytest.raises(DataError, match="no interest pairs"):
        csft_train.run(scenario, samples=str(tmp_path), encoder=encoder_uri, output=str(tmp_path / "out"))
    other = scenario.model_copy(update={"encoders": scenario.encoders.model_copy(update={"width": 16})})
    with pytest.raises(ArtifactError, match="width 16"):
        csft_train.run(other, samples=samples, encoder=encoder_uri, output=str(tmp_path / "out"))


@pytest.mark.ray
@pytest.mark.chaos
def test_a_worker_killed_in_mid_run_does_not_change_the_result(
    ray_cluster: None, scenario: Scenario, samples: str, encoder_uri: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two workers; one kills itself at step 5, after the checkpoint of step 3."""
    two = with_csft(scenario, num_workers=2, max_failures=2)
    undisturbed = csft_train.run(two, samples=samples, encoder=encoder_uri, output=str(tmp_path / "a"))
    mark = tmp_path / "killed"

    def loop(config: dict[str, Any]) -> None:
        from mim_ray.csft.train import Trainer
        from mim_ray.training.run import rank, report

        class Dying(Trainer):
            def _step(self, batch: Any) -> list[float]:
                if self.step == 5 and rank() == 1 and not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return super()._step(batch)

        trainer = Dying(config)
        trainer.resume()
        report(trainer.train())

    monkeypatch.setattr(csft_train, "train_loop", loop)
    disturbed = csft_train.run(two, samples=samples, encoder=encoder_uri, output=str(tmp_path / "b"))
    assert mark.exists()
    for (step, loss, *_), (other_step, other_loss, *_) in zip(
        undisturbed.metrics["curve"], disturbed.metrics["curve"], strict=True
    ):
        assert step == other_step
        assert loss == pytest.approx(other_loss, abs=1e-6)
    version = ItemEncoder.load(f"{tmp_path}/b/encoder").encoder_version
    assert version == disturbed.metrics["encoder_version"]
    assert not artifacts.exists(f"{tmp_path}/b/train")
    assert dict(disturbed.rows)["steps"] == "8 of 2 x 8 pairs"
