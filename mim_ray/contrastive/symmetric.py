"""CLIP's symmetric loss over all workers (DMA): each image against all titles and each title against all images.

Here every candidate is fresh, so tiles are rows of the logits instead of columns: a tile of queries sees all its
candidates at once, its softmax is final, and one pass leaves the loss and all gradients,

    ∂L/∂q_i = s/B·(Σ_j p_ij c_j − c_i+)        ∂L/∂c_j = s/B·Σ_i (p_ij − [j = i+]) q_i

three products per tile, as many as plain logits need, without keeping logits. The backward pass scales what is there and
sums the candidates' share over the workers.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mim_ray.contrastive.gather import place
from mim_ray.contrastive.unit import inverse_lengths, pass_normalize_

_TILE_NUMBERS = {"cpu": 2**18, "cuda": 2**24}  # of one tile of logits: 1 MB stays in a cache, 64 MB fill a GPU
_LEAST_ROWS = 64


def symmetric_info_nce(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, mask: Tensor | None = None, tile: int | None = None
) -> Tensor:
    """The mean of image-to-text and text-to-image loss, over this worker's rows. A collective, its backward pass too.

    Args:
        image, text: (B, D) of this worker, of any length; row i of one belongs to row i of the other. Every worker brings
            the same B.
        mask: what is no negative, bool (B, P·B) or int64 (2, n) pairs as in `info_nce`, over the P·B gathered rows, used
            in both directions (row i stands for image i and title i).
        tile: queries handled at once; chosen from P·B by default.
    """
    _, num_workers = place()
    numbers = _TILE_NUMBERS.get(image.device.type, _TILE_NUMBERS["cpu"])
    tile = tile or max(_LEAST_ROWS, numbers // max(1, num_workers * len(image)))
    scale = logit_scale.float()
    loss: Tensor = _Symmetric.apply(image.float(), text.float(), scale, mask, tile, torch.is_grad_enabled())
    return loss


class _Symmetric(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, mask: Tensor | None, tile: int, with_grad: bool
    ) -> Tensor:
        rank, num_workers = place()
        sides = (image, text)
        inverse = [inverse_lengths(side) for side in sides]
        size = (num_workers * len(image), image.shape[1]) if with_grad else (0, 0)
        grads = [image.new_zeros(size) for _ in sides]  # of all workers' unit vectors, as this worker's loss asks
        hidden = None if mask is None else _pairs_by_tile(mask, len(image), rank, tile)
        sums = scale.new_zeros(2)  # of the losses, of the scale's gradient
        everyone = image.new_empty((num_workers * len(image), image.shape[1]))  # one buffer for both directions
        for this, other in ((0, 1), (1, 0)):
            _gather_units(sides[other], inverse[other], everyone)
            sums += _one_direction(
                sides[this], inverse[this], everyone, scale, hidden, tile, grads[this], grads[other], with_grad
            )
        count = 2 * len(image)
        ctx.save_for_backward(image, text, *inverse, *grads, sums[1] / count)
        return sums[0] / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, text, image_inverse, text_inverse, image_grad, text_grad, scale_grad = ctx.saved_tensors
        buffer = torch.empty_like(image_grad)  # one for both: gloo's threads may hold it a little longer than the call
        return (
            _home(image_grad, grad, image, image_inverse, buffer),
            _home(text_grad, grad, text, text_inverse, buffer),
            grad * scale_grad,
            None,
            None,
            None,
        )


def _one_direction(
    queries: Tensor,
    inverse: Tensor,
    candidates: Tensor,
    scale: Tensor,
    hidden: list[tuple[Tensor, Tensor]] | None,
    tile: int,
    grad_queries: Tensor,
    grad_candidates: Tensor,
    with_grad: bool,
) -> Tensor:
    """(2,) sums over the queries of their losses and of ∂loss/∂scale; adds to both gradients (P·B, D), those of the
    halved mean of this worker."""
    num_queries = len(queries)
    first = place()[0] * num_queries
    sums = scale.new_zeros(2)
    buffer = queries.new_empty(min(tile, num_queries), len(candidates))
    for start in range(0, num_queries, tile):
        stop = min(start + tile, num_queries)
        units = queries[start:stop] * inverse[start:stop]  # (b, D)
        own = candidates[first + start : first + stop]
        logits = torch.mm(units * scale, candidates.T, out=buffer[: stop - start])  # (b, P·B)
        positive = logits.diagonal(first + start).clone()
        if hidden is not None:
            rows, columns = hidden[start // tile]
            logits[rows, columns] = -torch.inf
        top = logits.amax(1, keepdim=True)
        total = logits.sub_(top).exp_().sum(1, keepdim=True)
        sums[0] += (total.log() + top).sum() - positive.sum()
        if not with_grad:
            continue
        pull = torch.mm(logits, candidates).div_(total).sub_(own)  # (b, D): from the positive to the mean candidate
        sums[1] += (units * pull).sum()
        rate = scale / (2 * num_queries)
        grad_queries[first + start : first + stop].addcmul_(pull, rate)
        grad_candidates.addmm_(logits.T, units * (rate / total))
        grad_candidates[first + start : first + stop].addcmul_(units, rate, value=-1.0)
    return sums


def _gather_units(vectors: Tensor, inverse: Tensor, everyone: Tensor) -> None:
    """(B, D) of each worker -> all of them at length 1, into `everyone` (P·B, D)."""
    rank, num_workers = place()
    parts = everyone.split(len(vectors))
    torch.mul(vectors, inverse, out=parts[rank])
    if num_workers == 1:
        return
    if dist.get_backend() == "nccl":
        dist.all_gather_into_tensor(everyone, parts[rank])
        return
    for worker in range(num_workers):  # gloo gathers through a second buffer as large, and broadcasts in place
        dist.broadcast(parts[worker], src=worker)


def _home(grads: Tensor, scale: Tensor, vectors: Tensor, inverse: Tensor, buffer: Tensor) -> Tensor:
    """This worker's (B, D) part in the sum of what all workers ask, (P·B, D) on each, as the gradient of its vectors."""
    rank, num_workers = place()
    torch.mul(grads, scale, out=buffer)
    if num_workers > 1 and dist.get_backend() == "nccl":
        own = torch.empty_like(vectors)
        dist.reduce_scatter_tensor(own, buffer)
    else:
        if num_workers > 1:
            dist.all_reduce(buffer)
        own = buffer.narrow(0, rank * len(vectors), len(vectors)).clone()
    return pass_normalize_(own, vectors, inverse)


def _pairs_by_tile(mask: Tensor, num_queries: int, rank: int, tile: int) -> list[tuple[Tensor, Tensor]]:
    """For each tile: rows within it and columns to hide. A positive is never among them."""
    rows, columns = mask.nonzero().unbind(1) if mask.dtype == torch.bool else mask.unbind(0)
    keep = columns != rows + rank * num_queries
    rows, columns = rows[keep], columns[keep]
    order = torch.argsort(rows)
    rows, columns = rows[order], columns[order]
    edges = torch.tensor([*range(0, num_queries, tile), num_queries], device=rows.device)
    cuts = torch.searchsorted(rows, edges).tolist()  # one wait for a GPU
    return [
        (rows[low:high] - number * tile, columns[low:high])
        for number, (low, high) in enumerate(itertools.pairwise(cuts))
    ]
