"""mim_ray/encoders/tuning.py: freezing, LoRA, layer-wise rates, precision, checkpointing; the saved architecture stays."""

import copy

import numpy as np
import peft  # noqa: F401  loads for seconds, so not inside the first test
import pytest
import torch
from torch.nn import functional

from mim_ray.config.scenario import Csft, Tuning
from mim_ray.encoders.item_encoder import ItemEncoder, encode_batch
from mim_ray.encoders.tuning import depth_groups, layer_depths, merge, prepare, set_speed
from mim_ray.errors import ConfigError

from .conftest import TITLES
from .test_families import TEXTS, VISIONS, pixels, settings_with_image, settings_with_text

LORA = Tuning(vision_tuning="lora", text_tuning="lora", lora_rank=2)
IMAGE_NAMES = ["ResNet50", "Swin", "ConvNeXt v2", "EVA-02", "BEiT-3", "CLIP ViT", "SigLIP"]


def loss_of(encoder):
    there = torch.ones(4, dtype=torch.bool)
    items = encoder(pixels(encoder), there, encoder.text.tokenize(TITLES), there)
    query = functional.normalize(encoder.encode_image(255 - pixels(encoder)))
    return functional.cross_entropy(query @ functional.normalize(items.mm).T / 0.2, torch.arange(4))


def train(encoder, steps=3):
    encoder.train()
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], 0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(encoder).backward()
        optimizer.step()
    encoder.eval()


def rows_of(encoder):
    return encode_batch(encoder, TITLES, pixels(encoder).numpy(), np.ones(4, bool))


@pytest.mark.parametrize("name", [*IMAGE_NAMES, *[f"text {name}" for name in TEXTS]])
def test_lora_trains_beside_frozen_weights_and_folds_into_them(name, tokenizer, tmp_path):
    settings = settings_with_text(name[5:]) if name.startswith("text ") else settings_with_image(name)
    encoder = ItemEncoder.build(settings, tokenizer, seed=0).eval()
    plain, before = set(encoder.state_dict()), rows_of(encoder)
    weights = {id(p): p.detach().clone() for p in encoder.tower_parameters()}
    prepare(encoder, LORA, seed=0)
    np.testing.assert_allclose(rows_of(encoder), before, atol=1e-6)  # it starts as nothing
    trained = [n for n, p in encoder.named_parameters() if p.requires_grad and n.split(".")[0] in ("vision", "text")]
    assert trained
    assert all("lora_" in n for n in trained)
    loss_of(encoder).backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)
    train(encoder)
    assert all(torch.equal(p, weights[id(p)]) for p in encoder.tower_parameters() if id(p) in weights)
    after = rows_of(encoder)
    assert np.abs(after - before).max() > 1e-3
    merge(encoder)
    assert set(encoder.state_dict()) == plain
    assert all(p.requires_grad for p in encoder.parameters())
    np.testing.assert_allclose(rows_of(encoder), after, atol=1e-5)
    encoder.save(str(tmp_path), stage="csft")
    np.testing.assert_array_equal(rows_of(ItemEncoder.load(str(tmp_path), settings)), rows_of(encoder))


