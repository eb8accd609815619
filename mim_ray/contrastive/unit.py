"""Vectors of length 1 without a copy of all of them: a block is made when it is needed, and gradients pass in place."""

from __future__ import annotations

import torch
from torch import Tensor

_SHORTEST = 1e-12  # as in torch.nn.functional.normalize: a zero vector stays zero


def inverse_lengths(vectors: Tensor) -> Tensor:
    """(n, D) -> (n, 1); `vectors * inverse_lengths(vectors)` equals normalize(vectors, dim=-1)."""
    return vectors.norm(dim=-1, keepdim=True).clamp_min_(_SHORTEST).reciprocal_()


def pass_normalize_(grad: Tensor, vectors: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of the vectors from that of their unit vectors u, in its place: (g − u (u·g)) / length.

    Args:
        grad: (n, D) of the unit vectors. vectors: (n, D). inverse: (n, 1) as from `inverse_lengths`.
    """
    along = torch.bmm(grad.unsqueeze(1), vectors.unsqueeze(2)).squeeze(2)  # (n, 1); a product and sum would copy
    return grad.addcmul_(vectors, along.mul_(inverse).mul_(inverse), value=-1.0).mul_(inverse)
