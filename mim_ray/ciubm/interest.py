"""Content interest: paper Section 3.4, Eqs. 7-8, and what may stand beside them.

Pure functions of embedded tensors. MM embeddings are frozen inputs. An item without content has the zero vector; its
cosine to anything is 0, so it adds nothing to Eqs. 7 and 8. It is no evidence of unlikeness either: `comparable` says
which behaviors can be compared, and only those enter the histogram and the summary.

Behaviors, with their mask, may be one row for all B targets, (1, L, D): the candidates of a ranking request.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Norm = Literal["sum", "mean", "log"]
_HALF_LIFE = 10.0


def content_relevance(target: Tensor, behaviors: Tensor, behavior_mask: Tensor) -> Tensor:
    """How alike each past item and the target are in content: a^MM of paper Eq. 7.

    Args:
        target: (B, D) MM embedding of the item to score.
        behaviors: (B, L, D) MM embeddings of past items; padded rows may hold anything finite.
        behavior_mask: (B, L) bool, True for real items.

    Returns:
        (B, L) cosine in [-1, 1]; 0 where masked, and where either item has no content (zero vector).
    """
    return relevance_and_comparable(target, behaviors, behavior_mask)[0]


def relevance_and_comparable(target: Tensor, behaviors: Tensor, behavior_mask: Tensor) -> tuple[Tensor, Tensor]:
    """content_relevance, and (B, L) True for real behaviors that have content, as has the target."""
    target_length = torch.linalg.vector_norm(target, dim=-1, keepdim=True)  # (B, 1)
    lengths = torch.linalg.vector_norm(behaviors, dim=-1)  # (B, L), or (1, L)
    usable = behavior_mask & (lengths > 0)
    comparable = usable & (target_length > 0)
    if len(behaviors) == 1:  # few vectors: divided before they are multiplied, and zeros stay zeros
        scale = usable / lengths.clamp_min(1e-12)
        cosine = (target / target_length.clamp_min(1e-12)) @ (behaviors[0] * scale.t()).t()
        return cosine, comparable
    dots = torch.bmm(target.unsqueeze(1), behaviors.transpose(1, 2)).squeeze(1)  # this order is the faster one
    return (dots / (lengths * target_length).clamp_min(1e-12)).masked_fill(~comparable, 0.0), comparable


def content_interest(relevance: Tensor, behaviors: Tensor, counted: Tensor, norm: Norm = "sum") -> Tensor:
    """Weigh the user's past content by its likeness to the target: h_B^MM of paper Eq. 7.

    Args:
        relevance: (B, L) from content_relevance.
        behaviors: (B, L, D) MM embeddings.
        counted: (B, L) bool, the behaviors that a norm counts: all real ones, or the comparable ones.
        norm: "sum" as the paper writes it; "mean" divides by the number counted, "log" by the logarithm of 1 + it.

    Returns:
        (B, D); all zeros without behaviors.

    Departs from the paper: masking (the paper assumes that every user has l behaviors) and the choice of a norm.
    """
    return _weighted_sum(relevance, behaviors, counted, norm)


def fusion_interest(relevance: Tensor, id_behaviors: Tensor, counted: Tensor, norm: Norm = "sum") -> Tensor:
    """Weigh the user's past item IDs by the likeness of their content to the target's: h_B^Fusion of paper Eq. 8.

    Args:
        relevance: (B, L) from content_relevance.
        id_behaviors: (B, L, d) ID embeddings.
        counted, norm: as in content_interest.

    Returns:
        (B, d); all zeros without behaviors.
    """
    return _weighted_sum(relevance, id_behaviors, counted, norm)


def similarity_histogram(relevance: Tensor, comparable: Tensor, num_bins: int) -> Tensor:
    """Count the behaviors in each range of likeness to the target (SimTier, of MUSE, arXiv 2512.07216).

    Weighted sums of vectors (Eqs. 7, 8) hide how many past items were how alike; these counts say it.

    Args:
        relevance: (B, L) cosine in [-1, 1].
        comparable: (B, L) bool, True for real behaviors that have content, as has the target.
        num_bins: bin centres lie evenly over [-1, 1], the outer two on its ends.

    Returns:
        (B, num_bins) log(1 + count). A cosine between two centres is shared between their bins in proportion.

    Departs from MUSE (22 bins of width 0.1, log(1 + count) times a learnt scalar per bin): 21 bins are the default, as
    far apart; shared counts instead of hard edges, so that a small change of a cosine changes little; no scalar, which the
    network's first layer has anyway; pads and items without content are not counted (in MUSE's code pads take part).
    """
    position = (relevance.clamp(-1.0, 1.0) + 1.0) * (0.5 * (num_bins - 1))  # in [0, num_bins - 1]
    lower = position.long().clamp_max(num_bins - 2)
    weight = comparable.to(relevance.dtype)
    upper_share = (position - lower) * weight
    counts = relevance.new_ones(relevance.shape[0], num_bins)
    counts.scatter_add_(1, lower, weight - upper_share)
    counts[:, 1:].scatter_add_(1, lower, upper_share)
    return counts.log()  # log1p takes eight times as long


def similarity_summary(relevance: Tensor, comparable: Tensor) -> Tensor:
    """The likeness of the history to the target in three numbers, the first being the model-free row of evaluations.

    Args:
        relevance: (B, L) cosine, oldest behavior first.
        comparable: (B, L) bool.

    Returns:
        (B, 3): mean, largest and recency-weighted mean cosine of the comparable behaviors; a comparable behavior that is
        ten of them older weighs half. Zeros without any.
    """
    weight = comparable.to(relevance.dtype)
    count = weight.sum(dim=1)
    mean = (relevance * weight).sum(dim=1) / count.clamp_min(1.0)
    largest = relevance.masked_fill(~comparable, -2.0).amax(dim=1).masked_fill(count == 0, 0.0)
    newer = count.unsqueeze(1) - weight.cumsum(dim=1)  # comparable behaviors that came later
    decayed = weight * torch.exp2(-newer / _HALF_LIFE)
    recent = (relevance * decayed).sum(dim=1) / decayed.sum(dim=1).clamp_min(1e-6)
    return torch.stack([mean, largest, recent], dim=1)


def _weighted_sum(relevance: Tensor, vectors: Tensor, counted: Tensor, norm: Norm) -> Tensor:
    if len(vectors) == 1:
        total = relevance @ vectors[0]  # (B, D)
    else:
        total = torch.bmm(relevance.unsqueeze(1), vectors).squeeze(1)
    if norm == "sum":
        return total
    count = counted.sum(dim=1, keepdim=True).to(total.dtype)
    return total / (count.clamp_min(1.0) if norm == "mean" else (1.0 + count).log().clamp_min(1e-6))
