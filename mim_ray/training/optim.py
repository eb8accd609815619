"""What every stage's optimisation shares: parameter groups, the learning rate's course, averaging over workers, NaN."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mim_ray.errors import NonFiniteLossError


def parameter_groups(
    parameters: nn.Module | Iterable[nn.Parameter], learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups for an optimizer: matrices with weight decay; vectors and scalars (biases, norms, temperatures) without.

    Join the lists of several calls to give parts of a model their own learning rates. Frozen parameters are left out.
    """
    source = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    trained = [parameter for parameter in source if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "lr": learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def warmup_cosine(step: int, total: int, warmup_ratio: float) -> float:
    """Factor of the learning rate at `step` of `total`: a linear rise over the warm-up, then half a cosine down to 0."""
    warmup = warmup_ratio * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup))))


def check_finite(loss: Tensor | float, step: int, name: str = "loss") -> float:
    """The loss as a number. Call before the optimizer moves.

    Raises:
        NonFiniteLossError: it is NaN or infinite.
    """
    value = float(loss.detach()) if isinstance(loss, Tensor) else loss
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"The {name} is {value} at step {step}; the optimizer did not move. Lower the learning rate or raise the "
            "temperature of this stage, or look for extreme values in its input."
        )
    return value


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the workers, in one collective per dtype; does nothing without a group.

    A parameter without a gradient counts as zero where another worker has one, and keeps None where nobody has.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    has = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
    dist.all_reduce(has)
    used = [parameter for parameter, count in zip(trained, has.tolist(), strict=True) if count]
    for dtype in sorted({parameter.dtype for parameter in used}, key=str):
        group = [parameter for parameter in used if parameter.dtype == dtype]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in group])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        start = 0
        for parameter in group:
            parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
