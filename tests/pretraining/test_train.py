import os
import signal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mim_ray import artifacts
from mim_ray.config import Scenario
from mim_ray.data.catalogue import Catalogue, write_catalogue
from mim_ray.data.rejects import read_rejects
from mim_ray.encoders.item_encoder import ItemEncoder
from mim_ray.errors import DataError
from mim_ray.pretraining import train as pretraining_train
from mim_ray.pretraining.train import _warnings, run


def test_a_catalogue_without_usable_items_is_a_sentence(samples, scenario, tmp_path):
    empty = str(tmp_path / "samples")
    for file in artifacts.list_files(samples):
        artifacts.write_bytes(empty + file[len(samples) :], artifacts.read_bytes(file))
    artifacts.write_json(f"{empty}/samples.json", {"validation_start": "1960-01-01T00:00:00+00:00"})
    with pytest.raises(DataError, match=r"None of the 400 items .* before the validation start"):
        run(scenario, samples=empty, output=str(tmp_path / "output"), rejects=str(tmp_path / "rejects"))


def with_pretraining(scenario: Scenario, **values: Any) -> Scenario:
    return scenario.model_copy(update={"pretraining": scenario.pretraining.model_copy(update=values)})


@pytest.mark.ray
def test_one_worker_in_the_driver_lists_pictures_that_cannot_be_decoded(ray_cluster, samples, scenario, tmp_path):
    """And leaves an encoder at every stage, though there are no steps of DMA."""
    items = Catalogue.open(f"{samples}/catalogue").take(np.arange(60))
    images = items.column("image").to_pylist()
    for row in range(0, 60, 7):
        images[row] = images[row][: len(images[row]) // 2]  # cut off
    table = items.drop_columns(["image"]).append_column("image", pa.array(images, pa.large_binary()))
    write_catalogue(f"{tmp_path}/samples/catalogue", [table])
    artifacts.write_json(f"{tmp_path}/samples/samples.json", {"validation_start": "1970-01-01T00:00:01+00:00"})
    steps = {"vision_dda_steps": 6, "text_dda_steps": 0, "dma_steps": 0}
    settings = with_pretraining(scenario, in_driver=True, **steps)
    output, rejects = f"{tmp_path}/output", f"{tmp_path}/rejects"
    result = run(settings, samples=f"{tmp_path}/samples", output=output, rejects=rejects)
    listed = read_rejects(rejects, "pretraining").to_pylist()
    assert {row["key"] for row in listed} == {f"item-{row}" for row in range(0, 60, 7)}
    assert {row["reason"] for row in listed} == {"image corrupt"}
    assert result.rejects == {"image corrupt": len(listed)}
    dda, encoder = (artifacts.read_bytes(f"{output}/{name}/model.safetensors") for name in ("dda", "encoder"))
    assert dda == encoder != artifacts.read_bytes(f"{output}/untrained/model.safetensors")
    assert dict(result.rows)["DMA"].startswith("left out")


def test_a_dma_that_learns_nothing_is_told_with_what_to_do():
    assert _warnings({"last_loss": 3.0, "chance_loss": 4.85}) == []
    assert _warnings(None) == []
    ((label, text),) = _warnings({"last_loss": 4.80, "chance_loss": 4.85})
    assert label == "DMA, warning"
    assert "learnt nothing: its loss ends at 4.800, guessing gives 4.850. Raise pretraining.temperature" in text


@pytest.fixture(scope="module")
def two_workers(scenario) -> Scenario:
    steps = {"vision_dda_steps": 2, "text_dda_steps": 2, "dma_steps": 7, "checkpoint_every_steps": 3}
    return with_pretraining(scenario, num_workers=2, num_decoders=1, batch_size=16, max_failures=2, **steps)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, samples, two_workers, tmp_path_factory):
    """A run of two workers, and where it is."""
    root = tmp_path_factory.mktemp("undisturbed")
    return run(two_workers, samples=samples, output=f"{root}/output", rejects=f"{root}/rejects"), root / "output"


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_leave_the_encoder_of_each_stage(undisturbed, two_workers):
    result, output = undisturbed
    for folder, stage in (("untrained", "untrained"), ("dda", "dda"), ("encoder", "pretraining")):
        encoder = ItemEncoder.load(f"{output}/{folder}", two_workers.encoders)
        assert encoder.encoder_version == result.metrics[f"{folder}_version"]
        assert encoder.encoder_version.startswith(f"{stage}-")
    assert sorted(path.name for path in output.iterdir()) == ["dda", "encoder", "untrained"]
    assert list(result.metrics["phases"]) == ["image", "text", "alignment"]
    assert [label for label, _ in result.rows][:6] == ["items", "encoder", "DDA, images", "DDA, titles", "DMA", "DMA"]
    assert result.rejects == {}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos
def test_a_worker_killed_inside_a_phase_does_not_change_the_result(
    undisturbed, samples, two_workers, tmp_path, monkeypatch
):
    """Two workers; one kills itself at step 5 of the alignment, after the checkpoint of step 3."""
    mark = tmp_path / "killed"

    def loop(config: dict[str, Any]) -> None:
        from mim_ray.pretraining import phases, train
        from mim_ray.training.run import rank

        original, calls = phases.Alignment.loss, []

        def loss(self: Any, batch: Any) -> Any:
            calls.append(1)
            if len(calls) == 6 and rank() == 1 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, batch)

        phases.Alignment.loss = loss
        train.train_loop(config)

    monkeypatch.setattr(pretraining_train, "train_loop", loop)
    disturbed = run(two_workers, samples=samples, output=str(tmp_path / "b"), rejects=str(tmp_path / "rejects"))
    assert mark.exists()
    for name, phase in undisturbed[0].metrics["phases"].items():
        other = disturbed.metrics["phases"][name]
        assert [step for step, _ in phase["losses"]] == [step for step, _ in other["losses"]]
        assert [loss for _, loss in phase["losses"]] == pytest.approx([loss for _, loss in other["losses"]], abs=1e-6)
    assert disturbed.metrics["encoder_version"] == undisturbed[0].metrics["encoder_version"]  # a hash of the weights
