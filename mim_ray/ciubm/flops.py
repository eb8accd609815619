"""Floating-point operations of a CTR network per row, as Table 6 counts them: those of matrix products.

Every similarity and weighted sum of this package is a matrix product, so none of them hides from PyTorch's counter, which
does not see elementwise work. Lookups in tables are not computation here (paper Section 3.5, CMD).
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mim_ray.ciubm.batch import EmbeddedBatch
from mim_ray.ciubm.model import CtrNetwork


class Flops(NamedTuple):
    """Per row. `inference` is one forward; `train` is forward, auxiliary loss and backward, down to the ID embeddings."""

    train: float
    inference: float


def matrix_flops(network: CtrNetwork, batch: EmbeddedBatch, label: Tensor) -> Flops:
    """Count for `batch`, padding included, as a machine computes it; a copy of `network` does the work."""
    network, size = copy.deepcopy(network), len(label)
    with FlopCounterMode(display=False) as inference, torch.no_grad():
        network(batch)
    trained = batch._replace(
        target=batch.target.detach().requires_grad_(), behaviors=batch.behaviors.detach().requires_grad_()
    )
    with FlopCounterMode(display=False) as train:
        network.loss(trained, label)[0].backward()
    return Flops(train.get_total_flops() / size, inference.get_total_flops() / size)
