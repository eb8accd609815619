"""One worker's training: what a resumed run ends with, which state is kept, when it stops."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mim_ray import artifacts
from mim_ray.ciubm import train
from mim_ray.ciubm.recipe import network_config
from mim_ray.ciubm.trainer import Trainer
from mim_ray.ciubm.vocabulary_build import build_vocabularies
from mim_ray.config import Scenario
from mim_ray.errors import DataError, NonFiniteLossError
from mim_ray.training.run import rank

SETTINGS: dict[str, Any] = {
    "id_dim": 4,
    "hidden": [16],
    "dropout": 0.2,
    "batch_size": 200,
    "num_epochs": 2,
    "max_behaviors": 8,
    "threads_per_worker": 1,
    "checkpoint_every_steps": 11,
    "validate_every_steps": 4,
}
_TIMES = ("rows_per_s", "data_wait_ratio")


def scenario_of(**changes: Any) -> Scenario:
    return Scenario.model_validate({"ciubm": {**SETTINGS, **changes}})


def config_of(samples: str, output: str, **changes: Any) -> dict[str, Any]:
    """What `train.run` hands to its workers, for din-base."""
    settings = scenario_of(**changes).ciubm
    vocabularies = build_vocabularies(samples, min_item_count=settings.min_item_count)
    vocabularies.save(f"{output}/vocabulary")
    return {
        "settings": settings.model_dump(mode="json"),
        "network": network_config(settings, "din", None).to_json(),
        "samples": samples,
        "rows": f"{samples}/impressions/train",
        "earlier": None,
        "snapshot": None,
        "queries": None,
        "output": output,
        "label": "din-base",
        "positive_ratio": vocabularies.positive_ratio,
        "run_seed": 0,
    }


def trainer_of(config: dict[str, Any], kind: type[Trainer] = Trainer) -> Trainer:
    trainer = kind(config, train.make_encoder(config), 0)
    trainer.resume()
    return trainer


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {**trainer.network.state_dict(), **trainer.tables.state()}


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({key: value for key, value in metrics.items() if key not in _TIMES}))


def test_a_resumed_run_ends_where_an_undisturbed_one_ends(small_shop: Any, tmp_path: Path) -> None:
    config = config_of(small_shop.samples, str(tmp_path))
    whole = trainer_of(config)
    metrics = whole.fit()
    resumed = trainer_of(config)
    assert resumed.course.step == 22  # of 30: the last checkpoint
    assert without_times(resumed.fit()) == without_times(metrics)
    before, after = state_of(whole), state_of(resumed)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert metrics["evaluations"][-1]["step"] == metrics["planned_steps"] == 30
    assert [found["step"] for found in metrics["evaluations"]] == [4, 8, 12, 15, 16, 20, 24, 28, 30]


def test_the_best_state_is_kept_and_only_it_stays_on_disk(small_shop: Any, tmp_path: Path) -> None:
    class Worsening(Trainer):
        def _judge(self) -> dict[str, Any]:
            return {**super()._judge(), "auc": 1.0 - abs(self.course.step - 12) / 100}

    config = config_of(small_shop.samples, str(tmp_path), checkpoint_every_steps=14)
    trainer = trainer_of(config, Worsening)
    metrics = trainer.fit()
    assert metrics["best_step"] == 12
    assert [Path(uri).name for uri in artifacts.list_files(f"{trainer.folder}/best")] == ["00000012-of-1.safetensors"]
    shorter = trainer_of(config_of(small_shop.samples, f"{tmp_path}/again"))
    for _ in range(12):
        step(shorter)
    before, after = state_of(shorter), state_of(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)


def step(trainer: Trainer) -> None:
    number = trainer.course.step
    trainer._step(next(trainer._encoded(trainer.batches.steps(number + 1, number), number)))
    trainer.course.step += 1


def test_patience_ends_the_training_with_the_best_state(small_shop: Any, tmp_path: Path) -> None:
    class Worsening(Trainer):
        def _judge(self) -> dict[str, Any]:
            return {**super()._judge(), "auc": 1.0 - abs(self.course.step - 8) / 100}

    trainer = trainer_of(config_of(small_shop.samples, str(tmp_path), patience=3), Worsening)
    metrics = trainer.fit()
    assert (metrics["best_step"], metrics["steps"]) == (8, 16)  # evaluations at 12, 15 and 16 were worse
    assert metrics["validation_auc"] == 1.0


def test_test_rows_are_not_needed_to_train(small_shop: Any, tmp_path: Path) -> None:
    (tmp_path / "samples" / "impressions").mkdir(parents=True)
    for name in ("catalogue", "impressions/train", "impressions/validation"):
        (tmp_path / "samples" / name).symlink_to(f"{small_shop.samples}/{name}")
    trainer = trainer_of(config_of(f"{tmp_path}/samples", str(tmp_path), patience=1))
    assert trainer.fit()["validation_auc"] > 0.5


def test_another_number_of_workers_goes_on_after_as_many_epochs(
    small_shop: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(small_shop.samples, str(tmp_path))
    trainer_of(config).fit()
    state = Path(f"{tmp_path}/train/seed-0/checkpoints/step-00000022/state.json")
    values = json.loads(state.read_text())
    values["values"] = [values["values"][0] | {"steps_per_epoch": 11}] * 2  # as two workers leave it
    state.write_text(json.dumps(values))
    resumed = trainer_of(config)
    assert resumed.course.step == 30  # two epochs are done
    assert "with 1 workers; the checkpoint is of 2" in capsys.readouterr().out
    resumed.fit()


def test_bfloat16_trains_nearly_as_float32(small_shop: Any, tmp_path: Path) -> None:
    found = {}
    for precision in ("float32", "bfloat16"):
        trainer = trainer_of(config_of(small_shop.samples, f"{tmp_path}/{precision}", precision=precision, dropout=0.0))
        found[precision] = trainer.fit()
        assert all(value.dtype == torch.float32 for value in state_of(trainer).values())
    losses = [[loss for _, loss in found[precision]["loss"]] for precision in found]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


def test_tables_have_their_own_learning_rate(small_shop: Any, tmp_path: Path) -> None:
    config = config_of(small_shop.samples, str(tmp_path), table_learning_rate=1e-9, learning_rate=0.1)
    trainer = trainer_of(config)
    before = {name: value.clone() for name, value in trainer.tables.state().items()}
    weights = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    step(trainer)
    assert all(torch.allclose(value, before[name], atol=1e-7) for name, value in trainer.tables.state().items())
    assert any(not torch.equal(value, weights[name]) for name, value in trainer.network.state_dict().items())


def test_a_non_finite_loss_stops_before_anything_moves(small_shop: Any, tmp_path: Path) -> None:
    trainer = trainer_of(config_of(small_shop.samples, str(tmp_path)))
    trainer.tables["item"].weight[:] = float("nan")
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    with pytest.raises(NonFiniteLossError, match="loss of din-base is nan at step 0"):
        trainer.fit()
    assert all(torch.equal(value, before[name]) for name, value in trainer.network.state_dict().items())


@pytest.mark.parametrize("label", [2, -1, None])
def test_a_label_other_than_0_or_1_is_refused_naming_the_row(
    small_shop: Any, tmp_path: Path, label: int | None
) -> None:
    table = pq.read_table(f"{small_shop.samples}/impressions/train")
    labels = table["label"].to_pylist()
    labels[17] = label
    place = table.schema.get_field_index("label")
    folder = tmp_path / "impressions" / "train"
    folder.mkdir(parents=True)
    pq.write_table(table.set_column(place, "label", pa.array(labels, pa.int8())), folder / "part-0.parquet")
    (tmp_path / "catalogue").symlink_to(f"{small_shop.samples}/catalogue")
    with pytest.raises(DataError, match=rf"1 of 3,000 rows .* not 0 or 1 \(impression train-17 has {label}\)"):
        build_vocabularies(str(tmp_path), min_item_count=1)


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_killed_in_mid_training_changes_nothing(
    ray_cluster: None, small_shop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It kills itself at step 13, after the checkpoint of step 11. The undisturbed run knows no Ray."""
    config = config_of(small_shop.samples, f"{tmp_path}/undisturbed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = trainer_of(config)
    expected = {"metrics": without_times(trainer.fit()), "state": state_of(trainer)}
    torch.set_num_threads(threads)
    check_killed_run(small_shop.samples, tmp_path, monkeypatch, [(0, 13)], expected)


@pytest.mark.ray
@pytest.mark.chaos
def test_any_of_two_workers_killed_at_any_step_changes_nothing(
    ray_cluster: None, small_shop: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, gloo_workers: Callable[..., list[dict[str, Any]]],
) -> None:  # fmt: skip
    changes = {"num_workers": 2, "batch_size": 100}
    config = config_of(small_shop.samples, f"{tmp_path}/undisturbed", **changes)

    def undisturbed(rank: int) -> dict[str, Any]:
        trainer = trainer_of(config)
        return {"metrics": json.dumps(without_times(trainer.fit())), "state": state_of(trainer)}

    found = gloo_workers(undisturbed, 2)[0]
    expected = {"metrics": json.loads(found["metrics"]), "state": found["state"]}
    kills = [(step % 2, step) for step in (0, 3, 4, 8, 11, 12, 22, 23, 29)]
    check_killed_run(small_shop.samples, tmp_path, monkeypatch, kills, expected, **changes)


def check_killed_run(
    samples: str, folder: Path, monkeypatch: pytest.MonkeyPatch, kills: list[tuple[int, int]], expected: dict[str, Any],
    **changes: Any,
) -> None:  # fmt: skip
    """A run on Ray workers that die at the given (rank, step) ends with the expected metrics and weights."""
    monkeypatch.setattr(train, "train_loop", dying_loop(str(folder), kills))
    output = f"{folder}/killed"
    scenario = scenario_of(**changes, max_failures=len(kills) + 1)
    result = train.run(scenario, variant="din-base", samples=samples, snapshot=None, output=output)
    assert len(list(folder.glob("died-*"))) == len(kills)  # the kills really happened
    assert without_times(result.metrics["seeds"]["0"]) == expected["metrics"]
    weights = artifacts.read_tensors(f"{output}/seed-0/network.safetensors")
    weights |= artifacts.read_tensors(f"{output}/seed-0/tables.safetensors")
    assert weights.keys() == expected["state"].keys()
    assert all(torch.equal(weights[name], expected["state"][name]) for name in weights)
    assert not artifacts.exists(f"{output}/train")


def dying_loop(folder: str, kills: list[tuple[int, int]]) -> Callable[[dict[str, Any]], None]:
    """Trains as train_loop does, with a SIGKILL of its own process at each (rank, step), once."""

    def loop(config: dict[str, Any]) -> None:
        from mim_ray.ciubm import train as module

        class Dying(Trainer):
            def _step(self, batch: Any) -> float:
                place = (rank(), self.course.step)
                mark = Path(folder, f"died-{place[0]}-{place[1]}")
                if place in kills and not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return super()._step(batch)

        module.Trainer = Dying
        module.train_loop(config)

    return loop
