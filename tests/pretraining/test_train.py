import pytest

from mim_ray import artifacts
from mim_ray.encoders.item_encoder import ItemEncoder
from mim_ray.errors import DataError
from mim_ray.pretraining.train import run


def test_a_catalogue_without_usable_items_is_a_sentence(samples, scenario, tmp_path):
    empty = str(tmp_path / "samples")
    for file in artifacts.list_files(samples):
        artifacts.write_bytes(empty + file[len(samples) :], artifacts.read_bytes(file))
    artifacts.write_json(f"{empty}/samples.json", {"validation_start": "1960-01-01T00:00:00+00:00"})
    with pytest.raises(DataError, match=r"None of the 400 items .* before the validation start"):
        run(scenario, samples=empty, output=str(tmp_path / "output"))


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_leave_an_untrained_and_a_better_encoder(ray_cluster, samples, scenario, tmp_path):
    settings = scenario.model_copy(
        update={"pretraining": scenario.pretraining.model_copy(update={"num_workers": 2, "batch_size": 16})}
    )
    output = str(tmp_path / "output")
    result = run(settings, samples=samples, output=output)
    phases = result.metrics["phases"]
    assert list(phases) == ["image", "text", "alignment"]
    assert phases["alignment"]["after"]["recall_at_10"] > phases["alignment"]["before"]["recall_at_10"]
    untrained = ItemEncoder.load(f"{output}/untrained", settings.encoders)
    encoder = ItemEncoder.load(f"{output}/encoder", settings.encoders)
    assert untrained.encoder_version == result.metrics["untrained_version"]
    assert untrained.encoder_version.startswith("untrained-")
    assert encoder.encoder_version == result.metrics["encoder_version"]
    assert encoder.encoder_version.startswith("pretraining-")
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == ["encoder", "untrained"]
    assert [label for label, _ in result.rows] == ["items", "encoder", "DDA, images", "DDA, titles", "DMA"]
