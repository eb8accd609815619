"""Rows of all workers in rank order, with or without gradients. Without a process group: the rows themselves.

A loss that is a mean over local queries, whose gathered rows carry *summed* gradients home, and whose parameter gradients
are averaged over the workers, has exactly the parameter gradients of one process on the joined batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def gather_with_grad(x: Tensor) -> Tensor:
    """(B, …) of each worker -> (P·B, …). The gradient of a row is the sum of what all workers' losses ask of it.

    Every worker brings the same shape. The backward pass is a collective too: every worker must run it.
    """
    if not _distributed():
        return x
    gathered: Tensor = _Gather.apply(x)
    return gathered


def gather(x: Tensor) -> Tensor:
    """(B, …) of each worker -> (P·B, …), detached; the same on every worker."""
    x = x.detach().contiguous()
    if not _distributed():
        return x
    as_bytes = x.dtype == torch.bool
    parts = [torch.empty_like(x, dtype=torch.uint8 if as_bytes else None) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.to(torch.uint8) if as_bytes else x)
    return torch.cat(parts).to(x.dtype)


def total(x: Tensor) -> Tensor:
    """Sum of a small tensor over all workers, detached."""
    x = x.detach().clone()
    if _distributed():
        dist.all_reduce(x)
    return x


def place() -> tuple[int, int]:
    """This worker's rank and P; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.num_rows = len(x)
        return gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        if dist.get_backend() == "nccl":
            own = torch.empty_like(grad[: ctx.num_rows])
            dist.reduce_scatter_tensor(own, grad)
            return own
        dist.all_reduce(grad)
        return grad.narrow(0, dist.get_rank() * ctx.num_rows, ctx.num_rows)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
