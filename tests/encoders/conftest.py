"""Tiny settings of the paper's families."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mim_ray.config.scenario import Encoders
from mim_ray.encoders.item_encoder import ItemEncoder
from mim_ray.encoders.tokenizer import train_tokenizer

TITLES = ["red round shoe", "blue square bag with dots", "green round hat", "red striped bag"]
VISION: dict[str, Any] = {
    "model": "eva02_tiny_patch14_224",
    "image_size": 16,
    "resize": "squash",
    "model_args": {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
}
TEXT: dict[str, Any] = {
    "model": "bert",
    "max_tokens": 8,
    "vocabulary_size": 100,
    "model_args": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
}


@pytest.fixture(scope="session")
def settings() -> Encoders:
    return Encoders.model_validate({"width": 8, "fusion_hidden": 24, "vision": VISION, "text": TEXT})


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TITLES, 100)


@pytest.fixture
def encoder(settings, tokenizer) -> ItemEncoder:
    return ItemEncoder.build(settings, tokenizer, seed=0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose time to more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
