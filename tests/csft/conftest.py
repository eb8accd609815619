"""A shop of 60 items with drawn pictures, its pairs, and an untrained encoder, all tiny."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mim_ray.config import Scenario
from mim_ray.data.catalogue import write_catalogue
from mim_ray.data.schema import INTEREST_PAIRS, TIME
from mim_ray.encoders import ItemEncoder
from mim_ray.encoders.tokenizer import train_tokenizer

NUM_ITEMS, NUM_PAIRS = 60, 240
WORDS = ("red shirt", "blue hat", "green shoe", "warm scarf")


def picture(style: int, key: int) -> bytes:
    rng = np.random.default_rng(key)
    base = np.random.default_rng(style).integers(0, 255, (1, 1, 3))
    pixels = np.clip(base + rng.integers(-20, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def scenario() -> Scenario:
    vision = {"model": "eva02_tiny_patch14_224", "image_size": 16, "resize": "squash"}
    vision["model_args"] = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    text = {"model": "bert", "max_tokens": 8, "vocabulary_size": 64}
    text["model_args"] = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    }  # fmt: skip
    return Scenario.model_validate(
        {
            "encoders": {"width": 8, "fusion_hidden": 16, "vision": vision, "text": text},
            "csft": {
                "batch_size": 8, "steps": 8, "num_past_batches": 2, "past_warmup_steps": 3, "learning_rate": 3e-3,
                "tower_learning_rate": 3e-3, "checkpoint_every_steps": 3, "threads_per_worker": 1, "num_decoders": 0,
            },
        }
    )  # fmt: skip


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> str:
    """samples/ as the samples stage leaves it. Item i has style i % 12; item 7 has no picture, item 8 no title."""
    root = tmp_path_factory.mktemp("samples")
    ids = [f"item{i}" for i in range(NUM_ITEMS)]
    items = pa.table(
        {
            "item_id": ids,
            "title": [None if i == 8 else f"{WORDS[i % 4]} number {i}" for i in range(NUM_ITEMS)],
            "categories": [f"category{i % 3}" for i in range(NUM_ITEMS)],
            "image": [None if i == 7 else picture(i % 12, i) for i in range(NUM_ITEMS)],
            "created_at": pa.array([1_000_000] * NUM_ITEMS, TIME),
        }
    )
    write_catalogue(f"{root}/catalogue", [items.slice(0, 40), items.slice(40)])
    rng = np.random.default_rng(0)
    bought = rng.integers(0, NUM_ITEMS, NUM_PAIRS)
    pairs = pa.table(
        {
            "query_image": [None if n % 10 == 0 else picture(i % 12, 1_000 + n) for n, i in enumerate(bought)],
            "query_item_id": [f"item{(i + 12) % NUM_ITEMS}" if n % 10 == 0 else None for n, i in enumerate(bought)],
            "item_id": [ids[i] for i in bought],
            "category": [None] * NUM_PAIRS,
            "signal": ["click" if n % 5 == 0 else "purchase" for n in range(NUM_PAIRS)],
            "timestamp": pa.array(2_000_000 + np.arange(NUM_PAIRS), TIME),
            "user_id": [f"user{u}" for u in rng.integers(0, 30, NUM_PAIRS)],
            "built": [n % 10 == 0 for n in range(NUM_PAIRS)],
        }
    ).cast(INTEREST_PAIRS.schema)
    Path(f"{root}/interest_pairs").mkdir()
    pq.write_table(pairs, f"{root}/interest_pairs/part-0.parquet", row_group_size=100)
    impressions = pa.table(
        {
            "user_id": [f"user{n % 30}" for n in range(60)],
            "item_id": ids,
            "label": pa.array([int(n % 3 == 0) for n in range(60)], pa.int8()),
            "drawn": [False] * 60,
        }
    )
    Path(f"{root}/impressions/train").mkdir(parents=True)
    pq.write_table(impressions, f"{root}/impressions/train/part-0.parquet")
    Path(f"{root}/samples.json").write_text(json.dumps({"validation_start": "2020-01-01T00:00:00+00:00"}))
    return str(root)


@pytest.fixture(scope="session")
def encoder_uri(scenario: Scenario, tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("encoder"))
    tokenizer = train_tokenizer([f"{word} number {n}" for word in WORDS for n in range(60)], 64)
    ItemEncoder.build(scenario.encoders, tokenizer, 0).save(uri, stage="pretraining")
    return uri
