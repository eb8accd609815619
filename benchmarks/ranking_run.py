"""What benchmarks/ranking.py serves, written as a real run leaves it but without training; and what it asks for.

Random embeddings of the paper's shape, an untrained DIN (with content and without) of real size, behaviors of users: how long
a ranking takes does not depend on what was learnt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ranking_servers import scenario_of

from mim_ray import artifacts
from mim_ray.ciubm.export import save_model
from mim_ray.ciubm.features import Features
from mim_ray.ciubm.model import CtrNetwork
from mim_ray.ciubm.recipe import network_config
from mim_ray.ciubm.tables import IdTables
from mim_ray.ciubm.vocabulary import ItemIndex, Vocabulary
from mim_ray.config import Scenario
from mim_ray.config.scenario import Encoders
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import segment_rows
from mim_ray.training.checkpoint import with_prefix

START = datetime(2026, 1, 1, tzinfo=UTC)
NUM_CATEGORIES = 50
MODELS = ("din-base", "din-mim")


@dataclass(frozen=True)
class Shop:
    """Sizes. The CTR models know all items and users by id.

    Attributes:
        lengths: for each, `num_users` users with as many past items.
    """

    num_items: int = 20_000
    num_users: int = 500
    lengths: tuple[int, ...] = (50,)
    width: int = 128


def make_run(folder: Path, shop: Shop) -> None:
    """Write the run of `scenario_of(folder)`: encoder, table, snapshot, behaviors and both models."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shop.json").write_text(json.dumps({"width": shop.width, "lengths": shop.lengths}))
    scenario = scenario_of(folder)
    root = folder / "run"
    version = _save_encoder(scenario.encoders, root / "csft" / "encoder")
    random = np.random.default_rng(0)
    ids = item_ids(np.arange(shop.num_items))
    snapshot = _write_embeddings(root, ids, version, shop.width, random)
    (root / "samples" / "behaviors").mkdir(parents=True)
    users = [user_id(length, number) for length in shop.lengths for number in range(shop.num_users)]
    rows = [random.integers(0, shop.num_items, length) for length in shop.lengths for _ in range(shop.num_users)]
    times = [[START - timedelta(minutes=5 * (len(items) - place)) for place in range(len(items))] for items in rows]
    behaviors = {"user_id": users, "behaviors": [item_ids(items) for items in rows], "behavior_times": times}
    pq.write_table(pa.table(behaviors), root / "samples" / "behaviors" / "part-0.parquet")
    for variant in MODELS:
        _write_model(root / "ctr" / variant, scenario, ids, users, version, snapshot, random)


def item_ids(numbers: np.ndarray) -> list[str]:
    return [f"item-{number:07d}" for number in numbers.tolist()]


def user_id(length: int, number: int) -> str:
    return f"user-{length}-{number}"


def log_of_requests(shop: Shop, *, num: int, candidates: int, length: int, seed: int) -> list[str]:
    """`num` requests in time order, each a JSON object without its first brace, so that a time can be put in front of it."""
    random = np.random.default_rng(seed)
    return [
        json.dumps(
            {
                "user_id": user_id(length, int(random.integers(shop.num_users))),
                "candidates": item_ids(random.choice(shop.num_items, candidates, replace=False)),
            }
        )[1:]
        for _ in range(num)
    ]


def _save_encoder(encoders: Encoders, folder: Path) -> str:
    from mim_ray.encoders.item_encoder import ItemEncoder
    from mim_ray.encoders.tokenizer import train_tokenizer

    titles = [f"thing {row}" for row in range(200)]
    ItemEncoder.build(encoders, train_tokenizer(titles, 200), seed=0).save(str(folder), stage="csft")
    version = ItemEncoder.load(str(folder)).encoder_version
    assert version is not None
    return version


def _write_embeddings(root: Path, ids: list[str], version: str, width: int, random: np.random.Generator) -> str:
    vectors = random.normal(size=(len(ids), width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = EmbeddingTable(f"{root}/center/table").create()
    hashes = [f"{row:032x}" for row in range(len(ids))]
    rows = segment_rows(ids, vectors, content_hashes=hashes, content_at=[START] * len(ids))
    table.append(rows, encoder_version=version, shard_id="s0")
    snapshot = f"{root}/center/snapshots/{version}"
    build_snapshot(table, version, snapshot)
    metrics = {"snapshot": snapshot, "encoder_version": version}
    manifest = artifacts.Manifest("extraction", "f", artifacts.now(), 1.0, {}, metrics, (), {}, {})
    artifacts.write_manifest(f"{root}/extraction", manifest)
    return snapshot


def _write_model(
    folder: Path,
    scenario: Scenario,
    ids: list[str],
    user_ids: list[str],
    version: str,
    snapshot: str,
    random: np.random.Generator,
) -> None:
    settings, content = scenario.ciubm, folder.name.endswith("-mim")
    categories = tuple(f"category {number}" for number in range(NUM_CATEGORIES))
    counts = np.full(len(ids), 5)
    items = ItemIndex.build(pa.array(ids), random.integers(0, NUM_CATEGORIES, len(ids)), categories, counts, 1)
    users = Vocabulary(pa.array(sorted(user_ids)))
    items.save(f"{folder}/vocabulary")
    users.save(f"{folder}/vocabulary/users.arrow")
    Features().save(f"{folder}/vocabulary")
    torch.manual_seed(0)
    config = network_config(settings, "din", scenario.encoders.width if content else None)
    num_rows = {"item": items.num_table_rows, "category": items.num_category_rows, "user": len(users) + 1}
    tables = IdTables.create(num_rows, settings.id_dim, seed=0)
    state = with_prefix("network", CtrNetwork(config).state_dict()) | with_prefix("tables", tables.state())
    save_model(f"{folder}/seed-0", state)
    info: dict[str, Any] = {
        "variant": folder.name,
        "backbone": "din",
        "content": "mim" if content else None,
        "encoder_version": version if content else None,
        "snapshot": snapshot if content else None,
        "network": config.to_json(),
        "max_behaviors": settings.max_behaviors,
        "id_dim": settings.id_dim,
        "seeds": [0],
        "metrics": {},
    }
    artifacts.write_json(f"{folder}/ctr.json", info)
