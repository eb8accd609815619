"""Every image and language family that a scenario can name, in a tiny configuration with random weights."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from mim_ray.config.scenario import Encoders
from mim_ray.encoders.item_encoder import ItemEncoder, encode_batch

from .conftest import TEXT, TITLES, VISION

TRANSFORMER = {"embed_dim": 24, "depth": 1, "num_heads": 2}
CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
CLIP = {"embed_dim": 12, "width": 16, "layers": 1, "head_width": 8}
VISIONS = {  # model, image size, model_args
    "ResNet50": ("resnet50", 32, {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        32,
        {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    ),
    "ConvNeXt": ("convnext_base", 32, CONVNEXT),
    "ConvNeXt v2": ("convnextv2_base", 32, CONVNEXT),
    "ConvNeXt v2 large": ("convnextv2_large", 32, CONVNEXT),
    "EVA-02": ("eva02_base_patch14_224", 28, TRANSFORMER),
    "BEiT-3": ("beit3_base_patch16_224", 32, TRANSFORMER),
    "CLIP ViT": ("open_clip:ViT-B-32", 32, CLIP | {"patch_size": 16}),
    "CLIP ResNet": ("open_clip:RN50", 32, CLIP | {"layers": [1, 1, 1, 1], "width": 8}),
    "SigLIP": ("open_clip:ViT-B-16-SigLIP", 48, {"timm_model_name": "test_vit"}),
    "EVA-CLIP": ("open_clip:EVA02-B-16", 48, {"timm_model_name": "test_vit", "timm_pool": "token", "embed_dim": 12}),
    "CLIP ConvNeXt": ("open_clip:convnext_base", 32, {"timm_model_name": "test_convnext", "embed_dim": 12}),
}
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
CLIP_TEXT = {"embed_dim": 12, "width": 16, "layers": 1, "heads": 2}
TEXTS = {
    "BERT": ("bert", BERT),
    "GPT-2": ("gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}),
    "BEiT-3 text": ("xlm-roberta", BERT),
    "CLIP": ("open_clip:ViT-B-32", CLIP_TEXT),
    "SigLIP": ("open_clip:ViT-B-16-SigLIP", CLIP_TEXT),
}


def settings_of(vision: object, text: object) -> Encoders:
    return Encoders.model_validate({"width": 8, "fusion_hidden": 24, "vision": vision, "text": text})


def settings_with_image(name: str) -> Encoders:
    model, size, args = VISIONS[name]
    return settings_of({"model": model, "image_size": size, "model_args": args}, TEXT)


def settings_with_text(name: str) -> Encoders:
    model, args = TEXTS[name]
    return settings_of(VISION, {"model": model, "max_tokens": 8, "model_args": args})


def pixels(encoder: ItemEncoder) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = encoder.image_size
    return torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=generator)


def train_a_step(encoder: ItemEncoder) -> None:
    """Eq. 6's three levels among four items."""
    encoder.train()
    optimizer = torch.optim.AdamW(encoder.parameters(), 1e-3)
    all_there = torch.ones(4, dtype=torch.bool)
    items = encoder(pixels(encoder), all_there, encoder.text.tokenize(TITLES), all_there)
    query = functional.normalize(encoder.encode_image(255 - pixels(encoder)))
    loss = sum(
        weight * functional.cross_entropy(query @ functional.normalize(item).T / 0.07, torch.arange(4))
        for weight, item in ((1.0, items.mm), (0.5, items.text), (0.5, items.image))
    )
    loss.backward()
    without = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())
    optimizer.step()


def check(settings: Encoders, tokenizer: object, folder: object) -> None:
    encoder = ItemEncoder.build(settings, tokenizer, seed=0)
    train_a_step(encoder)
    encoder.save(str(folder), stage="csft")
    loaded = ItemEncoder.load(str(folder), settings)
    arguments = ([*TITLES[:3], None], pixels(encoder).numpy(), np.array([True, False, True, True]))
    rows = encode_batch(encoder, *arguments)
    assert np.array_equal(encode_batch(loaded, *arguments), rows)
    assert np.isfinite(rows).all()
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-5)
    assert loaded.picture == encoder.picture


@pytest.mark.parametrize("name", VISIONS)
def test_an_image_family_builds_trains_saves_and_reloads(name, tokenizer, tmp_path):
    check(settings_with_image(name), tokenizer, tmp_path)


@pytest.mark.parametrize("name", VISIONS)
def test_an_image_family_has_a_feature_map(name, tokenizer):
    tower = ItemEncoder.build(settings_with_image(name), tokenizer, seed=0).vision
    size = tower.image_size
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), requires_grad=True)
    tower.eval()
    cells = tower.feature_map(image)
    assert cells.shape == (2, tower.map_channels, size // tower.stride, size // tower.stride)
    (cells * torch.randn(cells.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert image.grad is not None
    assert (image.grad.flatten(1).abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("name", TEXTS)
def test_a_language_family_builds_trains_saves_and_reloads(name, tokenizer, tmp_path):
    check(settings_with_text(name), tokenizer, tmp_path)


@pytest.mark.parametrize("name", TEXTS)
def test_what_stands_beside_a_title_does_not_change_its_embedding(name, tokenizer):
    tower = ItemEncoder.build(settings_with_text(name), tokenizer, seed=0).text.eval()
    assert tower.causal == (name in ("GPT-2", "CLIP"))
    alone = tower(tower.tokenize(["bag"]))
    beside = tower(tower.tokenize(["bag", "blue square bag with dots"]))[:1]
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-5)
    assert alone.shape == (1, tower.width)
    tokens = tower.tokenize(TITLES)
    assert tower.token_states(tokens).shape == (4, tokens["input_ids"].shape[1], tower.states_width)


def test_items_lacking_a_modality_keep_a_defined_embedding_with_low_rank_fusion(tokenizer):
    settings = settings_with_text("CLIP").model_copy(update={"fusion": "low_rank_tfn", "fusion_rank": 2})
    encoder = ItemEncoder.build(settings, tokenizer, seed=0).eval()
    pictures = pixels(encoder).numpy()
    has_image = np.array([True, False, True, False])
    rows = encode_batch(encoder, ["red bag", "hat", None, None], pictures, has_image)
    assert np.linalg.norm(rows, axis=1) == pytest.approx([1, 1, 1, 0], abs=1e-5)
    other = encode_batch(encoder, ["red bag", "hat", None, None], 255 - pictures, has_image)
    np.testing.assert_allclose(rows[1], other[1], atol=1e-6)
    assert np.abs(rows[2] - other[2]).max() > 1e-4
