import pytest
import timm

from mim_ray.config import Scenario, load_scenario
from mim_ray.config.load import describe_keys, scenario_names
from mim_ray.errors import ConfigError


@pytest.mark.parametrize("name", scenario_names())
def test_every_shipped_scenario_loads(name: str) -> None:
    assert load_scenario(name).name == name


def test_the_papers_scenario_has_its_encoders_and_numbers() -> None:
    scenario = load_scenario("mim")
    vision, text = scenario.encoders.vision, scenario.encoders.text
    assert (vision.model, text.model) == ("eva02_base_patch14_224", "BAAI/bge-base-en-v1.5")
    assert vision.weights == text.weights == "hub"
    assert timm.get_pretrained_cfg(vision.model).hf_hub_id == "timm/eva02_base_patch14_224.mim_in22k"
    assert (scenario.csft.batch_size, scenario.csft.num_past_batches) == (1_024, 10)
    assert (scenario.csft.text_loss_weight, scenario.csft.image_loss_weight) == (0.5, 0.5)


def test_overrides_win_over_the_file_and_the_file_over_the_defaults() -> None:
    scenario = load_scenario("tiny", ["csft.num_past_batches=7", "ciubm.seeds=[1,2]"])
    assert scenario.csft.num_past_batches == 7
    assert scenario.ciubm.seeds == (1, 2)
    assert scenario.csft.batch_size != Scenario().csft.batch_size


def test_all_problems_are_reported_at_once_with_the_nearest_key() -> None:
    with pytest.raises(ConfigError) as caught:
        load_scenario("tiny", ["csft.num_past_batchs=2", "csft.steps=-1", "nonsense", "name.x=1"])
    text = str(caught.value)
    assert "did you mean 'csft.num_past_batches'?" in text
    assert "csft.steps = -1" in text
    assert "the command line" in text
    assert "nonsense" in text
    assert "name.x" in text


def test_an_unknown_scenario_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        load_scenario("tinny")


def test_every_setting_has_a_default_and_is_listed() -> None:
    lines = describe_keys()
    assert any(line.startswith("csft.num_past_batches = 10\n") for line in lines)
    assert len(lines) > 80