def test_lora_starts_equal_on_all_workers_and_leaves_their_random_numbers_alone(settings, tokenizer):
    states = []
    for rank in range(2):
        encoder = ItemEncoder.build(settings, tokenizer, seed=0)
        torch.manual_seed(rank)
        expected = torch.rand(1, generator=torch.Generator().manual_seed(rank))
        prepare(encoder, LORA, seed=7)
        assert torch.equal(torch.rand(1), expected)
        states.append(encoder.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_frozen_tower_stays_as_it_is_dropout_and_batch_norm_included(tokenizer):
    encoder = ItemEncoder.build(settings_with_image("ResNet50"), tokenizer, seed=0)
    prepare(encoder, Tuning(vision_tuning="frozen", text_tuning="frozen"), seed=0)
    before = copy.deepcopy(
        {key: value for key, value in encoder.state_dict().items() if key.startswith(("vision.", "text."))}
    )
    train(encoder)
    encoder.train()
    assert not any(module.training for tower in (encoder.vision, encoder.text) for module in tower.modules())
    assert encoder.fusion.training
    assert all(torch.equal(encoder.state_dict()[key], value) for key, value in before.items())
    merge(encoder)
    assert encoder.vision.net.training
    assert all(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize(
    "name", ["ResNet50", "Swin", "ConvNeXt", "EVA-02", "CLIP ViT", "SigLIP", "BERT", "GPT-2", "CLIP"]
)
def test_checkpointing_changes_no_gradient(name, tokenizer):
    settings = settings_with_text(name) if name in ("BERT", "GPT-2", "CLIP") else settings_with_image(name)
    gradients = []
    for checkpointing in (False, True):
        encoder = ItemEncoder.build(settings, tokenizer, seed=0).train()
        for module in encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        prepare(encoder, Tuning(gradient_checkpointing=checkpointing), seed=0)
        torch.manual_seed(0)
        loss_of(encoder).backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    prepare(encoder, Tuning(), seed=0)
    assert not encoder.text.checkpoints_gradients
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-6)


def test_bfloat16_stays_inside_the_towers(encoder):
    encoder.eval()
    expected = rows_of(encoder)
    inside = []
    encoder.text.net.encoder.layer[0].attention.self.query.register_forward_hook(lambda *a: inside.append(a[2].dtype))
    set_speed(encoder, "bfloat16", compile=False)
    tokens = encoder.text.tokenize(TITLES)
    assert encoder.vision(pixels(encoder)).dtype == encoder.text(tokens).dtype == torch.float32
    assert encoder.text.token_states(tokens).dtype == torch.float32
    assert set(inside) == {torch.bfloat16}
    rows = rows_of(encoder)
    np.testing.assert_allclose((rows * expected).sum(axis=1), 1.0, atol=2e-3)
    loss_of(encoder.train()).backward()
    assert {p.grad.dtype for p in encoder.parameters() if p.grad is not None} == {torch.float32}


def test_compiling_keeps_the_names_of_weights(encoder, monkeypatch):
    calls = []

    def fake(function, *args, **kwargs):
        return lambda *a, **k: calls.append(1) or function(*a, **k)

    monkeypatch.setattr(torch, "compile", fake)
    plain, expected = list(encoder.state_dict()), rows_of(encoder)
    set_speed(encoder, "float32", compile=True)
    np.testing.assert_array_equal(rows_of(encoder), expected)
    assert len(calls) == 2
    assert list(encoder.state_dict()) == plain


@pytest.mark.parametrize("name", [*VISIONS, *TEXTS])
def test_every_family_has_depths_from_its_first_to_its_last_layer(name, tokenizer):
    settings = settings_with_text(name) if name in TEXTS else settings_with_image(name)
    encoder = ItemEncoder.build(settings, tokenizer, seed=0)
    depths = layer_depths(encoder.text if name in TEXTS else encoder.vision)
    assert set(depths.values()) == set(range(max(depths.values()) + 1))
    assert max(depths.values()) >= 1
    first = [key for key, depth in depths.items() if depth == 0]
    assert any(word in key for key in first for word in ("embed", "wte", "stem", "conv1"))


def test_rates_fall_from_layer_to_layer(settings, tokenizer):
    args = settings.text.model_args | {"num_hidden_layers": 3}
    text = settings.text.model_copy(update={"model_args": args})
    encoder = ItemEncoder.build(settings.model_copy(update={"text": text}), tokenizer, seed=0)
    rates = {id(p): group["lr"] for group in depth_groups(encoder, 1.0, 0.1, layer_decay=0.5) for p in group["params"]}
    layers = encoder.text.net.encoder.layer
    assert rates[id(encoder.text.net.embeddings.word_embeddings.weight)] == 0.5**4
    assert [rates[id(layer.output.dense.weight)] for layer in layers] == [0.5**3, 0.5**2, 0.5]
    assert rates[id(encoder.text_projection.weight)] == rates[id(encoder.fusion.mlp[0].weight)] == 1.0
    eva = encoder.vision.net
    assert rates[id(eva.patch_embed.proj.weight)] == 0.5 * rates[id(eva.blocks[0].mlp.fc2.weight)]
    assert len(rates) == len(list(encoder.parameters()))
    assert len(depth_groups(encoder, 1.0, 0.1, layer_decay=1.0)) == 2


def test_a_stages_settings_are_tuning_settings():
    assert isinstance(Csft(vision_tuning="lora"), Tuning)


def test_a_network_that_cannot_checkpoint_is_a_sentence(encoder, monkeypatch):
    def refuse(enable=True):
        raise AssertionError("gradient checkpointing not supported")

    monkeypatch.setattr(encoder.vision.net, "set_grad_checkpointing", refuse)
    with pytest.raises(ConfigError, match="Set gradient_checkpointing=false"):
        prepare(encoder, Tuning(gradient_checkpointing=True), seed=0)
