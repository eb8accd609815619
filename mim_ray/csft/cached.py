"""Batches larger than memory, with the gradients of the whole batch (Gao et al. 2021, "GradCache").

The loss joins all pairs of a batch, the encoder does not. So: (1) embed the batch in chunks without a graph, (2) take the
loss and its gradients with respect to the embeddings, (3) embed each chunk again, now with a graph and with the same
dropout, and go on from those gradients. What a backward pass needs is held for one chunk at a time; the price is a second
forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mim_ray.csft.negatives import PastBatches
from mim_ray.csft.objective import CsftLoss, LocalBatch, Shown


def cached_backward(
    embed_chunk: Callable[[slice], LocalBatch],
    num_pairs: int,
    chunk_size: int,
    objective: Callable[[LocalBatch, PastBatches | None], CsftLoss],
    past: PastBatches | None = None,
) -> CsftLoss:
    """The loss of a batch; leaves in .grad what `objective(whole batch, past).loss.backward()` would add. A collective.

    Args:
        embed_chunk: embeds the pairs of a slice of this worker's batch: their queries and their items, positives first,
            then their hard negatives. Places of `bought` and `shown` count from the start of the slice. It is called twice
            for each slice, with the same state of torch's random numbers.
        num_pairs: N of this worker. chunk_size: pairs embedded at once. Workers may differ in it, not in N.
        objective: one of supervision.py.

    Returns:
        As from `objective`, with a detached loss. If `level_losses` are not finite, no gradient was touched, on any worker.
    """
    chunks = [slice(start, min(start + chunk_size, num_pairs)) for start in range(0, num_pairs, chunk_size)]
    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_RandomState.now())
            parts.append(embed_chunk(chunk))
    batch = _with_leaves(joined(parts))
    result = objective(batch, past)
    if not bool(result.level_losses.isfinite().all()):
        return replace(result, loss=result.loss.detach())
    result.loss.backward()
    following = _RandomState.now()
    for chunk, state, gradients in zip(chunks, states, _gradients(batch, parts), strict=True):
        state.restore()
        outputs = [tensor for tensor in _embeddings(embed_chunk(chunk)) if tensor is not None]
        trained = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if output.requires_grad and gradient is not None
        ]
        if trained:
            torch.autograd.backward([output for output, _ in trained], [gradient for _, gradient in trained])
    following.restore()
    return replace(result, loss=result.loss.detach())


def joined(parts: Sequence[LocalBatch]) -> LocalBatch:
    """Chunks as one batch: all queries, all positives, then all hard negatives, in the order of the chunks."""
    sizes = [len(part.queries) for part in parts]
    starts = [sum(sizes[:place]) for place in range(len(parts))]

    def items(tensors: Sequence[Tensor]) -> Tensor:
        positives = [tensor[:size] for tensor, size in zip(tensors, sizes, strict=True)]
        return torch.cat(positives + [tensor[size:] for tensor, size in zip(tensors, sizes, strict=True)])

    bought = [part.bought for part in parts if part.bought is not None]
    categories = [part.categories for part in parts if part.categories is not None]
    return LocalBatch(
        queries=torch.cat([part.queries for part in parts]),
        items=items([part.items for part in parts]),
        has_text=items([part.has_text for part in parts]),
        has_image=items([part.has_image for part in parts]),
        item_rows=items([part.item_rows for part in parts]),
        contents=items([part.contents for part in parts]),
        bought=(
            torch.cat([places + start for (places, _), start in zip(bought, starts, strict=True)]),
            torch.cat([rows for _, rows in bought]),
        )
        if bought
        else None,
        categories=items(categories) if categories else None,
        shown=_joined_shown(parts, starts),
    )


def _joined_shown(parts: Sequence[LocalBatch], starts: Sequence[int]) -> Shown | None:
    found = [
        replace(part.shown, queries=part.shown.queries + start)
        for part, start in zip(parts, starts, strict=True)
        if part.shown is not None
    ]
    if not found:
        return None
    names = ("queries", "items", "has_text", "has_image", "item_rows", "contents")
    return Shown(*(torch.cat([getattr(shown, name) for shown in found]) for name in names))


def _embeddings(batch: LocalBatch) -> tuple[Tensor, Tensor, Tensor | None]:
    return batch.queries, batch.items, batch.shown.items if batch.shown is not None else None


def _with_leaves(batch: LocalBatch) -> LocalBatch:
    shown = batch.shown
    if shown is not None:
        shown = replace(shown, items=shown.items.requires_grad_())
    return replace(batch, queries=batch.queries.requires_grad_(), items=batch.items.requires_grad_(), shown=shown)


def _gradients(batch: LocalBatch, parts: Sequence[LocalBatch]) -> Iterator[list[Tensor | None]]:
    """For each chunk the gradients of its `_embeddings` that are there; None for one that the loss does not use."""
    queries, items, shown = (tensor.grad if tensor is not None else None for tensor in _embeddings(batch))
    num_pairs, start, start_shown = len(batch.queries), 0, 0
    for part in parts:
        stop = start + len(part.queries)
        own = slice(start, stop)
        of_items = None
        if items is not None:
            of_items = torch.cat([items[own], items[num_pairs + start : num_pairs + stop]])
        gradients = [queries[own] if queries is not None else None, of_items]
        if part.shown is not None:
            stop_shown = start_shown + len(part.shown.queries)
            gradients.append(shown[start_shown:stop_shown] if shown is not None else None)
            start_shown = stop_shown
        yield gradients
        start = stop


class _RandomState(NamedTuple):
    """Torch's random numbers, on the CPU and on this worker's GPU."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> _RandomState:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
