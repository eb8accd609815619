"""Other packages' losses beside ours, at the same number of negatives and on the same numbers.

pytorch-metric-learning keeps past embeddings (`CrossBatchMemory`) and, as its memory is detached, gives no gradient to
candidates; ours is then asked for none either. Its NT-Xent builds a table of positive pairs × negative pairs, that is
queries² × negatives: 94 GB at 1,024 queries and 22,527 negatives, so it is measured at fewer queries. With one positive for
each query its SupCon loss is the same formula on a plain matrix; that is the better setting and is measured in full.

sentence-transformers' cached loss has no past: all candidates are fresh and get gradients, here 22 for each query, ours too.
Its encoder is the identity, so that the loss is timed and no model; of several mini-batch sizes the fastest one counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from contrastive_cases import TEMPERATURE, Batch, memory_ratio, tiled_loss
from measuring import peak_bytes, ratio, seconds_in_turn, seconds_of
from torch import Tensor, nn

from mim_ray.contrastive.info_nce import info_nce

MINI_BATCHES = (128, 1_024)
LossStep = Callable[[], Tensor]


def pytorch_metric_learning(
    *, num_queries: int, few_queries: int, num_past_batches: int, width: int, budget_s: float
) -> dict[str, Any]:
    """NT-Xent (at `few_queries`) and SupCon, both behind a cross-batch memory that holds 2N(k+1) candidates.

    Raises:
        ImportError: the package is missing.
    """
    from pytorch_metric_learning.losses import CrossBatchMemory, NTXentLoss, SupConLoss

    num_candidates = 2 * num_queries * (num_past_batches + 1)
    found: dict[str, Any] = {}
    for name, loss, queries in (
        ("ntxent", NTXentLoss(temperature=TEMPERATURE), few_queries),
        ("supcon", SupConLoss(temperature=TEMPERATURE), num_queries),
    ):
        batch = Batch.random(
            num_queries=queries, num_fresh=2 * queries, num_past=num_candidates - 2 * queries, width=width, seed=4
        )
        memory = CrossBatchMemory(loss, embedding_size=width, memory_size=num_candidates)
        theirs, ours = _cross_batch_step(batch, memory), _queries_only_step(batch)
        difference = abs(float(ours()) - float(theirs()))  # and the warm-up
        seconds = seconds_in_turn(ours, theirs, budget_s=budget_s / 2, least=2, warm_up=False)
        found[name] = {
            "queries": queries,
            "negatives": num_candidates - 1,
            "width": width,
            "time": ratio(*seconds),
            "memory": memory_ratio(*(peak_bytes(step, batch.leaves) for step in (ours, theirs))),
            "loss_difference": difference,
        }
    return found


def sentence_transformers(
    *, num_queries: int, candidates_per_query: int, width: int, budget_s: float
) -> dict[str, Any]:
    """`CachedMultipleNegativesRankingLoss` with hard negatives: (1 + candidates_per_query) columns of N texts.

    Raises:
        ImportError: the package is missing.
    """
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    num_candidates = num_queries * candidates_per_query
    batch = Batch.random(num_queries=num_queries, num_fresh=num_candidates, num_past=0, width=width, seed=5)
    steps = {
        size: _cached_step(
            batch, CachedMultipleNegativesRankingLoss(_Identity(), 1 / TEMPERATURE, mini_batch_size=size)
        )
        for size in MINI_BATCHES
    }
    tried = {size: seconds_of(step) for size, step in steps.items()}
    best = min(tried, key=tried.__getitem__)
    ours = batch.step(tiled_loss)
    with torch.no_grad():
        difference = abs(float(tiled_loss(batch)) - float(steps[best]()))
    seconds = seconds_in_turn(ours, steps[best], budget_s=budget_s, least=2, warm_up=False)
    leanest = min(peak_bytes(step, batch.leaves) for step in steps.values())
    return {
        "queries": num_queries,
        "negatives": num_candidates - 1,
        "width": width,
        "mini_batch_size": best,
        "seconds_by_mini_batch_size": {str(size): round(second, 4) for size, second in tried.items()},
        "time": ratio(*seconds),
        "memory": memory_ratio(peak_bytes(ours, batch.leaves), leanest) | {"other_mini_batch_size": "the leaner one"},
        "loss_difference": difference,
    }


def _cross_batch_step(batch: Batch, memory: nn.Module) -> LossStep:
    """Queries against the memory, into which this batch's candidates went just before; query i's item has its label."""
    num_queries, num_fresh = len(batch.queries), len(batch.fresh)
    num_candidates = num_fresh + len(batch.past)
    memory.embedding_memory[num_fresh:] = batch.past
    memory.label_memory[num_fresh:] = torch.arange(num_fresh, num_candidates)
    memory.has_been_filled = True
    labels = torch.cat([torch.arange(num_queries), torch.arange(num_fresh)])
    is_candidate = torch.arange(num_queries + num_fresh) >= num_queries

    def run() -> Tensor:
        batch.queries.grad = None
        memory.queue_idx = 0
        embeddings = torch.cat([batch.queries, batch.fresh.detach()])
        loss: Tensor = memory(embeddings, labels, enqueue_mask=is_candidate)
        loss.backward()
        return loss.detach()

    return run


def _queries_only_step(batch: Batch) -> LossStep:
    scale, fresh = batch.scale.detach(), batch.fresh.detach()

    def run() -> Tensor:
        batch.queries.grad = None
        loss = info_nce(batch.queries, fresh, batch.positive, logit_scale=scale, past=batch.past)
        loss.backward()
        return loss.detach()

    return run


class _Identity(nn.Module):
    """Stands for the model: its features are embeddings already."""

    def __getitem__(self, index: int) -> nn.Module:
        return self

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["embedding"]}


def _cached_step(batch: Batch, loss: nn.Module) -> LossStep:
    columns = [batch.queries, *batch.fresh.split(len(batch.queries))]

    def run() -> Tensor:
        batch.queries.grad = batch.fresh.grad = None
        value: Tensor = loss([{"embedding": column} for column in columns], None)
        if value.requires_grad:
            value.backward()
        return value.detach()

    return run
