"""Vectors of length 1 without a copy of all of them: a block is made when it is needed, and gradients pass in place."""

from __future__ import annotations

from torch import Tensor

_SHORTEST = 1e-12  # as in torch.nn.functional.normalize: a zero vector stays zero


def inverse_lengths(vectors: Tensor) -> Tensor:
    """(n, D) -> (n, 1); `vectors * inverse_lengths(vectors)` equals normalize(vectors, dim=-1)."""
    return vectors.norm(dim=-1, keepdim=True).clamp_min_(_SHORTEST).reciprocal_()


def pass_normalize_(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of the vectors from that of their unit vectors, in its place.

    Args:
        grad: (n, D) of `unit` (n, D). inverse: (n, 1) as from `inverse_lengths`.
    """
    along = (grad * unit).sum(-1, keepdim=True)
    return grad.addcmul_(unit, along, value=-1.0).mul_(inverse)
