"""TWIN (Chang et al., KDD 2023): one target attention both searches the long history and attends to what was found.

Per head a_i = q K_h,i / sqrt(d_k) + K_c,i β: the inherent features of a behavior (its item) against the target, plus
the user-item cross features (how long watched, when, how), each compressed to a scalar bias. The `num_searched` best of
each head, by that score, enter the softmax with the same score; the values see all features.

Choices: the compression w_c and β are one linear map of the cross features per head; a behavior's age, where used, is
one more cross feature, by an embedded time gap. Keys are never projected (attention.py), so a history of 10,000 costs
one matrix product of the width of an item; the search passes no gradient, what was found is scored again with gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mim_ray.ciubm.backbones.attention import (
    TargetAttention,
    as_mask,
    attend,
    best,
    masked_softmax,
    products,
    take,
    weighted,
)
from mim_ray.ciubm.backbones.face import Side
from mim_ray.ciubm.backbones.gaps import NUM_GAPS, gap_bucket

_GAP_WIDTH = 8


class Twin(nn.Module):
    """h_B^ID = the joined heads of the exact search unit."""

    shares_behaviors = True

    def __init__(
        self,
        id_width: int,
        *,
        num_searched: int,
        num_heads: int = 4,
        cross_width: int = 0,
        time_gaps: bool = False,
        content: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.num_searched, self.cross_width = id_width, num_searched, cross_width
        self.gaps = nn.Embedding(NUM_GAPS, _GAP_WIDTH) if time_gaps else None
        cross_width += _GAP_WIDTH if time_gaps else 0
        self.uses_cross = cross_width > 0
        self.attention = TargetAttention(id_width, num_heads, value_width=id_width + cross_width, content=content)
        self.bias = nn.Linear(cross_width, self.attention.num_heads, bias=False) if self.uses_cross else None

    def forward(self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, side: Side) -> Tensor:
        """(B, d) target and (B, L, d) behaviors -> (B, d); zeros without behaviors."""
        cross, content, mask = self._cross(side), side.content, behavior_mask.unsqueeze(1)  # mask (B, 1, L)
        query = self.attention.query(target)  # (B, H, d)
        length = behaviors.shape[1]
        if length > self.num_searched:
            with torch.no_grad():
                scores = self._scores(products(query, behaviors), cross, content)
                # (B, H, K): each head keeps its own
                index, found_mask = best(scores, mask, self.num_searched, in_order=False)
        if length > self.num_searched * query.shape[1]:
            mask = found_mask
            behaviors = take(behaviors, index)  # (B, H, K, d)
            cross = None if cross is None else take(cross, index)
            content = None if content is None else take(content, index)
            found = torch.matmul(behaviors, query.unsqueeze(-1)).squeeze(-1)  # (B, H, K)
        else:  # what all heads found is more than the history: mask the rest instead of copying
            if length > self.num_searched:
                mask = as_mask(index, found_mask, length)  # (B, H, L)
            if cross is None and content is None:
                return self.attention.joined(attend(query, behaviors, mask))
            found = products(query, behaviors)
        relevance = masked_softmax(self._scores(found, cross, content), mask)
        parts = [_weighted(relevance, values) for values in (behaviors, cross) if values is not None]
        return self.attention.joined(torch.cat(parts, dim=-1))

    def explain(self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, side: Side) -> Tensor:
        """Each head's softmax over what it found, (B, H, L); 0 for what it did not."""
        mask, length = behavior_mask.unsqueeze(1), behaviors.shape[1]
        query = self.attention.query(target)
        scores = self._scores(products(query, behaviors), self._cross(side), side.content)
        if length > self.num_searched:
            mask = as_mask(*best(scores, mask, self.num_searched, in_order=False), length)
        return masked_softmax(scores, mask)

    def _scores(self, scores: Tensor, cross: Tensor | None, content: Tensor | None) -> Tensor:
        """Scaled products of query and key (B, H, K), and the heads' biases -> (B, H, K)."""
        if self.bias is not None:
            assert cross is not None
            if cross.dim() == 3:
                scores = scores + self.bias(cross).transpose(1, 2)
            else:  # (B, H, K, c): each head's own weights on what it found
                scores = scores + torch.matmul(cross, self.bias.weight.unsqueeze(-1)).squeeze(-1)
        return scores if self.attention.content is None else self.attention.content(scores, content)

    def _cross(self, side: Side) -> Tensor | None:
        """(B, L, c) cross features, with the embedded time gap as the last of them."""
        if not self.uses_cross:
            return None
        parts = []
        if self.cross_width:
            if side.cross is None:
                raise ValueError("This model uses cross features: Side.cross must hold them.")
            parts.append(side.cross)
        if self.gaps is not None:
            parts.append(self.gaps(gap_bucket(side.age_s)))
        return torch.cat(parts, dim=-1)


def _weighted(relevance: Tensor, values: Tensor) -> Tensor:
    """(B, H, K) and (B, K, e) or (B, H, K, e) -> (B, H, e)."""
    if values.dim() == 3:
        return weighted(relevance, values)
    return torch.matmul(relevance.unsqueeze(2), values).squeeze(2)
