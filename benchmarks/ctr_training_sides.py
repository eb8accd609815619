"""The two sides of benchmarks/ctr_training.py: a training step of mim_ray and one of FuxiCTR on the same batches.

Both: item and category embeddings of width 16, deep network 512-128-64, cross-entropy, learning rate 0.005. The user behavior model
has each library's own defaults. With `equal_widths` FuxiCTR's is as wide as ours where both have the part: DIN's activation unit 36, SIM
and TWIN attend with 4 heads of 8 to 20 behaviors found, and to the newest 10.
mim_ray: lazy Adam on the rows met, fused Adam on the network. FuxiCTR, as its fit() steps: gradients of the whole tables, clipped
by their norm, and torch.optim.Adam on everything.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mim_ray.ciubm.dataset import IndexedBatch, gather_batch
from mim_ray.ciubm.model import CtrNetwork, NetworkConfig
from mim_ray.ciubm.recipe import network_config
from mim_ray.ciubm.tables import IdTables
from mim_ray.config.scenario import Ciubm
from mim_ray.training.optim import average_gradients

DIM, HIDDEN, MM_WIDTH, NUM_CATEGORIES = 16, (512, 128, 64), 128, 1_000
LEARNING_RATE = 0.005
NUM_SEARCHED, NUM_SHORT, NUM_HEADS = 20, 10, 4


@dataclass(frozen=True)
class RawBatch:
    """(B, L) behaviors, full, and (B,) targets as rows of the item table (1 and up), (B,) labels."""

    behaviors: np.ndarray
    target: np.ndarray
    label: np.ndarray


def raw_batches(num_batches: int, size: int, length: int, vocabulary: int, seed: int = 0) -> list[RawBatch]:
    """Items drawn evenly over the vocabulary: most distinct rows, the hardest for tables that move only the rows met."""
    generator = np.random.default_rng(seed)
    return [
        RawBatch(
            behaviors=generator.integers(1, vocabulary, (size, length)),
            target=generator.integers(1, vocabulary, size),
            label=(generator.random(size) < 0.3).astype(np.float32),
        )
        for _ in range(num_batches)
    ]


def category_of(item: np.ndarray) -> np.ndarray:
    return item % NUM_CATEGORIES + 1


def mm_vectors(count: int, seed: int = 0) -> np.ndarray:
    """(count, MM_WIDTH) float32 that stand for MM embeddings; which item has which does not matter here."""
    return np.random.default_rng(seed).standard_normal((count, MM_WIDTH), dtype=np.float32)


def indexed(raw: RawBatch, mm: np.ndarray | None) -> IndexedBatch:
    """As ImpressionEncoder gives it."""
    size, length = raw.behaviors.shape
    items, place = np.unique(np.concatenate([raw.target, raw.behaviors.ravel()]), return_inverse=True)
    return IndexedBatch(
        user=torch.zeros(size, dtype=torch.int64),
        item_row=torch.from_numpy(items),
        category=torch.from_numpy(category_of(items)),
        mm=None if mm is None else torch.from_numpy(mm[items % len(mm)]),
        target=torch.from_numpy(place[:size]),
        behaviors=torch.from_numpy(place[size:].reshape(size, length)),
        behavior_mask=torch.ones(size, length, dtype=torch.bool),
        label=torch.from_numpy(raw.label),
    )


def our_network(backbone: str, *, with_content: bool, hidden: tuple[int, ...] = HIDDEN) -> NetworkConfig:
    """The default recipe of this project at the benchmark's widths."""
    settings = Ciubm(id_dim=DIM, use_user_id=False, hidden=hidden, num_searched=NUM_SEARCHED, num_short=NUM_SHORT)
    return network_config(settings, backbone, MM_WIDTH if with_content else None)


class OurStep:
    """A training step as mim_ray's trainer makes it."""

    def __init__(self, backbone: str, vocabulary: int, *, with_content: bool) -> None:
        torch.manual_seed(0)
        self.network = CtrNetwork(our_network(backbone, with_content=with_content))
        self.tables = IdTables.create({"item": vocabulary, "category": NUM_CATEGORIES + 1}, DIM, seed=0)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def __call__(self, batch: IndexedBatch) -> float:
        assert batch.label is not None
        loss, _ = self.network.loss(gather_batch(batch, self.tables, train=True), batch.label)
        value = float(loss.detach())
        self.optimizer.zero_grad()
        loss.backward()
        average_gradients(self.network.parameters())
        self.optimizer.step()
        self.tables.step(LEARNING_RATE)
        return value


FuxiBatch = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]


def fuxi_batch(raw: RawBatch) -> FuxiBatch:
    """As FuxiCTR's dataloader gives it: label, then each user's behaviors and target in a row, then the mask."""
    items = np.concatenate([raw.behaviors, raw.target[:, None]], axis=1).ravel()
    features = {"item_id": torch.from_numpy(items), "cate_id": torch.from_numpy(category_of(items))}
    return {"label": torch.from_numpy(raw.label)}, features, torch.ones(raw.behaviors.shape)


def fuxi_step(backbone: str, vocabulary: int, *, equal_widths: bool = False) -> Callable[[FuxiBatch], float]:
    """FuxiCTR's model of that name with its own train_step.

    Raises:
        ImportError: it is not installed.
    """
    from fuxictr.features import FeatureMap

    logging.getLogger().setLevel(logging.WARNING)
    name = backbone.upper()
    model_class = getattr(importlib.import_module(f"model_zoo.LongCTR.{name}.{name}"), name)
    features = FeatureMap("benchmark", ".")
    features.labels = ["label"]
    features.default_emb_dim = DIM
    for column, rows in (("item_id", vocabulary), ("cate_id", NUM_CATEGORIES + 1)):
        features.features[column] = {"type": "categorical", "source": "item", "vocab_size": rows, "padding_idx": 0}
    searching = {"attention_dim": 2 * DIM, "num_heads": NUM_HEADS, "topk": NUM_SEARCHED, "short_seq_len": NUM_SHORT + 1}
    widths = {"din": {"attention_hidden_units": [36]}, "dien": {}, "sim": searching, "twin": searching}[backbone]
    torch.manual_seed(0)
    model = model_class(
        features,
        embedding_dim=DIM,
        dnn_hidden_units=list(HIDDEN),
        learning_rate=LEARNING_RATE,
        optimizer="adam",
        loss="binary_crossentropy",
        metrics=["AUC"],
        model_root="",
        verbose=0,
        batch_norm=False,
        **(widths if equal_widths else {}),
    )
    model._max_gradient_norm, model._batch_index = 10.0, 0  # as its fit() sets them
    model.train()

    def step(batch: FuxiBatch) -> float:
        label, items, mask = batch
        return float(model.train_step((label, dict(items), mask)).detach())

    return step
