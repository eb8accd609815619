"""Small results of all workers on every worker: sums of counts, and vectors one after the other. Collective."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def collective_device() -> torch.device:
    """Where tensors of this process group's collectives must be."""
    on_gpu = _num_workers() > 1 and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def summed(counts: dict[str, int]) -> dict[str, int]:
    """Sums over all workers of counts that have the same names on each."""
    if _num_workers() == 1 or not counts:
        return counts
    values = torch.tensor(list(counts.values()), device=collective_device())
    dist.all_reduce(values)
    return dict(zip(counts, values.tolist(), strict=True))


def joined(values: Tensor) -> Tensor:
    """The 1-D tensors of all workers, one after the other, on the CPU."""
    if _num_workers() == 1:
        return values.cpu()
    values = values.to(collective_device())
    sizes = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(_num_workers())]
    dist.all_gather(sizes, torch.tensor([len(values)], device=values.device))
    longest = max(int(size) for size in sizes)
    padded = [values.new_zeros(longest) for _ in sizes]
    dist.all_gather(padded, torch.nn.functional.pad(values, (0, longest - len(values))))
    return torch.cat([part[: int(size)] for part, size in zip(padded, sizes, strict=True)]).cpu()


def _num_workers() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
