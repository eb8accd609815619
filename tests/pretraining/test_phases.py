import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from mim_ray import artifacts
from mim_ray.data.transforms import PictureFormat
from mim_ray.encoders.item_encoder import ItemEncoder
from mim_ray.encoders.tokenizer import train_tokenizer
from mim_ray.errors import NonFiniteLossError
from mim_ray.pretraining import phases
from mim_ray.pretraining.dataset import Content, Share, choose_items, titles_of
from mim_ray.pretraining.phases import Context, pretrain

CUT_US = 1_000_000


def context_of(scenario, catalogue, text: dict[str, Any] | None = None, **changes) -> Context:
    settings = scenario.pretraining.model_copy(update=changes)
    tokenizer = train_tokenizer(titles_of(catalogue, choose_items(catalogue, CUT_US).with_title), 100)
    encoders = scenario.encoders
    if text is not None:
        encoders = encoders.model_copy(update={"text": encoders.text.model_copy(update=text)})
    encoder = ItemEncoder.build(encoders, tokenizer, 0)
    content = Content(str(catalogue._folder), PictureFormat(16, "squash"), 10**6, 10**7, CUT_US)
    return Context(encoder, content, settings, Share(32, 0, 0, 1), torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(scenario, catalogue):
    torch.set_num_threads(1)
    context = context_of(scenario, catalogue)
    before = {key: value.clone() for key, value in context.encoder.state_dict().items()}
    kept: list[list[str]] = []
    metrics = pretrain(context, after_phase=lambda finished: kept.append(list(finished.metrics)))
    return context, before, metrics, kept


def test_each_phase_lowers_its_loss_and_improves_its_held_out_measure(trained):
    image, text, alignment = trained[2].values()
    assert image["after"]["reconstruction"] < 0.9 * image["before"]["reconstruction"]
    assert text["after"]["perplexity"] < 0.5 * text["before"]["perplexity"]
    assert text["asked"] == "hidden words"
    for direction in ("image_to_text", "text_to_image"):
        assert alignment["after"][f"{direction}_recall@10"] > alignment["before"][f"{direction}_recall@10"] + 0.1
    assert alignment["last_loss"] < alignment["chance_loss"]
    for phase in trained[2].values():
        assert phase["losses"][-1][1] < phase["losses"][0][1]
        assert phase["losses"][0][0] == 0


def test_phases_are_kept_one_after_the_other(trained):
    assert trained[3] == [["image"], ["image", "text"], ["image", "text", "alignment"]]


def test_fusion_is_left_to_c_sft(trained):
    context, before, _, _ = trained
    after = context.encoder.state_dict()
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"vision", "text", "image_projection", "text_projection"}


def test_a_gpt_like_tower_learns_the_next_words(scenario, catalogue):
    settings = {"n_embd": 24, "n_layer": 1, "n_head": 2, "n_positions": 16}
    context = context_of(
        scenario, catalogue, {"model": "gpt2", "model_args": settings}, vision_dda_steps=0, dma_steps=0
    )
    text = pretrain(context)["text"]
    assert text["asked"] == "next words"
    assert text["after"]["perplexity"] < 0.2 * text["before"]["perplexity"]


def test_lora_and_frozen_towers_leave_the_plain_architecture(scenario, catalogue):
    tuning = {
        "vision_tuning": "lora",
        "text_tuning": "frozen",
        "lora_rank": 2,
        "layer_decay": 0.8,
        "precision": "bfloat16",
    }
    context = context_of(scenario, catalogue, vision_dda_steps=3, dma_steps=3, **tuning)
    before = {key: value.clone() for key, value in context.encoder.state_dict().items()}
    metrics = pretrain(context)
    assert list(metrics) == ["image", "alignment"]  # DDA leaves a frozen tower out
    after = context.encoder.state_dict()
    assert list(after) == list(before)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key.split(".")[0] for key in changed} == {"vision", "image_projection", "text_projection"}
    assert any("mlp" in key for key in changed)


def test_an_open_clip_text_tower_learns_the_next_words(scenario, catalogue):
    text = {"model": "open_clip:ViT-B-32", "model_args": {"width": 16, "layers": 1, "heads": 2, "embed_dim": 12}}
    context = context_of(scenario, catalogue, text, vision_dda_steps=0, text_dda_steps=2, dma_steps=2)
    metrics = pretrain(context)
    assert metrics["text"]["asked"] == "next words"
    assert metrics["alignment"]["last_loss"] > 0


