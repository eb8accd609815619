"""The slow copy of the encoder, and what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mim_ray.csft.momentum import MomentumEncoder, with_embeddings
from mim_ray.csft.negatives import Candidates


def make_encoder(value: float) -> nn.Module:
    encoder = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(value)
        encoder[1].running_mean.fill_(value)
    return encoder


def test_parameters_are_averaged_by_hand_and_buffers_copied() -> None:
    encoder = make_encoder(1.0)
    slow = MomentumEncoder(encoder, 0.9)
    for value in (2.0, 4.0):
        slow.update(make_encoder(value))
    # 0.9·1 + 0.1·2 = 1.1; 0.9·1.1 + 0.1·4 = 1.39
    assert [float(p) for p in slow.encoder.parameters()] == pytest.approx([1.39] * 4)
    assert float(slow.encoder[1].running_mean) == 4.0
    assert float(encoder[0].weight) == 1.0
    assert not slow.encoder.training
    assert not any(p.requires_grad for p in slow.encoder.parameters())


def test_it_comes_back_from_its_state() -> None:
    slow = MomentumEncoder(make_encoder(1.0), 0.9)
    slow.update(make_encoder(2.0))
    other = MomentumEncoder(make_encoder(7.0), 0.9)
    other.load_state({key: tensor.clone() for key, tensor in slow.state().items()})
    assert all(torch.equal(a, b) for a, b in zip(slow.state().values(), other.state().values(), strict=True))


def test_only_the_embeddings_of_the_past_change() -> None:
    flags, rows = torch.tensor([True, False]), torch.arange(2)
    fresh = Candidates(torch.ones(2, 3, 4), flags, ~flags, rows, rows + 5)
    own = torch.zeros(2, 3, 4)
    own[..., 1] = 3.0
    slow = with_embeddings(fresh, own)
    assert slow.embeddings[..., 1].eq(1.0).all()
    assert torch.equal(slow.items, fresh.items)
    assert torch.equal(slow.has_image, fresh.has_image)
