"""C-SFT from samples to a saved encoder, in one process and on Ray workers."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mim_ray import artifacts
from mim_ray.config import Scenario
from mim_ray.csft import train as csft_train
from mim_ray.csft.trainer import Trainer
from mim_ray.data.catalogue import Catalogue, write_catalogue
from mim_ray.data.rejects import read_rejects
from mim_ray.encoders import ItemEncoder
from mim_ray.errors import ArtifactError, DataError, NonFiniteLossError


def make_trainer(scenario: Scenario, samples: str, encoder: str, output: str) -> Trainer:
    return Trainer(csft_train.prepare(scenario, samples=samples, encoder=encoder, output=output))


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
    assert set(metrics["drift"][-1][1]) == {"1", "2"}
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


@pytest.mark.parametrize(
    "settings",
    [
        {"supervision": "category"},
        {"supervision": "click-binary"},
        {"supervision": "purchase-binary"},
        {"supervision": "click"},
        {"supervision": "purchase", "log_q": True},
        {"multi_level": False, "past_momentum": 0.9},
        {"space_time_negatives": False},
        {"hard_negatives": False, "chunk_size": 3},
    ],
    ids=str,
)
def test_every_row_of_tables_4_and_5_trains(
    scenario: Scenario, samples: str, encoder_uri: str, tmp_path: Path, settings: dict[str, Any]
) -> None:
    trainer = make_trainer(with_csft(scenario, steps=5, **settings), samples, encoder_uri, str(tmp_path))
    trainer.held_out = None
    before = [parameter.detach().clone() for parameter in trainer.encoder.head_parameters()]
    metrics = trainer.train()
    assert [step for step, *_ in metrics["curve"]] == [0, 1, 2, 3, 4]
    moved = [not torch.equal(old, new) for old, new in zip(before, trainer.encoder.head_parameters(), strict=True)]
    assert any(moved)
    if settings.get("space_time_negatives") is False:
        assert 0 < metrics["num_negatives"] <= 7  # N - 1 less the masked ones
    if "past_momentum" in settings:
        resumed = make_trainer(with_csft(scenario, steps=5, **settings), samples, encoder_uri, str(tmp_path))
        resumed.resume()
        assert resumed.step == 3
        resumed.held_out = None
        assert resumed.train()["encoder_version"] == metrics["encoder_version"]


def test_cached_gradients_train_like_the_whole_batch(
    scenario: Scenario, samples: str, encoder_uri: str, tmp_path: Path
) -> None:
    curves = []
    for number, chunk in enumerate((None, 3)):
        trainer = make_trainer(with_csft(scenario, chunk_size=chunk), samples, encoder_uri, str(tmp_path / str(number)))
        trainer.held_out = None
        for module in trainer.encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # the halves of a batch draw other masks than the whole
        curves.append([loss for _, loss, *_ in trainer.train()["curve"]])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_lora_trains_checkpoints_and_leaves_the_plain_architecture(
    scenario: Scenario, samples: str, encoder_uri: str, tmp_path: Path
) -> None:
    tuned = with_csft(scenario, vision_tuning="lora", text_tuning="frozen", lora_rank=2, steps=4)
    trainer = make_trainer(tuned, samples, encoder_uri, str(tmp_path))
    trainer.held_out = None
    trainer.train()
    resumed = make_trainer(tuned, samples, encoder_uri, str(tmp_path))
    resumed.held_out = None
    resumed.resume()
    assert resumed.step == 3
    resumed.train()
    before, after = (ItemEncoder.load(uri).state_dict() for uri in (encoder_uri, f"{tmp_path}/encoder"))
    assert list(before) == list(after)
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert "vision" in changed
    assert "text" not in changed
    assert all(torch.equal(after[key], value) for key, value in trainer.encoder.state_dict().items())


def test_a_checkpoint_of_another_number_of_workers_goes_on_and_says_what_differs(
    scenario: Scenario, samples: str, encoder_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = make_trainer(scenario, samples, encoder_uri, str(tmp_path))
    whole.train()
    state = Path(f"{tmp_path}/train/checkpoints/step-00000006/state.json")
    values = json.loads(state.read_text())
    values["values"] = [values["values"][0] | {"chunks_per_epoch": 1}] * 3  # as three workers leave it
    state.write_text(json.dumps(values))
    resumed = make_trainer(scenario, samples, encoder_uri, str(tmp_path))
    resumed.resume()
    assert resumed.step == 6
    assert len(resumed.past) == 0
    epochs = values["values"][0]["position"]["chunk"]
    assert resumed.position.chunk == epochs * resumed.chunks_per_epoch
    said = capsys.readouterr().out
    assert "with 1 workers; the checkpoint is of 3" in said
    assert "past batches start empty" in said
    assert len(resumed.train()["curve"]) == 8


def test_missing_categories_are_refused_unless_the_scenario_says_so(
    scenario: Scenario, samples: str, encoder_uri: str, tmp_path: Path
) -> None:
    items = Catalogue.open(f"{samples}/catalogue").take(np.arange(60)).drop_columns(["category", "categories"])
    write_catalogue(f"{tmp_path}/catalogue", [items])
    for name in ("interest_pairs", "samples.json"):
        (tmp_path / name).symlink_to(f"{samples}/{name}")
    with pytest.raises(DataError, match=r"has a category.*csft\.hard_negatives=false"):
        csft_train.run(
            scenario, samples=str(tmp_path), encoder=encoder_uri, output=f"{tmp_path}/out", rejects=f"{tmp_path}/r"
        )
    without = with_csft(scenario, hard_negatives=False, steps=1)
    assert make_trainer(without, str(tmp_path), encoder_uri, f"{tmp_path}/out").train()["steps"] == 1


def test_missing_pairs_and_a_wrong_encoder_are_refused(
    scenario: Scenario, samples: str, encoder_uri: str, tmp_path: Path
) -> None:
    (tmp_path / "catalogue").symlink_to(f"{samples}/catalogue")
    with pytest.raises(DataError, match="no interest pairs"):
        csft_train.run(
            scenario,
            samples=str(tmp_path),
            encoder=encoder_uri,
            output=str(tmp_path / "out"),
            rejects=str(tmp_path / "r"),
        )
    other = scenario.model_copy(update={"encoders": scenario.encoders.model_copy(update={"width": 16})})
    with pytest.raises(ArtifactError, match="width 16"):
        csft_train.run(
            other, samples=samples, encoder=encoder_uri, output=str(tmp_path / "out"), rejects=str(tmp_path / "r")
        )


@pytest.mark.ray
@pytest.mark.chaos  # two minutes; `make test` kills a worker of CTR training, which has the same checkpoints
def test_a_worker_killed_in_mid_epoch_changes_neither_rows_nor_losses(
    ray_cluster: None, scenario: Scenario, samples: str, encoder_uri: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, gloo_workers: Callable[..., list[dict[str, Any]]],
) -> None:  # fmt: skip
    """Two workers, data through Ray Data; one kills itself at step 5, after the checkpoint of step 3."""
    check_killed_run(scenario, samples, encoder_uri, tmp_path, monkeypatch, gloo_workers, [(1, 5)])


@pytest.mark.ray
@pytest.mark.chaos
def test_any_worker_killed_at_any_step_changes_nothing(
    ray_cluster: None, scenario: Scenario, samples: str, encoder_uri: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, gloo_workers: Callable[..., list[dict[str, Any]]],
) -> None:  # fmt: skip
    """Every step of a run of 8 is a place to die, once on each worker, before and after the first checkpoint."""
    kills = [(step % 2, step) for step in range(8)] + [(0, 7)]
    check_killed_run(scenario, samples, encoder_uri, tmp_path, monkeypatch, gloo_workers, kills)


def check_killed_run(
    scenario: Scenario, samples: str, encoder_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    gloo_workers: Callable[..., list[dict[str, Any]]], kills: list[tuple[int, int]],
) -> None:  # fmt: skip
    """The undisturbed run is one of plain processes that read in threads: neither Ray Train nor Ray Data may matter."""
    two = with_csft(scenario, num_workers=2, max_failures=len(kills) + 1, num_decoders=1, held_out_ratio=0.0)
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "killed").mkdir()
    plain = with_csft(two, num_decoders=0)
    config = csft_train.prepare(plain, samples=samples, encoder=encoder_uri, output=f"{tmp_path}/undisturbed/out")
    note = dying_trainer(f"{tmp_path}/undisturbed", [])
    curves = gloo_workers(lambda rank: {"curve": note(config).train()["curve"]}, 2)
    monkeypatch.setattr(csft_train, "train_loop", dying_loop(f"{tmp_path}/killed", kills))
    result = csft_train.run(
        two, samples=samples, encoder=encoder_uri, output=f"{tmp_path}/killed/out", rejects=f"{tmp_path}/rejects"
    )
    assert len(list((tmp_path / "killed").glob("died-*"))) == len(set(kills))  # the kills really happened
    rows = {name: rows_by_step(tmp_path / name) for name in ("undisturbed", "killed")}
    assert rows["killed"] == rows["undisturbed"]  # a repeated step saw the same rows again
    assert set(rows["killed"]) == {(rank, step) for rank in range(2) for step in range(8)}
    for (step, loss, *_), (other_step, other_loss, *_) in zip(curves[0]["curve"], result.metrics["curve"], strict=True):
        assert step == other_step
        assert loss == pytest.approx(other_loss, abs=1e-6)
    version = ItemEncoder.load(f"{tmp_path}/killed/out/encoder").encoder_version
    assert version == result.metrics["encoder_version"]
    assert version == ItemEncoder.load(f"{tmp_path}/undisturbed/out/encoder").encoder_version
    assert not artifacts.exists(f"{tmp_path}/killed/out/train")
    assert read_rejects(f"{tmp_path}/rejects").num_rows == 0


def rows_by_step(folder: Path) -> dict[tuple[int, int], set[str]]:
    """What each worker saw at each step, over all attempts."""
    seen: dict[tuple[int, int], set[str]] = {}
    for file in folder.glob("rows-*"):
        rank, step, _ = map(int, file.name.removeprefix("rows-").split("-"))
        seen.setdefault((rank, step), set()).add(file.read_text())
    return seen


def dying_trainer(folder: str, kills: list[tuple[int, int]]) -> Callable[[dict[str, Any]], Any]:
    """Makes a Trainer that notes the rows of each step and kills its worker with SIGKILL at (rank, step), each once."""

    def make(config: dict[str, Any]) -> Any:
        from mim_ray.csft.trainer import Trainer
        from mim_ray.training.run import rank

        class Dying(Trainer):
            def _step(self, batch: Any) -> list[float]:
                place, step = rank(), self.step
                attempt = len(list(Path(folder).glob(f"rows-{place}-{step}-*")))
                rows = [group.rows.tolist() for group in batch.groups]
                Path(folder, f"rows-{place}-{step}-{attempt}").write_text(json.dumps(rows))
                mark = Path(folder, f"died-{place}-{step}")
                if (place, step) in kills and not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return super()._step(batch)

        return Dying(config)

    return make


def dying_loop(folder: str, kills: list[tuple[int, int]]) -> Callable[[dict[str, Any]], None]:
    make = dying_trainer(folder, kills)

    def loop(config: dict[str, Any]) -> None:
        from mim_ray.training.run import report

        trainer = make(config)
        trainer.resume()
        report(trainer.train())

    return loop
