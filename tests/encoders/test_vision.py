import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from mim_ray.config.scenario import Vision
from mim_ray.encoders.vision import build_vision
from mim_ray.errors import ArtifactError, ConfigError

EVA = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
FAMILIES = [
    ("eva02_tiny_patch14_224", 16, EVA),
    ("beit3_base_patch16_224", 32, {"embed_dim": 24, "depth": 1, "num_heads": 2}),
    ("swin_tiny_patch4_window7_224", 64, {"embed_dim": 16, "window_size": 4}),
    ("test_convnext", 32, {}),
    ("test_resnet", 32, {}),
]


def pixels(size: int, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize(("model", "size", "args"), FAMILIES)
def test_every_family_pools_and_maps(model, size, args):
    tower = build_vision(Vision(model=model, image_size=size, model_args=args)).eval()
    images = pixels(size)
    assert tower(images).shape == (2, tower.width)
    cells = tower.feature_map(tower.normalise(images))
    assert cells.shape == (2, tower.map_channels, size // tower.stride, size // tower.stride)


def test_feature_map_keeps_the_place_of_a_patch():
    tower = build_vision(Vision(model=FAMILIES[0][0], image_size=32, model_args=EVA | {"depth": 0})).eval()
    image = torch.zeros(1, 3, 32, 32)
    changed = image.clone()
    changed[:, :, 8:16, 24:32] = 1.0  # second row, last column
    difference = (tower.feature_map(changed) - tower.feature_map(image)).abs().sum(1)[0]
    assert (difference > 1e-6).nonzero().tolist() == [[1, 3]]


def test_pixels_are_normalised_by_the_models_own_mean_and_deviation():
    tower = build_vision(Vision(model="test_resnet", image_size=32))
    definition = timm.get_pretrained_cfg("test_resnet")
    value = tower.normalise(torch.full((1, 3, 32, 32), 51, dtype=torch.uint8))[0, :, 0, 0]
    expected = [(0.2 - mean) / std for mean, std in zip(definition.mean, definition.std, strict=True)]
    assert value.tolist() == pytest.approx(expected, rel=1e-5)


def test_pooling_is_the_models_own():
    tower = build_vision(Vision(model=FAMILIES[0][0], image_size=16, model_args=EVA)).eval()
    images = pixels(16)
    own = tower.net.forward_head(tower.net.forward_features(tower.normalise(images)), pre_logits=True)
    torch.testing.assert_close(tower(images), own)


def test_weights_of_a_local_folder_are_loaded(tmp_path):
    saved = timm.create_model("eva02_tiny_patch14_224", num_classes=5, img_size=16, **EVA).eval()
    save_file(saved.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": [0.1] * 3, "std": [0.3] * 3}}))
    tower = build_vision(
        Vision(model="eva02_tiny_patch14_224", image_size=16, model_args=EVA, weights=str(tmp_path))
    ).eval()
    for key, value in tower.net.state_dict().items():
        torch.testing.assert_close(value, saved.state_dict()[key])
    assert tower.mean.flatten().tolist() == pytest.approx([0.1] * 3)


def test_position_embeddings_of_another_resolution_are_resized(tmp_path):
    saved = timm.create_model("eva02_tiny_patch14_224", num_classes=0, img_size=16, **EVA)
    save_file(saved.state_dict(), tmp_path / "model.safetensors")
    tower = build_vision(Vision(model="eva02_tiny_patch14_224", image_size=32, model_args=EVA, weights=str(tmp_path)))
    assert tower.net.pos_embed.shape[1] == 17


def test_weights_of_another_architecture_are_refused(tmp_path):
    saved = timm.create_model("test_resnet", num_classes=0)
    save_file(saved.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"eva02_tiny_patch14_224.*encoders.vision.model|does not fit"):
        build_vision(Vision(model="eva02_tiny_patch14_224", image_size=16, model_args=EVA, weights=str(tmp_path)))


def test_pickled_weights_are_never_loaded(tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"no model.safetensors \(found: pytorch_model.bin\)"):
        build_vision(Vision(model="test_resnet", image_size=32, weights=str(tmp_path)))


def test_damaged_weights_are_refused_with_a_sentence(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ArtifactError, match="does not fit test_resnet"):
        build_vision(Vision(model="test_resnet", image_size=32, weights=str(tmp_path)))


def test_an_unknown_model_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean .*eva02_base_patch14_224"):
        build_vision(Vision(model="eva02_base_patch14_24"))


def test_wrong_arguments_are_a_sentence():
    with pytest.raises(ConfigError, match="nonsense"):
        build_vision(Vision(model="test_resnet", image_size=32, model_args={"nonsense": 1}))
