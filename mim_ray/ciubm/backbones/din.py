"""DIN (Zhou et al., KDD 2018): attention of the target to each behavior by a small network.

Choices where the authors leave one: the activation unit sees [t, h, t - h, t * h] and has one hidden layer of 36 (the
paper's figure) with PReLU, one slope for all units; scores are not normalised (the authors' choice: a strong interest
gives a large vector). PReLU instead of Dice, because Dice's batch statistics would see padded rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mim_ray.ciubm.backbones.attention import ContentAttention, weighted
from mim_ray.ciubm.backbones.face import Side

_CACHED = 262_144  # numbers of hidden units that are computed at once


class Din(nn.Module):
    """h_B^ID = Σ_i a(t, h_i) h_i with a learnt a (Eq. 1)."""

    shares_behaviors = True

    def __init__(self, id_width: int, hidden: int = 36, *, content: bool = False) -> None:
        super().__init__()
        self.width = id_width
        self.first = nn.Linear(4 * id_width, hidden)
        self.activation = nn.PReLU()
        self.second = nn.Linear(hidden, 1)
        self.content = ContentAttention(num_heads=1) if content else None

    def forward(self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, side: Side) -> Tensor:
        """(B, d) target and (B, L, d) behaviors -> (B, d); zeros without behaviors."""
        return weighted(self.explain(target, behaviors, behavior_mask, side), behaviors).squeeze(1)

    def explain(self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, side: Side) -> Tensor:
        """a_t,i (B, 1, L), of any sign and size."""
        scores = self.relevance(target, behaviors).unsqueeze(1)
        if self.content is not None:
            scores = self.content(scores, side.content)
        return scores.masked_fill(~behavior_mask.unsqueeze(1), 0.0)

    def relevance(self, target: Tensor, behaviors: Tensor) -> Tensor:
        """(B, L) attention scores before masking.

        The first layer on [t, h, t - h, t * h] factors: (W1 + W3) t is computed once per target, and
        (W2 - W3) h + W4 (t * h) is one matrix per target applied to its behaviors, or, where they are fewer than that
        matrix has rows, computed from [h, t * h]. PReLU with slope s is
        s x + (1 - s) relu(x), of which the second layer takes the parts: torch's own PReLU is several times slower.
        """
        if len(behaviors) == 1:
            return self._relevance_of_shared(target, behaviors[0])
        of_target, of_behavior, of_difference, of_product = self.first.weight.chunk(4, dim=1)  # (hidden, d) each
        constant = linear(target, of_target + of_difference, self.first.bias)  # (B, hidden)
        if behaviors.shape[1] < len(of_behavior):
            both = torch.cat([behaviors, behaviors * target.unsqueeze(1)], dim=-1)  # (B, L, 2 d)
            hidden = linear(both, torch.cat([of_behavior - of_difference, of_product], dim=1)) + constant.unsqueeze(1)
        else:
            per_target = (of_behavior - of_difference).t() + target.unsqueeze(2) * of_product.t()  # (B, d, hidden)
            hidden = torch.baddbmm(constant.unsqueeze(1), behaviors, per_target)  # (B, L, hidden)
        slope, weight = self.activation.weight, self.second.weight
        scores = linear(hidden, slope * weight) + linear(hidden.relu(), (1.0 - slope) * weight, self.second.bias)
        return scores.squeeze(-1)

    def _relevance_of_shared(self, target: Tensor, behaviors: Tensor) -> Tensor:
        """`relevance` (B, L) of behaviors (L, d) that all targets have, by the same equation the other way round: one matrix
        for each behavior, (W1 + W3) + W4 diag(h), and all of them are one. The part of the answer that is linear in the
        hidden units needs none of them; a few targets at a time keep the others in the processor's cache.
        """
        of_target, of_behavior, of_difference, of_product = self.first.weight.chunk(4, dim=1)
        constant = linear(behaviors, of_behavior - of_difference, self.first.bias)  # (L, hidden)
        alone = (of_target + of_difference).t().contiguous()  # (d, hidden)
        together, columns = of_product.t().contiguous(), behaviors.t().contiguous()  # (d, hidden), (d, L)
        slope, weight = self.activation.weight, self.second.weight.squeeze(0)
        linear_part = slope * weight  # (hidden,)
        straight = (alone @ linear_part).unsqueeze(1) + (together @ linear_part).unsqueeze(1) * columns  # (d, L)
        straight = torch.addmm(constant @ linear_part + self.second.bias, target, straight)  # (B, L)
        per_behavior = (columns.unsqueeze(2) * together.unsqueeze(1) + alone.unsqueeze(1)).flatten(1)  # (d, L * hidden)
        constant = constant.flatten()
        bent = [
            torch.addmm(constant, some, per_behavior).relu_().view(len(some), len(behaviors), -1) @ weight
            for some in target.split(max(1, _CACHED // len(constant)))
        ]
        return straight + (1.0 - slope) * torch.cat(bent)
