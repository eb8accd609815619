"""mim_ray/encoders/clip.py: open_clip's towers, their weights in a folder, and its tokenizer."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from mim_ray.config.scenario import Text, Vision
from mim_ray.data.transforms import PictureFormat
from mim_ray.encoders.clip import clip_tokenizer
from mim_ray.encoders.text import brings_tokenizer, build_text
from mim_ray.encoders.vision import build_vision
from mim_ray.errors import ArtifactError, ConfigError

VISION = {"width": 16, "layers": 1, "head_width": 8, "patch_size": 16}
TEXT = {"width": 16, "layers": 1, "heads": 2}
ARGS = {"embed_dim": 12}


@pytest.fixture
def saved(tmp_path):
    """A tiny CLIP in the layout of open_clip's hub repositories, and the model."""
    torch.manual_seed(0)
    vision, text = VISION | {"image_size": 32}, TEXT | {"context_length": 77, "vocab_size": 49408}
    net = open_clip.CLIP(12, vision, text).eval()
    save_file(net.state_dict(), tmp_path / "open_clip_model.safetensors")
    config = {
        "model_cfg": {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "longest"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    return tmp_path, net


def vision_of(folder: object, **changes: object) -> Vision:
    values = {"model": "open_clip:ViT-B-32", "image_size": 32, "model_args": VISION | ARGS, "weights": str(folder)}
    return Vision.model_validate(values | changes)


def test_image_weights_and_preparation_come_from_the_folder(saved):
    folder, net = saved
    tower = build_vision(vision_of(folder)).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(tower(images), net.encode_image((images / 255 - 0.5) / 0.25))
    assert tower.picture == PictureFormat(32, "longest", "bilinear", 1.0, (0, 0, 0))
    assert tower.width == 12


def test_positions_are_resized_to_another_picture_size(saved):
    tower = build_vision(vision_of(saved[0], image_size=64))
    assert tower.net.visual.positional_embedding.shape[0] == 17
    assert tower.stride == 16


def test_text_weights_come_from_the_folder_and_pool_as_open_clip_does(saved):
    folder, net = saved
    text = Text(model="open_clip:ViT-B-32", weights=str(folder), max_tokens=77, model_args=TEXT | ARGS)
    tower = build_text(text, None).eval()
    titles = ["Red round shoe!", "a bag"]
    torch.testing.assert_close(
        tower(tower.tokenize(titles)), net.encode_text(open_clip.get_tokenizer("ViT-B-32")(titles))
    )
    assert tower.causal


def test_siglip_pads_with_its_own_token_and_pools_the_last_place(tmp_path, tokenizer):
    torch.manual_seed(0)
    args = TEXT | {"context_length": 8, "vocab_size": tokenizer.get_vocab_size()}
    config = open_clip.get_model_config("ViT-B-16-SigLIP")["text_cfg"] | args
    vision = {"image_size": 16, "patch_size": 16, "width": 64, "layers": 1}
    net = open_clip.CustomTextCLIP(12, vision, config).eval()
    save_file(net.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[SEP]"}))
    text = Text(model="open_clip:ViT-B-16-SigLIP", weights=str(tmp_path), max_tokens=8, model_args=args | ARGS)
    tower = build_text(text, None).eval()
    end = tokenizer.token_to_id("[SEP]")
    ids = tokenizer.encode("red bag").ids
    padded = torch.tensor([ids + [end] * (8 - len(ids))])
    torch.testing.assert_close(tower(tower.tokenize(["Red, BAG!"])), net.encode_text(padded))  # cleaned as SigLIP does


def test_the_tokenizer_gives_open_clips_ids():
    titles = [
        "A red   round Shoe's heel, size 42!!",
        "naïve café 日本語 50% 🙂 it's I'LL DON'T",
        "x" * 400,
        "&amp; &lt;b&gt; \n tab\tç ½ ﬁ",
        "",
        "<b>hello</b> ... --- ''' 's 12345 a1b2 Ünïcödé",
    ]
    tower = build_text(Text(model="open_clip:ViT-B-32", max_tokens=77, model_args=TEXT | ARGS), None)
    assert torch.equal(tower.tokenize(titles)["input_ids"], open_clip.get_tokenizer("ViT-B-32")(titles))


def test_the_tokenizer_survives_being_saved():
    tokenizer = clip_tokenizer()
    again = type(tokenizer).from_str(tokenizer.to_str())
    assert again.encode("a red bag").ids == tokenizer.encode("a red bag").ids


def test_which_models_bring_a_tokenizer():
    assert brings_tokenizer(Text(model="open_clip:ViT-B-32"))
    assert not brings_tokenizer(Text(model="open_clip:ViT-B-16-SigLIP"))
    assert not brings_tokenizer(Text(model="bert"))


def test_siglips_pictures_are_squashed_and_halved_as_its_definition_says():
    tower = build_vision(
        Vision(model="open_clip:ViT-B-16-SigLIP", image_size=48, model_args={"timm_model_name": "test_vit"})
    )
    assert (tower.picture.resize, tower.picture.interpolation) == ("squash", "bicubic")
    assert tower.mean.flatten().tolist() == [0.5] * 3


def test_another_architecture_is_refused_with_both_names(saved):
    folder, _ = saved
    config = {"model_cfg": open_clip.get_model_config("ViT-L-14")}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"holds weights of open_clip:ViT-L-14.*asks for open_clip:ViT-B-32"):
        build_vision(vision_of(folder))
    text = Text(model="open_clip:ViT-B-32", weights=str(folder), model_args=TEXT | ARGS)
    with pytest.raises(ArtifactError, match=r"holds weights of .*asks for open_clip:ViT-B-32"):
        build_text(text, None)


def test_weights_that_do_not_fit_are_refused(saved):
    folder, net = saved
    (folder / "open_clip_config.json").unlink()
    state = net.state_dict()
    del state["visual.proj"]
    save_file(state, folder / "open_clip_model.safetensors")
    with pytest.raises(ArtifactError, match=r"does not fit open_clip:ViT-B-32.*proj"):
        build_vision(vision_of(folder))


def test_pickled_weights_are_never_loaded(tmp_path):
    torch.save({}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"no open_clip_model.safetensors \(found: open_clip_pytorch_model.bin\)"):
        build_vision(vision_of(tmp_path))


@pytest.mark.parametrize("build", [lambda m: build_vision(Vision(model=m)), lambda m: build_text(Text(model=m), None)])
def test_an_unknown_name_suggests_the_nearest(build):
    with pytest.raises(ConfigError, match=r"no open_clip model; did you mean .*ViT-B-32"):
        build("open_clip:ViTB-32")


def test_several_public_weights_need_a_tag():
    with pytest.raises(ConfigError, match=r"public weights. Say which, as in open_clip:ViT-B-32/openai"):
        build_vision(Vision(model="open_clip:ViT-B-32", weights="hub"))


def test_a_transformers_text_tower_is_named_as_such():
    with pytest.raises(ConfigError, match=r"text tower roberta-base of transformers"):
        build_text(Text(model="open_clip:roberta-ViT-B-32"), None)


def test_a_text_tower_with_an_unknown_preparation_is_refused():
    with pytest.raises(ConfigError, match="strip_sep_token"):
        build_text(Text(model="open_clip:ViT-L-14-CLIPA"), None)
