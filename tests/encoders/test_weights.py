"""mim_ray/encoders/weights.py: folders, hub repositories (never reached here), and what is never asked for."""

from fnmatch import fnmatch

import huggingface_hub
import pytest

from mim_ray.config.scenario import Text, Vision
from mim_ray.encoders import clip, text_weights
from mim_ray.encoders.text import build_text
from mim_ray.encoders.vision import build_vision
from mim_ray.encoders.weights import weights_folder
from mim_ray.errors import ArtifactError, ConfigError


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the hub is asked for; it gives an empty folder."""
    calls: list[tuple[str, list[str]]] = []

    def snapshot_download(name, allow_patterns):
        calls.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize(
    ("build", "repository"),
    [
        (
            lambda: build_vision(Vision(model="eva02_base_patch14_224", weights="hub")),
            "timm/eva02_base_patch14_224.mim_in22k",
        ),
        (lambda: build_vision(Vision(model="resnet50", weights="hub:me/own")), "me/own"),
        (lambda: build_vision(Vision(model="open_clip:ViT-B-16-SigLIP", weights="hub")), "timm/ViT-B-16-SigLIP"),
        (
            lambda: build_vision(Vision(model="open_clip:ViT-B-32/openai", weights="hub")),
            "timm/vit_base_patch32_clip_224.openai",
        ),
        (lambda: build_text(Text(weights="hub"), None), "BAAI/bge-base-en-v1.5"),
        (lambda: build_text(Text(model="gpt2", weights="hub:openai-community/gpt2"), None), "openai-community/gpt2"),
        (lambda: build_text(Text(model="open_clip:ViT-B-32", weights="hub:me/clip"), None), "me/clip"),
    ],
)
def test_the_hub_is_asked_for_the_named_repository_and_never_for_pickles_or_code(asked, build, repository):
    with pytest.raises(ArtifactError, match="safetensors"):
        build()
    ((name, patterns),) = asked
    assert name == repository
    for file in ("pytorch_model.bin", "open_clip_pytorch_model.bin", "model.pth", "model.pt", "modeling_x.py", "x.pkl"):
        assert not any(fnmatch(file, pattern) for pattern in patterns), (file, patterns)


@pytest.mark.parametrize("files", [text_weights.FILES, clip.FILES])
def test_tokenizers_are_copied_too(files):
    assert any(fnmatch("tokenizer.json", pattern) for pattern in files)


def test_a_hub_that_cannot_be_reached_is_a_sentence(monkeypatch):
    def snapshot_download(name, allow_patterns):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ArtifactError, match=r"weights of me/own cannot be had.*no route.*encoders.vision.weights"):
        weights_folder("hub:me/own", None, ["*.safetensors"], "encoders.vision.weights")


def test_a_type_names_no_repository():
    with pytest.raises(ConfigError, match="names no hub repository"):
        build_text(Text(model="bert", weights="hub"), None)


def test_adapters_are_refused(tmp_path):
    for name in ("config.json", "adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ArtifactError, match="adapter for another model"):
        build_text(Text(model="BAAI/bge-base-en-v1.5", weights=str(tmp_path)), None)