def test_the_same_seed_trains_the_same_encoder_again(trained, scenario, catalogue):
    context = context_of(scenario, catalogue)
    metrics = pretrain(context)
    assert [phase["losses"] for phase in metrics.values()] == [phase["losses"] for phase in trained[2].values()]
    expected = trained[0].encoder.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in context.encoder.state_dict().items())


def test_a_run_cut_off_between_phases_ends_like_an_undisturbed_one(trained, scenario, catalogue):
    context = context_of(scenario, catalogue)
    saved: dict = {}

    def cut_off(finished):
        saved.update(finished.metrics)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(context, after_phase=cut_off)
    again = context_of(scenario, catalogue)
    again.encoder.load_state_dict(context.encoder.state_dict())
    metrics = pretrain(again, done=saved)
    assert list(metrics) == ["image", "text", "alignment"]
    expected = trained[0].encoder.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.encoder.state_dict().items())


@pytest.mark.parametrize("phase", ["MaskedImages", "Titles", "Alignment"])
def test_a_run_cut_off_inside_a_phase_ends_like_an_undisturbed_one(
    phase, scenario, catalogue, tmp_path, monkeypatch, capsys
):
    names = {"MaskedImages": "image", "Titles": "text", "Alignment": "alignment"}
    steps = {"vision_dda_steps": 0, "text_dda_steps": 0, "dma_steps": 0}
    own = {"MaskedImages": "vision_dda_steps", "Titles": "text_dda_steps", "Alignment": "dma_steps"}[phase]
    changes = {**steps, own: 12, "checkpoint_every_steps": 5}
    whole = context_of(scenario, catalogue, **changes)
    expected = pretrain(whole)
    kind = getattr(phases, phase)
    original, seen = kind.loss, []

    def dying(self, batch):
        seen.append(batch["rows"].tolist())
        if len(seen) == 8:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(kind, "loss", dying)
    with pytest.raises(KeyboardInterrupt):
        pretrain(context_of(scenario, catalogue, **changes), checkpoints=str(tmp_path))
    again = context_of(scenario, catalogue, **changes)
    metrics = pretrain(again, checkpoints=str(tmp_path))
    assert f"{names[phase]}: goes on from step 5 of 12" in capsys.readouterr().out
    assert seen[8:11] == seen[5:8]  # the same rows
    assert metrics[names[phase]]["losses"] == expected[names[phase]]["losses"]
    state = whole.encoder.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.encoder.state_dict().items())


def test_with_another_number_of_workers_an_interrupted_phase_starts_again(scenario, catalogue, tmp_path, capsys):
    changes = {"vision_dda_steps": 0, "text_dda_steps": 6, "dma_steps": 0, "checkpoint_every_steps": 4}
    whole = context_of(scenario, catalogue, **changes)
    expected = pretrain(whole, checkpoints=str(tmp_path))["text"]
    (state,) = artifacts.list_files(str(tmp_path), "state.json")
    values = artifacts.read_json(state)
    artifacts.write_json(state, values | {"values": values["values"] * 3})
    metrics = pretrain(context_of(scenario, catalogue, **changes), checkpoints=str(tmp_path))["text"]
    assert "its checkpoint is of 3 workers, now there are 1; goes on from the end of" in capsys.readouterr().out
    assert metrics["losses"] == expected["losses"]


def test_a_frozen_tower_has_no_dda_and_stays_as_it_is(scenario, catalogue):
    steps = {"vision_dda_steps": 1, "text_dda_steps": 1, "dma_steps": 1}
    context = context_of(scenario, catalogue, vision_tuning="frozen", **steps)
    before = {key: value.clone() for key, value in context.encoder.state_dict().items()}
    assert list(pretrain(context)) == ["text", "alignment"]
    after = context.encoder.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if key.startswith("vision."))
    assert set(after) == set(before)


def test_phases_without_steps_or_items_are_left_out(scenario, catalogue):
    context = context_of(scenario, catalogue, vision_dda_steps=0, text_dda_steps=1, dma_steps=1)
    context.items = dataclasses.replace(context.items, with_both=np.zeros(0, np.int64))
    assert list(pretrain(context)) == ["text"]


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves(scenario, catalogue):
    context = context_of(scenario, catalogue, vision_dda_steps=0, text_dda_steps=0)
    with torch.no_grad():
        context.encoder.image_projection.bias[0] = float("nan")
    before = context.encoder.text_projection.weight.clone()
    with pytest.raises(NonFiniteLossError, match="alignment is nan at step 0"):
        pretrain(context)
    assert torch.equal(context.encoder.text_projection.weight, before)
