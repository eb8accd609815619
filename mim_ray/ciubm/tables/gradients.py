"""Gradients of met rows: each row once, and the mean over the workers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import embedding_bag, pad


def summed_by_row(rows: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) rows with repetitions and (n, width) -> (U,) distinct ascending rows and (U, width) sums.

    Sums are taken in the order of `rows`, so that equal input gives equal bits. Rows that come ascending save the sort, distinct ones the sums.
    """
    if bool((rows[1:] > rows[:-1]).all()):
        return rows, gradients
    order = None
    if bool((rows[1:] < rows[:-1]).any()):
        rows, order = torch.sort(rows, stable=True)
    distinct, counts = torch.unique_consecutive(rows, return_counts=True)
    if order is not None and len(distinct) == len(rows):
        return distinct, gradients.index_select(0, order)
    if order is None:
        order = torch.arange(len(rows), device=rows.device)
    return distinct, embedding_bag(order, gradients, counts.cumsum(0).sub_(counts), mode="sum")


def averaged_over_workers(rows: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Each worker's distinct rows -> all workers' distinct rows and their gradients' sums, divided by P (as DDP
    averages). Equal on all workers to the bit: all sum the same numbers in the order of ranks. Collective.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows, gradients
    world = dist.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    lengths = [int(size) for size in sizes]
    missing = max(lengths) - len(rows)
    all_rows = [rows.new_zeros(max(lengths)) for _ in lengths]
    all_gradients = [gradients.new_zeros(max(lengths), gradients.shape[1]) for _ in lengths]
    dist.all_gather(all_rows, pad(rows, (0, missing)))
    dist.all_gather(all_gradients, pad(gradients, (0, 0, 0, missing)))
    joined = torch.cat([part[:length] for part, length in zip(all_rows, lengths, strict=True)])
    total = torch.cat([part[:length] for part, length in zip(all_gradients, lengths, strict=True)])
    distinct, summed = summed_by_row(joined, total)
    return distinct, summed / world
