"""The tiled loss against plain logits: time, memory, gradients (paper Eq. 5 at the sizes of Section 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measuring import MEGABYTE, Step, peak_bytes, ratio, seconds_in_turn
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mim_ray.contrastive.info_nce import info_nce

TEMPERATURE = 0.07
PAPER_WORKERS, PAPER_BATCH, PAPER_PAST = 40, 1_024, 10
Loss = Callable[["Batch"], Tensor]


@dataclass(frozen=True)
class Batch:
    """Queries (N, D), fresh candidates (M, D), positives first, past ones (K', D) of length 1, and the logit scale."""

    queries: Tensor
    fresh: Tensor
    past: Tensor
    scale: Tensor

    @classmethod
    def random(
        cls, *, num_queries: int, num_fresh: int, num_past: int, width: int, seed: int, scale: float = 1 / TEMPERATURE
    ) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        return cls(
            torch.randn(num_queries, width, generator=generator).requires_grad_(),
            torch.randn(num_fresh, width, generator=generator).requires_grad_(),
            normalize(torch.randn(num_past, width, generator=generator), dim=-1),
            torch.tensor(scale).requires_grad_(),
        )

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.queries, self.fresh, self.scale

    @property
    def positive(self) -> Tensor:
        return torch.arange(len(self.queries))

    def step(self, loss: Loss) -> Step:
        """Forward and backward; the gradients of the step before are dropped first."""

        def run() -> None:
            for leaf in self.leaves:
                leaf.grad = None
            loss(self).backward()

        return run

    def double(self) -> Batch:
        """The same numbers in float64."""
        leaves = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        return Batch(leaves[0], leaves[1], self.past.double(), leaves[2])


def tiled_loss(batch: Batch) -> Tensor:
    return info_nce(batch.queries, batch.fresh, batch.positive, logit_scale=batch.scale, past=batch.past)


def dense_loss(batch: Batch) -> Tensor:
    """One plain matrix of logits and cross-entropy; the scale joins the narrow side, which saves a matrix."""
    queries = batch.scale * normalize(batch.queries, dim=-1)
    candidates = torch.cat([normalize(batch.fresh, dim=-1), batch.past])
    return cross_entropy(queries @ candidates.T, batch.positive)


def split_dense_loss(batch: Batch) -> Tensor:
    """The same with the past in a product of its own, which needs no gradient: a quarter of the multiplications less."""
    queries = batch.scale * normalize(batch.queries, dim=-1)
    logits = torch.cat([queries @ normalize(batch.fresh, dim=-1).T, queries @ batch.past.T], dim=1)
    return cross_entropy(logits, batch.positive)


def against_dense(*, num_queries: int, num_past_batches: int, width: int, budget_s: float) -> dict[str, dict[str, Any]]:
    """`time_vs_dense` and `loss_memory_vs_dense`: N queries, 2N fresh candidates, 2Nk past ones."""
    batch = Batch.random(
        num_queries=num_queries,
        num_fresh=2 * num_queries,
        num_past=2 * num_queries * num_past_batches,
        width=width,
        seed=0,
    )
    size = {"queries": num_queries, "negatives": 2 * num_queries * (num_past_batches + 1) - 1, "width": width}
    steps = [batch.step(loss) for loss in (tiled_loss, dense_loss, split_dense_loss)]
    ours, dense, split = seconds_in_turn(*steps, budget_s=budget_s)
    bytes_ours, bytes_dense, bytes_split = (peak_bytes(step, batch.leaves) for step in steps)
    return {
        "time_vs_dense": ratio(ours, dense) | size,
        "time_vs_split_dense": ratio(ours, split) | size,
        "loss_memory_vs_dense": memory_ratio(bytes_ours, bytes_dense) | {"split_mb": _mb(bytes_split)} | size,
    }


def paper_size_memory(*, num_queries: int, width: int, workers: int = PAPER_WORKERS) -> dict[str, Any]:
    """`peak_loss_memory_mb_901k`: the candidates of the paper's 40 workers and 10 past batches on one of them.

    The 2NP fresh candidates need gradients, which are counted; the 2NPk past ones are kept in bf16, as C-SFT does.
    """
    num_fresh = 2 * PAPER_BATCH * workers
    batch = Batch.random(num_queries=num_queries, num_fresh=num_fresh, num_past=0, width=width, seed=1)
    past = torch.empty(num_fresh * PAPER_PAST, width, dtype=torch.bfloat16)
    units = normalize(batch.fresh.detach(), dim=-1)
    for age, part in enumerate(past.split(num_fresh), start=1):
        part.copy_(units.roll(age, dims=1))  # other vectors, without drawing 200 million numbers
    del units
    batch = Batch(batch.queries, batch.fresh, past, batch.scale)
    peak = peak_bytes(batch.step(tiled_loss), batch.leaves)
    embeddings = sum(part.numel() * part.element_size() for part in (batch.queries, batch.fresh, past))
    return {
        "value": _mb(peak),
        "negatives": num_fresh * (PAPER_PAST + 1) - 1,
        "queries": num_queries,
        "width": width,
        "embeddings_mb": _mb(embeddings),
        "of_which_fresh_gradients_mb": _mb(num_fresh * width * 4),
        "dense_logits_mb": _mb(4 * num_queries * num_fresh * (PAPER_PAST + 1)),
    }


def gradient_error(*, num_queries: int, num_past_batches: int, width: int) -> dict[str, Any]:
    """`grad_max_rel_err` of one process: against plain logits in float64, for cool, usual and hottest temperatures."""
    errors = {}
    for scale in (1.0, 1 / TEMPERATURE, 100.0):
        batch = Batch.random(
            num_queries=num_queries,
            num_fresh=2 * num_queries,
            num_past=2 * num_queries * num_past_batches,
            width=width,
            seed=3,
            scale=scale,
        )
        exact = batch.double()
        batch.step(tiled_loss)()
        exact.step(dense_loss)()
        for name, leaf, reference in zip(("queries", "candidates", "scale"), batch.leaves, exact.leaves, strict=True):
            assert leaf.grad is not None
            assert reference.grad is not None
            errors[f"{name}, logit scale {scale:.4g}"] = relative_error(leaf.grad, reference.grad)
    return {"value": max(errors.values()), "by_case": errors, "queries": num_queries, "width": width}


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest entry of the reference."""
    return float((value.double() - reference.double()).abs().max() / reference.double().abs().max())


def memory_ratio(ours: int, theirs: int) -> dict[str, Any]:
    return {"value": round(ours / theirs, 4), "mim_ray_mb": _mb(ours), "other_mb": _mb(theirs)}


def _mb(num_bytes: float) -> float:
    return round(num_bytes / MEGABYTE, 2)
