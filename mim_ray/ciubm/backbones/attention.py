"""Target attention and what the searching models share: how to take behaviors out, and where pads go.

One query per row (the target), so neither keys nor values of single behaviors are ever computed: the key projection is
moved to the query (q K^T = (q W_k) h^T) and the value projection behind the weighted sum (Σ a (W_v h) = W_v Σ a h).
Both are exact, and cost per behavior falls from d^2 to d times the number of heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class TargetAttention(nn.Module):
    """Multi-head attention with the target as the only query.

    Args:
        width: d of the target and of the answer.
        num_heads: wanted; the largest number up to it that divides d is taken.
        key_width, value_width: e and v, how much of each behavior is key and value; default d.
        content: the scores are told of content (ContentAttention).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        key_width: int | None = None,
        value_width: int | None = None,
        content: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = next(heads for heads in range(num_heads, 0, -1) if width % heads == 0)
        self.of_target = nn.Linear(width, width, bias=False)
        self.of_key = nn.Linear(width if key_width is None else key_width, width, bias=False)
        self.of_value = nn.Linear(width if value_width is None else value_width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.content = ContentAttention(self.num_heads) if content else None

    def forward(
        self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, content: Tensor | None = None
    ) -> Tensor:
        """(B, d), (B, K, e), (B, K) bool and the cosines (B, K) -> (B, d); zeros where no behavior is real."""
        query, mask = self.query(target), behavior_mask.unsqueeze(1)
        if self.content is None:
            return self.joined(attend(query, behaviors, mask))
        scores = self.content(products(query, behaviors), content)  # (B, H, K)
        return self.joined(weighted(masked_softmax(scores, mask), behaviors))

    def weights(
        self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, content: Tensor | None = None
    ) -> Tensor:
        """What `forward` weighs behaviors by: (B, H, K), 0 where masked."""
        scores = products(self.query(target), behaviors)
        if self.content is not None:
            scores = self.content(scores, content)
        return masked_softmax(scores, behavior_mask.unsqueeze(1))

    def query(self, target: Tensor) -> Tensor:
        """(B, H, e): its inner product with a behavior is the scaled one of the head's query and key."""
        size = target.shape[1] // self.num_heads
        query = self.of_target(target).view(len(target), self.num_heads, size).transpose(0, 1)  # (H, B, d / H)
        return torch.bmm(query, self.of_key.weight.view(self.num_heads, size, -1)).transpose(0, 1) / math.sqrt(size)

    def joined(self, mixed: Tensor) -> Tensor:
        """Each head's weighted sum of behaviors (B, H, v) -> (B, d): values, heads joined, output projection."""
        value_weight = self.of_value.weight.view(self.num_heads, -1, mixed.shape[2])  # (H, d / H, v)
        heads = torch.bmm(mixed.transpose(0, 1), value_weight.transpose(1, 2))  # (H, B, d / H)
        return self.output(heads.transpose(0, 1).reshape(len(mixed), -1))


class ContentAttention(nn.Module):
    """SA-TA (MUSE, arXiv 2512.07216): the score hears what content says, b1 s + b2 c / τ + b3 s c / τ, per head.

    b1, b2, b3 start at 1 and τ at 0.1, all learnt. Departs from MUSE's code: no SiLU on query, key and value, so that with
    b2 = b3 = 0 it is the plain model; pads take no part.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.ones(3, num_heads, 1))
        self.temperature = nn.Parameter(torch.full((num_heads, 1), 0.1))

    def forward(self, scores: Tensor, content: Tensor | None) -> Tensor:
        """(B, H, K) scores, and cosines (B, K) or, where each head found its own, (B, H, K) -> (B, H, K)."""
        if content is None:
            raise ValueError("This attention uses content: Side.content must hold the cosines of Eq. 7.")
        cosine = (content if content.dim() == 3 else content.unsqueeze(1)) / self.temperature
        own, of_content, both = self.mix
        return own * scores + (of_content + both * scores) * cosine


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension where `mask`; 0 elsewhere, and all zeros where nothing is real."""
    lowest = torch.finfo(scores.dtype).min
    return torch.softmax(scores.masked_fill(~mask, lowest), dim=-1).masked_fill(~mask, 0.0)


def attend(query: Tensor, behaviors: Tensor, mask: Tensor) -> Tensor:
    """Scaled queries (B, H, d), behaviors (B, L, d) as keys and values at once, mask (B, 1 or H, L) -> (B, H, d).

    softmax(q · h_i) over the real behaviors weighs their sum; zeros where none is real. With one backward of its own: the
    behaviors' gradient is a single matrix product, and what is masked has weight 0, so its gradient needs no mask.
    Behaviors that all rows share, (1, L, d), have torch's.
    """
    if len(behaviors) == 1:
        return weighted(masked_softmax(products(query, behaviors), mask), behaviors)
    mixed: Tensor = _Attend.apply(query, behaviors, mask)
    return mixed


def products(query: Tensor, behaviors: Tensor) -> Tensor:
    """Inner products of (B, H, d) with behaviors (B, L, d), or with (1, L, d) that all rows share -> (B, H, L)."""
    return torch.matmul(query, behaviors[0].t()) if len(behaviors) == 1 else torch.bmm(query, behaviors.transpose(1, 2))


def weighted(weights: Tensor, behaviors: Tensor) -> Tensor:
    """Sums of behaviors (B, L, e), or of (1, L, e) that all rows share, by weights (B, H, L) -> (B, H, e)."""
    return torch.matmul(weights, behaviors[0]) if len(behaviors) == 1 else torch.bmm(weights, behaviors)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, behaviors: Tensor, mask: Tensor) -> Tensor:
        scores = torch.bmm(query, behaviors.transpose(1, 2))  # (B, H, L)
        bound = torch.finfo(scores.dtype).max / 8
        scores = scores.clamp(-bound, bound).sub((~mask).to(scores.dtype), alpha=2 * bound)  # faster than masked_fill
        weights = torch.softmax(scores, dim=-1).to(scores.dtype) * mask.any(dim=-1, keepdim=True)
        ctx.save_for_backward(query, behaviors, weights)  # of several dtypes under autocast
        return torch.bmm(weights, behaviors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        behaviors = ctx.saved_tensors[1]
        query, weights, gradient = (
            v.to(behaviors.dtype) for v in (ctx.saved_tensors[0], ctx.saved_tensors[2], gradient)
        )
        of_weights = torch.bmm(gradient, behaviors.transpose(1, 2))  # (B, H, L)
        of_scores = weights * (of_weights - (weights * of_weights).sum(dim=-1, keepdim=True))
        left = torch.cat([weights, of_scores], dim=1)  # (B, 2 H, L)
        of_behaviors = torch.bmm(left.transpose(1, 2), torch.cat([gradient, query], dim=1))
        return torch.bmm(of_scores, behaviors), of_behaviors, None


def best(scores: Tensor, wanted: Tensor, count: int, *, in_order: bool = True) -> tuple[Tensor, Tensor]:
    """Indices (…, K) of the highest scores (…, L) among the wanted, best first, and True (…, K) where one was found.

    Without `in_order` they come in any order, which is faster.

    K = min(count, L). What is not wanted, padding above all, scores -inf: no real behavior, whatever its score, can lose
    to it.
    """
    kept, index = torch.where(wanted, scores, -math.inf).topk(min(count, scores.shape[-1]), sorted=in_order)
    return index, kept > -math.inf


def newest(wanted: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `best`, the last `count` wanted behaviors of each row, newest first."""
    position = torch.arange(wanted.shape[-1], dtype=torch.float32, device=wanted.device)
    return best(position.expand(wanted.shape), wanted, count)


def among_newest(wanted: Tensor, count: int) -> Tensor:
    """(B, L) True at the last `count` wanted behaviors of each row."""
    later = wanted.sum(dim=1, keepdim=True) - wanted.cumsum(dim=1)  # wanted ones that came after
    return wanted & (later < count)


def as_mask(index: Tensor, found: Tensor, length: int) -> Tensor:
    """(..., K) indices and which of them were found -> (..., L) True at those places."""
    return torch.zeros(*index.shape[:-1], length, dtype=torch.bool, device=index.device).scatter_(-1, index, found)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, …) of each row's own (B, L, e) or (B, L), or of one that all share -> (B, …, e) or (B, …)."""
    size, length = values.shape[:2]
    first = torch.arange(size, device=index.device).view(-1, *[1] * (index.dim() - 1)) * length
    taken = values.reshape(size * length, *values.shape[2:]).index_select(0, (index + first).flatten())
    return taken.view(*index.shape, *values.shape[2:])
