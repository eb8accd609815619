"""A small catalogue of the synthetic shop and a tiny encoder for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mim_ray import artifacts
from mim_ray.config.scenario import Scenario
from mim_ray.data.catalogue import Catalogue, write_catalogue
from mim_ray.data.pictures import render
from mim_ray.data.schema import TIME

NUM_ITEMS = 400
NUM_LATE = 40
CUT_US = 1_000_000
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "grey")


@pytest.fixture(scope="session")
def samples(tmp_path_factory) -> str:
    """What the samples stage leaves, as far as pre-training reads it: pictures whose palette the title names."""
    folder: Path = tmp_path_factory.mktemp("samples")
    rng = np.random.default_rng(0)
    styles = rng.integers(0, 240, NUM_ITEMS)
    colours = [COLOURS[style // 5 % 8] for style in styles]
    images: list[bytes | None] = [render(int(style), 0, key, 24) for key, style in enumerate(styles)]
    titles: list[str | None] = [f"{colour} thing number {i % 7}" for i, colour in enumerate(colours)]
    images[3], titles[4] = None, None
    late = np.arange(NUM_ITEMS) >= NUM_ITEMS - NUM_LATE
    table = pa.table(
        {
            "item_id": [f"item-{i}" for i in range(NUM_ITEMS)],
            "title": titles,
            "image": pa.array(images, pa.large_binary()),
            "categories": ["things"] * NUM_ITEMS,
            "created_at": pa.array(np.where(late, CUT_US, 0), TIME),
        }
    )
    write_catalogue(f"{folder}/catalogue", [table])
    artifacts.write_json(f"{folder}/samples.json", {"validation_start": "1970-01-01T00:00:01+00:00"})
    return str(folder)


@pytest.fixture(scope="session")
def catalogue(samples) -> Catalogue:
    return Catalogue.open(f"{samples}/catalogue")


@pytest.fixture(scope="session")
def scenario() -> Scenario:
    values: dict[str, Any] = {
        "encoders": {
            "width": 16,
            "fusion_hidden": 40,
            "vision": {
                "model": "eva02_tiny_patch14_224",
                "image_size": 16,
                "resize": "squash",
                "model_args": {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2},
            },
            "text": {
                "model": "bert",
                "max_tokens": 8,
                "vocabulary_size": 100,
                "model_args": {
                    "hidden_size": 24,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "intermediate_size": 48,
                    "initializer_range": 0.2,  # so small a random tower needs larger weights than BERT
                },
            },
        },
        "pretraining": {
            "num_decoders": 0,
            "batch_size": 32,
            "vision_dda_steps": 20,
            "text_dda_steps": 30,
            "dma_steps": 60,
            "vision_dda_learning_rate": 5e-3,
            "text_dda_learning_rate": 5e-3,
            "dma_learning_rate": 5e-3,
            "dma_tower_learning_rate": 5e-3,
            "temperature": 0.3,
            "threads_per_worker": 1,
        },
    }
    return Scenario.model_validate(values)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose time to more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
