"""BatchNorm towers on several workers: one set of statistics, whatever P is.

In DDA each worker normalises with its own batch, and at the end of a phase the running statistics become those of all
workers' rows together. In DMA they are frozen (as in C-SFT): a loss that compares rows of different workers must not depend
on which rows shared a worker. So a BatchNorm tower with random weights needs steps of image DDA before DMA.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mim_ray.contrastive.gather import place, total

BatchNorm = nn.modules.batchnorm._BatchNorm


def freeze(module: nn.Module) -> None:
    """Normalise with the running statistics and leave them as they are; weights and biases still learn."""
    for _, norm in _norms(module):
        norm.eval()


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """The running statistics by name; they differ between workers while a phase trains."""
    return {
        f"{name}.{kind}": value
        for name, norm in _norms(module)
        for kind, value in norm.named_buffers(recurse=False)
        if value is not None
    }


def average(module: nn.Module) -> None:
    """A collective: mean and variance of all workers' rows in place of each worker's own."""
    num_workers = place()[1]
    if num_workers == 1:
        return
    with torch.no_grad():
        for _, norm in _norms(module):
            mean, var = norm.running_mean, norm.running_var
            if mean is None or var is None:
                continue
            sums = total(torch.stack([mean, var + mean**2]).double()) / num_workers  # E[x], E[x^2]
            mean.copy_(sums[0])
            var.copy_((sums[1] - sums[0] ** 2).clamp(min=0.0))


def _norms(module: nn.Module) -> Iterator[tuple[str, BatchNorm]]:
    for name, part in module.named_modules():
        if isinstance(part, BatchNorm):
            yield name, part
