"""BST (Chen et al., DLP-KDD 2019): a transformer over the behaviors with the target as the last token.

One block, post-norm, LeakyReLU, the feed-forward layer as wide as the tokens. Each token is [item; position], the
position being the time from the behavior to the impression in buckets (the paper's), or, where times are not known, how
many behaviors ago it was; the target has a position of its own.

Choices: 4 heads (the authors: 8 of wider tokens), no dropout. The authors concatenate the outputs of a fixed number of
tokens; lengths differ here, so the answer is [output of the target; mean output of the real behaviors]. Pads are no
keys. Without behaviors the answer is zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, scaled_dot_product_attention

from mim_ray.ciubm.backbones.attention import masked_softmax
from mim_ray.ciubm.backbones.face import Side
from mim_ray.ciubm.backbones.gaps import NUM_GAPS, gap_bucket

NUM_PLACES = 200
"""Older behaviors share the last position."""


class Bst(nn.Module):
    """h_B^ID = [output of the target; mean output of the behaviors], each of d and the width of a position."""

    def __init__(self, id_width: int, *, num_heads: int = 4, time_gaps: bool = False) -> None:
        super().__init__()
        position_width = max(1, id_width // 2)
        width = id_width + position_width
        self.width = 2 * width
        self.time_gaps = time_gaps
        self.num_heads = next(heads for heads in range(num_heads, 0, -1) if width % heads == 0)
        self.positions = nn.Embedding(1 + (NUM_GAPS if time_gaps else NUM_PLACES), position_width)  # row 0: the target
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.joined = nn.Linear(width, width, bias=False)
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.widen, self.narrow = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, side: Side) -> Tensor:
        """(B, d) target and (B, L, d) behaviors -> (B, width); zeros without behaviors."""
        tokens, mask, query, key, value = self._tokens(target, behaviors, behavior_mask, side)
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        tokens = self.first_norm(tokens + self.joined(attended.transpose(1, 2).flatten(2)))
        tokens = self.second_norm(tokens + self.narrow(leaky_relu(self.widen(tokens))))
        weights = behavior_mask.to(tokens.dtype)
        count = weights.sum(dim=1, keepdim=True)
        mean = torch.bmm(weights.unsqueeze(1), tokens[:, :-1]).squeeze(1) / count.clamp_min(1.0)
        return torch.cat([tokens[:, -1], mean], dim=-1) * count.clamp_max(1.0)

    def explain(self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, side: Side) -> Tensor:
        """How each head's target token looks at the behaviors, (B, H, L); the rest of its softmax is the target itself."""
        _, mask, query, key, _ = self._tokens(target, behaviors, behavior_mask, side)
        scores = torch.matmul(query[:, :, -1:], key.transpose(2, 3)) / math.sqrt(query.shape[-1])
        return masked_softmax(scores, mask)[:, :, 0, :-1]

    def _tokens(
        self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, side: Side
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Tokens (B, L + 1, width), their mask (B, 1, 1, L + 1), and query, key and value (B, H, L + 1, width / H)."""
        size, length, _ = behaviors.shape
        position = torch.cat([self._position(behavior_mask, side), behavior_mask.new_zeros(size, 1).long()], dim=1)
        items = torch.cat([behaviors, target.unsqueeze(1)], dim=1)
        tokens = torch.cat([items, self.positions(position)], dim=-1)  # (B, L + 1, width)
        mask = torch.cat([behavior_mask, behavior_mask.new_ones(size, 1)], dim=1)
        by_head = self.query_key_value(tokens).view(size, length + 1, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = by_head.unbind(0)  # (B, H, L + 1, width / H)
        return tokens, mask.view(size, 1, 1, -1), query, key, value

    def _position(self, behavior_mask: Tensor, side: Side) -> Tensor:
        """(B, L) rows of `positions`."""
        if self.time_gaps:
            return 1 + gap_bucket(side.age_s)
        length = behavior_mask.sum(dim=1, keepdim=True)
        ago = length - torch.arange(behavior_mask.shape[1], device=behavior_mask.device)  # the newest: 1
        return ago.clamp(1, NUM_PLACES)
