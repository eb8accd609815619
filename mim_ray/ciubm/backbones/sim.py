"""SIM (Pi et al., CIKM 2020): search the history for what concerns the target, then attend to what was found.

General search unit: hard search, the newest `num_searched` behaviors of the target's category. Exact search unit:
multi-head target attention over them. Beside it the short-term part: DIN over the newest `num_short` behaviors (the
authors use DIEN there). No time gaps yet. Nothing found: the long-term part is zero.

Pads can never be found: their search score is -inf and what is taken from there is masked again in the attention.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mim_ray.ciubm.backbones.din import Din
from mim_ray.ciubm.backbones.face import Side


class Sim(nn.Module):
    """h_B^ID = [long-term interest; short-term interest]."""

    def __init__(self, id_width: int, *, num_searched: int, num_short: int, num_heads: int = 4) -> None:
        super().__init__()
        self.width = 2 * id_width
        self.num_searched, self.num_short = num_searched, num_short
        self.exact = TargetAttention(id_width, num_heads if id_width % num_heads == 0 else 1)
        self.short = Din(id_width)

    def forward(self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, side: Side) -> Tensor:
        """(B, d) target and (B, L, d) behaviors -> (B, 2 d)."""
        found, found_mask = newest(behaviors, behavior_mask & side.same_category, self.num_searched)
        recent, recent_mask = newest(behaviors, behavior_mask, self.num_short)
        long_term = self.exact(target, found, found_mask)
        return torch.cat([long_term, self.short(target, recent, recent_mask, side)], dim=-1)


class TargetAttention(nn.Module):
    """Multi-head attention with the target as the only query."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.of_target = nn.Linear(width, width, bias=False)
        self.of_key = nn.Linear(width, width, bias=False)
        self.of_value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor) -> Tensor:
        """(B, d) and (B, K, d) -> (B, d); zeros where no behavior is real."""
        size, length, width = behaviors.shape
        query = self.of_target(target).view(size, self.num_heads, 1, -1)
        key = self.of_key(behaviors).view(size, length, self.num_heads, -1).transpose(1, 2)  # (B, H, K, d / H)
        value = self.of_value(behaviors).view(size, length, self.num_heads, -1).transpose(1, 2)
        scores = (query @ key.transpose(-1, -2)) / math.sqrt(width // self.num_heads)  # (B, H, 1, K)
        mask = behavior_mask.view(size, 1, 1, length)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        relevance = torch.softmax(scores, dim=-1).masked_fill(~mask, 0.0)  # an empty row is all zeros
        return self.output((relevance @ value).reshape(size, width))


def newest(behaviors: Tensor, wanted: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The last `count` wanted behaviors of each row, newest first: (B, K, d) and (B, K) True where one was found.

    K = min(count, L). Positions that are not wanted score -inf in the search and are masked in the answer.
    """
    length = behaviors.shape[1]
    position = torch.arange(length, dtype=behaviors.dtype, device=behaviors.device)
    scores = torch.where(wanted, position, -math.inf)  # (B, L)
    best, index = scores.topk(min(count, length), dim=1)
    found = torch.gather(behaviors, 1, index.unsqueeze(-1).expand(-1, -1, behaviors.shape[2]))
    return found, best > -math.inf
