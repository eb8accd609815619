"""A small set of samples whose clicks depend on content and on popularity, and a snapshot of that content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mim_ray.ciubm.export import Ranker
from mim_ray.ciubm.features import Features
from mim_ray.ciubm.model import CtrNetwork, NetworkConfig
from mim_ray.ciubm.tables import IdTables, Lookup
from mim_ray.ciubm.vocabulary import ItemIndex, Vocabulary
from mim_ray.data.catalogue import write_catalogue
from mim_ray.data.schema import TIME
from mim_ray.representation_center.snapshot import write_snapshot

NUM_ITEMS, NUM_USERS, WIDTH = 60, 40, 8
START_US = 1_700_000_000_000_000


@dataclass(frozen=True)
class SmallShop:
    """URIs of samples, snapshot and truth."""

    samples: str
    snapshot: str
    truth: str


@pytest.fixture(scope="session")
def small_shop(tmp_path_factory: pytest.TempPathFactory) -> SmallShop:
    """Clicks follow the user's taste for content."""
    return _make(tmp_path_factory.mktemp("small_shop"), content_weight=3.0)


@pytest.fixture(scope="session")
def indifferent_shop(tmp_path_factory: pytest.TempPathFactory) -> SmallShop:
    """Clicks have nothing to do with content: the negative control."""
    return _make(tmp_path_factory.mktemp("indifferent_shop"), content_weight=0.0)


def _make(root: Path, content_weight: float) -> SmallShop:
    """3,000 train, 500 validation and 800 test rows; items 50.. are in no train row, item 59 has no content."""
    generator = np.random.default_rng(0)
    level = generator.integers(0, WIDTH, NUM_ITEMS)
    likes = generator.random((NUM_USERS, WIDTH)) < 0.3
    popular = generator.normal(size=NUM_ITEMS)
    ids = [f"item-{number}" for number in range(NUM_ITEMS)]
    sizes = {"train": 3_000, "validation": 500, "test": 800}
    history: dict[int, list[str]] = {user: [] for user in range(NUM_USERS)}
    first: dict[str, list[int]] = {}
    time, probs, names = START_US, [], []
    for split, size in sizes.items():
        rows = []
        for number in range(size):
            time += 1_000_000
            user = int(generator.integers(0, NUM_USERS - (1 if split == "train" else 0)))
            item = int(generator.integers(0, 50 if split == "train" else NUM_ITEMS))
            prob = 1 / (1 + np.exp(-(content_weight * likes[user, level[item]] + 0.7 * popular[item] - 2.0)))
            label = int(generator.random() < prob)
            name = f"{split}-{number}"
            rows.append((name, f"user-{user}", time, ids[item], label, list(history[user][-12:])))
            if label:
                history[user].append(ids[item])
                if split == "train":
                    first.setdefault(ids[item], [time, 0])[1] += 1
            names.append(name)
            probs.append(prob)
        columns = list(zip(*rows, strict=True))
        table = pa.table(
            {
                "impression_id": pa.array(columns[0]),
                "user_id": pa.array(columns[1]),
                "timestamp": pa.array(columns[2], TIME),
                "item_id": pa.array(columns[3]),
                "label": pa.array(columns[4], pa.int8()),
                "behaviors": pa.array(columns[5], pa.list_(pa.string())),
            }
        )
        folder = root / "samples" / "impressions" / split
        folder.mkdir(parents=True)
        pq.write_table(table, folder / "part-00000.parquet", row_group_size=700)
    category = [f"category-{number % 5}" for number in range(NUM_ITEMS)]
    created = pa.array([START_US + number for number in range(NUM_ITEMS)], TIME)
    items = pa.table({"item_id": ids, "title": ids, "categories": category, "created_at": created})
    write_catalogue(f"{root}/samples/catalogue", [items])
    positives = {
        "item_id": list(first),
        "first_positive_at": pa.array([time for time, _ in first.values()], TIME),
        "num_train_positives": [count for _, count in first.values()],
    }
    pq.write_table(pa.table(positives), root / "samples" / "first_positive.parquet")
    pq.write_table(pa.table({"impression_id": names, "prob": probs}), root / "truth.parquet")
    matrix = np.eye(WIDTH, dtype=np.float32)[level]
    write_snapshot(f"{root}/snapshot", ids[:-1], matrix[:-1], encoder_version="test-1")
    return SmallShop(f"{root}/samples", f"{root}/snapshot", f"{root}/truth.parquet")


@pytest.fixture(scope="session")
def untrained_ranker() -> Callable[..., Ranker]:
    """(backbone, content_width=8, **options of NetworkConfig) -> a ranker with random weights, of item-0..item-59 of five
    categories and user-0..user-9. It has ages of behaviors, and a query vector where `query_width` asks for it."""

    def make(backbone: str, content_width: int | None = WIDTH, **options: Any) -> Ranker:
        ids = pa.array([f"item-{number}" for number in range(NUM_ITEMS)])
        names = [f"category-{number}" for number in range(5)]
        items = ItemIndex.build(ids, np.arange(NUM_ITEMS) % 5, names, np.full(NUM_ITEMS, 9), 1)
        users = Vocabulary(pa.array([f"user-{number}" for number in range(10)]))
        config = NetworkConfig(backbone, 16, 8, content_width, **options)
        info = {
            "variant": f"{backbone}-mim",
            "encoder_version": None if content_width is None else "test-1",
            "max_behaviors": 100,
            "network": config.to_json(),
            "queries": {"width": config.query_width, "encoder_version": "test-1"} if config.query_width else None,
        }
        num_rows = {"item": items.num_table_rows, "category": items.num_category_rows, "user": len(users) + 1}
        models: list[tuple[CtrNetwork, Lookup]] = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            network = CtrNetwork(config).eval()
            models.append((network, IdTables.create(num_rows, 8, seed=seed)))
            for _, tables in models[seed:]:
                assert isinstance(tables, IdTables)
                tables.load_state({name: 20 * weight for name, weight in tables.state().items()})
        return Ranker(info, items, users, Features(typical_age_s=3_600.0), models)

    return make
