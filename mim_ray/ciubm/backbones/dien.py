"""DIEN (Zhou et al., AAAI 2019): interests are the states of a GRU, their evolution towards the target an AUGRU.

Interest extraction: a GRU over the behaviors, state g_i as wide as an item. Auxiliary loss: g_i must tell the next
behavior h_{i+1} from a negative that the user did not do next, by a network on [g_i; h] of 100 - 50 - 1 units (the
authors' code; the paper prints an inner product).
Interest evolution: a_i = softmax_i(g_i W t), then the GRU with attentional update gate u' = a_i u, g' = g + u' (n - g).

Choices: negatives are real behaviors drawn from the whole batch, at random for each step; one that equals the true next
behavior is left out. No packing: behaviors are padded on the right, where a GRU's earlier states do not see them, and a
pad's attention is exactly 0, which leaves the AUGRU's state as it was. An empty history stays at the first state, zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear

from mim_ray.ciubm.backbones.attention import masked_softmax
from mim_ray.ciubm.backbones.face import Side


class Dien(nn.Module):
    """h_B^ID = the AUGRU's last state."""

    shares_behaviors = True

    def __init__(self, id_width: int) -> None:
        super().__init__()
        self.width = id_width
        self.extraction = nn.GRU(id_width, id_width, batch_first=True)
        self.attention = nn.Linear(id_width, id_width, bias=False)
        self.evolution = Augru(id_width, id_width)
        self.tell_next = nn.Sequential(
            nn.Linear(2 * id_width, 100), nn.Sigmoid(), nn.Linear(100, 50), nn.Sigmoid(), nn.Linear(50, 1)
        )

    def forward(self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, side: Side) -> Tensor:
        """(B, d) target and (B, L, d) behaviors -> (B, d); zeros without behaviors."""
        return self._evolved(target, self.extraction(behaviors)[0], behavior_mask)

    def explain(self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, side: Side) -> Tensor:
        """a_i (B, 1, L), by which the interest evolves."""
        return self._relevance(target, self.extraction(behaviors)[0], behavior_mask).unsqueeze(1)

    def interest_and_loss(
        self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, side: Side, label: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mean, over all steps that have a next behavior, of the two binary cross-entropies; 0 without any."""
        states = self.extraction(behaviors)[0]  # (B, L, d)
        return self._evolved(target, states, behavior_mask), self.next_behavior_loss(states, behaviors, behavior_mask)

    def next_behavior_loss(self, states: Tensor, behaviors: Tensor, behavior_mask: Tensor) -> Tensor:
        """-mean[log σ(f(g_i, h_{i+1})) + log(1 - σ(f(g_i, negative)))] over i whose next behavior is real."""
        followed = behavior_mask[:, 1:]
        state, positive = states[:, :-1][followed], behaviors[:, 1:][followed]  # (M, d)
        if len(state) == 0:
            return states.sum() * 0.0
        real = behaviors[behavior_mask]
        negative = real[torch.randint(len(real), (len(state),), device=real.device)]
        other = (negative != positive).any(dim=-1)
        logits = self.tell_next(torch.cat([state.repeat(2, 1), torch.cat([positive, negative])], dim=-1)).squeeze(-1)
        label = torch.ones_like(logits)
        label[len(state) :] = 0.0
        weight = torch.cat([torch.ones_like(other), other]).to(logits.dtype)
        total = binary_cross_entropy_with_logits(logits, label, weight=weight, reduction="sum")
        return total / len(state)

    def _evolved(self, target: Tensor, states: Tensor, behavior_mask: Tensor) -> Tensor:
        return self.evolution(states, self._relevance(target, states, behavior_mask))

    def _relevance(self, target: Tensor, states: Tensor, behavior_mask: Tensor) -> Tensor:
        query = target @ self.attention.weight.t()  # (B, d)
        if len(states) == 1:
            scores = query @ states[0].t()
        else:
            scores = torch.bmm(states, query.unsqueeze(-1)).squeeze(-1)
        return masked_softmax(scores, behavior_mask)


class Augru(nn.Module):
    """A GRU whose update gate is multiplied by each step's attention; gates in torch's order: reset, update, new."""

    def __init__(self, input_width: int, width: int) -> None:
        super().__init__()
        self.of_input = nn.Linear(input_width, 3 * width)
        self.of_state = nn.Linear(width, 3 * width)

    def forward(self, inputs: Tensor, relevance: Tensor) -> Tensor:
        """(B or 1, L, e) and (B, L) -> the last state (B, d); a step with relevance 0 leaves the state as it was."""
        by_step = self.of_input(inputs.transpose(0, 1)).unbind(0)  # L times (B, 3 d)
        gate = relevance.t().unsqueeze(-1).unbind(0)  # L times (B, 1)
        state = inputs.new_zeros(len(relevance), self.of_state.in_features)
        width = state.shape[1]
        for step, of_input in enumerate(by_step):
            of_state = linear(state, self.of_state.weight, self.of_state.bias)
            reset, update = torch.sigmoid(of_input[:, : 2 * width] + of_state[:, : 2 * width]).chunk(2, dim=1)
            new = torch.tanh(torch.addcmul(of_input[:, 2 * width :], reset, of_state[:, 2 * width :]))
            state = torch.lerp(state, new, gate[step] * update)
        return state
