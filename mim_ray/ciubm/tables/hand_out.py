"""Items' embeddings handed out to a batch's targets and behaviors, with a backward that sums each item's gradients.

torch's own backward of a lookup adds row after row into the whole; here places are sorted and each item's rows summed by one
embedding_bag, several times faster on CPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, embedding_bag


def hand_out(items: Tensor, target: Tensor, behaviors: Tensor) -> tuple[Tensor, Tensor]:
    """(U, d) items, (B,) and (B, L) places among them -> (B, d) and (B, L, d).

    The gradient of an item is the sum over its places, in their order: equal input gives equal bits.
    """
    of_target, of_behaviors = _HandOut.apply(items, target, behaviors)
    return of_target, of_behaviors


class _HandOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, items: Tensor, target: Tensor, behaviors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(target, behaviors)
        ctx.num_items = len(items)
        return embedding(target, items), embedding(behaviors, items)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        target, behaviors = ctx.saved_tensors
        of_target, of_behaviors = gradients
        width = of_target.shape[1]
        order = torch.sort(behaviors.flatten(), stable=True)[1]
        counts = torch.bincount(behaviors.flatten(), minlength=ctx.num_items)
        starts = counts.cumsum(0).sub_(counts)
        summed = embedding_bag(order, of_behaviors.reshape(-1, width), starts, mode="sum")  # (U, d), 0 of no place
        return summed.index_add_(0, target, of_target), None, None
