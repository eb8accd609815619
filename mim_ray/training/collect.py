"""Small results of all workers on every worker: sums of counts, and vectors one after the other. Collective."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mim_ray.training.run import world_size


def summed(counts: dict[str, int]) -> dict[str, int]:
    """Sums over all workers of counts that have the same names on each."""
    if world_size() == 1 or not counts:
        return counts
    values = torch.tensor(list(counts.values()))
    dist.all_reduce(values)
    return dict(zip(counts, values.tolist(), strict=True))


def joined(values: Tensor) -> Tensor:
    """The 1-D tensors of all workers, one after the other."""
    if world_size() == 1:
        return values
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(values)]))
    longest = max(int(size) for size in sizes)
    padded = [torch.zeros(longest, dtype=values.dtype) for _ in sizes]
    dist.all_gather(padded, torch.nn.functional.pad(values, (0, longest - len(values))))
    return torch.cat([part[: int(size)] for part, size in zip(padded, sizes, strict=True)])
