"""FLOPs of a network, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import torch

from mim_ray.ciubm.batch import EmbeddedBatch
from mim_ray.ciubm.flops import Flops, matrix_flops
from mim_ray.ciubm.model import CtrNetwork, NetworkConfig

B, L, D, WIDTH, HIDDEN = 4, 6, 8, 10, 16
BASE = NetworkConfig("average", id_width=D, user_width=0, content_width=None, hidden=(HIDDEN,))


def _count(config: NetworkConfig) -> Flops:
    mask = torch.ones(B, L, dtype=torch.bool)
    content = {"target_mm": torch.ones(B, WIDTH), "behavior_mm": torch.ones(B, L, WIDTH)}
    batch = EmbeddedBatch(torch.ones(B, D), torch.ones(B, L, D), mask, mask, **content)
    return matrix_flops(CtrNetwork(config), batch, torch.ones(B))


def test_the_base_model_by_hand() -> None:
    pooling, deep = 2 * L * D, 2 * (D + D + 1) * HIDDEN + 2 * HIDDEN
    assert _count(BASE) == Flops(train=2 * pooling + 3 * deep, inference=pooling + deep)


def test_content_adds_similarities_two_sums_and_their_inputs() -> None:
    """Frozen content needs no backward; the fusion interest's gradient goes to the ID embeddings."""
    base, mim = _count(BASE), _count(replace(BASE, content_width=WIDTH))
    similarities = content_sum = 2 * L * WIDTH
    fusion_sum, content, fusion, count = 2 * L * D, 2 * WIDTH * HIDDEN, 2 * D * HIDDEN, 2 * HIDDEN
    assert mim.inference - base.inference == similarities + content_sum + fusion_sum + content + fusion
    frozen = 2 * content - count  # no gradient to the inputs that are content, nor to the number of behaviors
    assert mim.train - base.train == similarities + content_sum + 2 * fusion_sum + frozen + 3 * fusion
