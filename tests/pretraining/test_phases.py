import dataclasses

import numpy as np
import pytest
import torch

from mim_ray.data.transforms import PictureFormat
from mim_ray.encoders.item_encoder import ItemEncoder
from mim_ray.encoders.tokenizer import train_tokenizer
from mim_ray.errors import NonFiniteLossError
from mim_ray.pretraining.dataset import Pictures, PretrainingData, Share, choose_items, titles_of
from mim_ray.pretraining.phases import Context, pretrain

CUT_US = 1_000_000


def context_of(scenario, catalogue, **changes) -> Context:
    settings = scenario.pretraining.model_copy(update=changes)
    items = choose_items(catalogue, CUT_US)
    tokenizer = train_tokenizer(titles_of(catalogue, items.with_title), 100)
    data = PretrainingData(
        catalogue, Pictures(catalogue, PictureFormat(16, "squash"), 10**6, 10**7), Share(32, 0, 0, 1)
    )
    encoder = ItemEncoder.build(scenario.encoders, tokenizer, 0)
    return Context(encoder, data, items, settings, seed=0, rank=0, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(scenario, catalogue):
    torch.set_num_threads(1)
    context = context_of(scenario, catalogue)
    before = {key: value.clone() for key, value in context.encoder.state_dict().items()}
    kept: list[list[str]] = []
    metrics = pretrain(context, after_phase=lambda metrics: kept.append(list(metrics)))
    return context, before, metrics, kept


def test_each_phase_lowers_its_loss_and_improves_its_held_out_measure(trained):
    metrics = trained[2]
    assert metrics["image"]["after"]["reconstruction"] < 0.9 * metrics["image"]["before"]["reconstruction"]
    assert metrics["text"]["after"]["perplexity"] < 0.5 * metrics["text"]["before"]["perplexity"]
    assert metrics["alignment"]["after"]["recall_at_10"] > metrics["alignment"]["before"]["recall_at_10"] + 0.1
    for phase in metrics.values():
        assert phase["losses"][-1][1] < phase["losses"][0][1]
        assert phase["losses"][0][0] == 0


def test_phases_are_kept_one_after_the_other(trained):
    assert trained[3] == [["image"], ["image", "text"], ["image", "text", "alignment"]]


def test_fusion_is_left_to_c_sft(trained):
    context, before, _, _ = trained
    after = context.encoder.state_dict()
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"vision", "text", "image_projection", "text_projection"}


def test_the_same_seed_trains_the_same_encoder_again(trained, scenario, catalogue):
    context = context_of(scenario, catalogue)
    metrics = pretrain(context)
    assert [phase["losses"] for phase in metrics.values()] == [phase["losses"] for phase in trained[2].values()]
    expected = trained[0].encoder.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in context.encoder.state_dict().items())


def test_a_run_cut_off_between_phases_ends_like_an_undisturbed_one(trained, scenario, catalogue):
    context = context_of(scenario, catalogue)
    saved: dict = {}

    def cut_off(metrics):
        saved.update(metrics)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(context, after_phase=cut_off)
    again = context_of(scenario, catalogue)
    again.encoder.load_state_dict(context.encoder.state_dict())
    metrics = pretrain(again, done=saved)
    assert list(metrics) == ["image", "text", "alignment"]
    expected = trained[0].encoder.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.encoder.state_dict().items())


def test_phases_without_steps_or_items_are_left_out(scenario, catalogue):
    context = context_of(scenario, catalogue, vision_dda_steps=0, text_dda_steps=1, dma_steps=1)
    none = np.zeros(0, np.int64)
    context = dataclasses.replace(context, items=dataclasses.replace(context.items, with_both=none))
    assert list(pretrain(context)) == ["text"]


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves(scenario, catalogue):
    context = context_of(scenario, catalogue, vision_dda_steps=0, text_dda_steps=0)
    with torch.no_grad():
        context.encoder.image_projection.bias[0] = float("nan")
    before = context.encoder.text_projection.weight.clone()
    with pytest.raises(NonFiniteLossError, match="alignment is nan at step 0"):
        pretrain(context)
    assert torch.equal(context.encoder.text_projection.weight, before)
