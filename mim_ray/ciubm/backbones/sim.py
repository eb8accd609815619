"""SIM (Pi et al., CIKM 2020): search the history for what concerns the target, then attend to what was found.

General search unit. Hard: the newest `num_searched` behaviors of the target's category. Soft: those with the highest
r_i = (W_b h_i) · (W_a t); the search learns by a CTR head of its own, which sees [Σ_i r_i W_b h_i; W_a t], and its loss
is added to the main one. The choice of behaviors itself passes no gradient.
Exact search unit: multi-head target attention over [item; time gap] of what was found; nothing found gives zero.
Beside it the short-term part over the newest `num_short` behaviors: DIEN as in the paper, or DIN, which is faster.

Choices where the authors leave one: r_i is divided by the square root of d, and the head's sum by the number of
behaviors, so that a long history starts no larger than a short one; the head's network is d - d - 1 with ReLU.
Pads can never be found: they score -inf, and what is taken from there is masked again in the attention.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from mim_ray.ciubm.backbones.attention import TargetAttention, among_newest, as_mask, best, newest, take
from mim_ray.ciubm.backbones.dien import Dien
from mim_ray.ciubm.backbones.din import Din
from mim_ray.ciubm.backbones.face import Side
from mim_ray.ciubm.backbones.gaps import NUM_GAPS, gap_bucket

_FEW = (
    4  # up to so many times num_searched behaviors, masking those not found costs less than taking the found ones out
)


class Sim(nn.Module):
    """h_B^ID = [long-term interest; short-term interest]."""

    shares_behaviors = True

    def __init__(
        self,
        id_width: int,
        *,
        num_searched: int,
        num_short: int,
        num_heads: int = 4,
        search: Literal["hard", "soft"] = "hard",
        short: Literal["din", "dien"] = "din",
        time_gaps: bool = False,
        content: bool = False,
    ) -> None:
        super().__init__()
        self.width = 2 * id_width
        self.num_searched, self.num_short = num_searched, num_short
        self.search = SoftSearch(id_width) if search == "soft" else None
        gap_width = id_width // 2 if time_gaps else 0
        self.gaps = nn.Embedding(NUM_GAPS, gap_width) if time_gaps else None
        width = id_width + gap_width
        self.exact = TargetAttention(id_width, num_heads, key_width=width, value_width=width, content=content)
        self.short: nn.Module = Dien(id_width) if short == "dien" else Din(id_width, content=content)

    def forward(self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, side: Side) -> Tensor:
        """(B, d) target and (B, L, d) behaviors -> (B, 2 d); zeros without behaviors."""
        scores = None
        if self.search is not None:
            with torch.no_grad():
                scores = self.search.scores(target, behaviors)
        recent = _newest_of(behaviors, behavior_mask, side, self.num_short)
        long_term = self._long_term(target, behaviors, behavior_mask, side, scores)
        return torch.cat([long_term, self.short(target, *recent)], dim=-1)

    def interest_and_loss(
        self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, side: Side, label: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Auxiliary losses of the soft search and of DIEN, summed; 0 with neither of them."""
        loss, scores = target.new_zeros(()), None
        if self.search is not None:
            scores, logits = self.search.scores_and_logits(target, behaviors, behavior_mask)
            loss = loss + binary_cross_entropy_with_logits(logits, label)
        recent = _newest_of(behaviors, behavior_mask, side, self.num_short)
        if isinstance(self.short, Dien):
            short_term, short_loss = self.short.interest_and_loss(target, *recent, label)
            loss = loss + short_loss
        else:
            short_term = self.short(target, *recent)
        long_term = self._long_term(target, behaviors, behavior_mask, side, scores)
        return torch.cat([long_term, short_term], dim=-1), loss

    def explain(self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, side: Side) -> Tensor:
        """Of the long-term part: each head's softmax over what was found, (B, H, L); 0 for what was not."""
        if self.search is None:
            found = among_newest(behavior_mask & side.same_category, self.num_searched)
        else:
            scores = self.search.scores(target, behaviors)
            found = as_mask(*best(scores, behavior_mask, self.num_searched, in_order=False), behaviors.shape[1])
        if self.gaps is not None:
            behaviors = torch.cat([behaviors, self.gaps(gap_bucket(side.age_s))], dim=-1)
        return self.exact.weights(target, behaviors, found, side.content)

    def _long_term(self, target: Tensor, behaviors: Tensor, mask: Tensor, side: Side, scores: Tensor | None) -> Tensor:
        length = behaviors.shape[1]
        masked = length <= _FEW * self.num_searched and self.gaps is None
        if scores is None and masked:
            found_mask = among_newest(mask & side.same_category, self.num_searched)
            return self.exact(target, behaviors, found_mask, side.content)
        if scores is None:
            index, found_mask = newest(mask & side.same_category, self.num_searched)
        else:
            index, found_mask = best(scores.detach(), mask, self.num_searched, in_order=False)
        if masked:
            return self.exact(target, behaviors, as_mask(index, found_mask, length), side.content)
        found = take(behaviors, index)
        if self.gaps is not None:
            found = torch.cat([found, self.gaps(take(gap_bucket(side.age_s), index))], dim=-1)
        content = None if side.content is None else take(side.content, index)
        return self.exact(target, found, found_mask, content)


class SoftSearch(nn.Module):
    """The learnt general search unit and its CTR head."""

    def __init__(self, id_width: int) -> None:
        super().__init__()
        self.of_target = nn.Linear(id_width, id_width, bias=False)
        self.of_behavior = nn.Linear(id_width, id_width, bias=False)
        self.head = nn.Sequential(nn.Linear(2 * id_width, id_width), nn.ReLU(), nn.Linear(id_width, 1))

    def scores(self, target: Tensor, behaviors: Tensor) -> Tensor:
        """r (B, L)."""
        return self._scores(self.of_target(target), behaviors)

    def scores_and_logits(self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor) -> tuple[Tensor, Tensor]:
        """r (B, L), and the logits (B,) of the head, which learns from all behaviors."""
        projected = self.of_target(target)
        scores = self._scores(projected, behaviors)
        kept = scores.masked_fill(~behavior_mask, 0.0).unsqueeze(1)
        count = behavior_mask.sum(dim=1, keepdim=True).clamp_min(1)
        interest = self.of_behavior(torch.bmm(kept, behaviors).squeeze(1) / count)
        return scores, self.head(torch.cat([interest, projected], dim=-1)).squeeze(-1)

    def _scores(self, projected: Tensor, behaviors: Tensor) -> Tensor:
        query = projected @ self.of_behavior.weight / math.sqrt(projected.shape[1])  # (B, d): W_b moved to the target
        if len(behaviors) == 1:
            return query @ behaviors[0].t()
        return torch.bmm(behaviors, query.unsqueeze(-1)).squeeze(-1)


def _newest_of(behaviors: Tensor, mask: Tensor, side: Side, count: int) -> tuple[Tensor, Tensor, Side]:
    """The newest `count` behaviors, oldest first and padded on the right, with their mask and what is known of them."""
    length = mask.shape[1]
    if length <= count:
        return behaviors, mask, side
    start = (mask.sum(dim=1, keepdim=True) - count).clamp_min(0)
    index = start + torch.arange(count, device=mask.device)
    of_these = [None if values is None else take(values, index.expand(len(values), -1)) for values in side]
    return take(behaviors, index), take(mask, index), Side(*of_these)  # type: ignore[arg-type]
