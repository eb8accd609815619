"""What every user behavior model looks like from outside."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn


class Side(NamedTuple):
    """What is known of each behavior beside its item; a model uses what it needs, padded places may hold anything finite.

    Attributes:
        same_category: (B, L) bool, True where a behavior is of the target's category.
        age_s: (B, L) seconds from the behavior to the impression, 0 or more; None when the log has no times.
        cross: (B, L, c) embedded features of a user's doing with an item (TWIN's cross features); None without any.
        content: (B, L) cosine of the behavior's MM embedding to the target's, 0 where one of them has none (Eq. 7);
            None where the attention is not told of content.
    """

    same_category: Tensor
    age_s: Tensor | None = None
    cross: Tensor | None = None
    content: Tensor | None = None


class Backbone(nn.Module):
    """The face, for type checkers and for readers: a user behavior model of one's own looks like this.

    Attributes:
        width: of the interest.
        shares_behaviors: `forward` takes one row of behaviors, mask, ages and cross features for all targets, (1, L, …), as a
            ranking request has them. Without this attribute it is given repeated views.
    """

    width: int

    def forward(self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, side: Side) -> Tensor:
        """Interest of the user in the target: (B, d), (B, L, d), (B, L) bool -> (B, width).

        Behaviors are oldest first and padded on the right.
        """
        raise NotImplementedError


@runtime_checkable
class WithAttention(Protocol):
    """A backbone that weighs single behaviors can say how: this method explains what `forward` does."""

    def explain(self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, side: Side) -> Tensor:
        """a_t,i of Eq. 1 for each of H heads, (B, H, L); 0 for behaviors that were not looked at. Arguments as of `forward`."""
        ...


@runtime_checkable
class WithAuxiliaryLoss(Protocol):
    """A backbone that trains with one more loss has this method beside `forward`."""

    def interest_and_loss(
        self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, side: Side, label: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The interest (B, width) as forward gives it, and the auxiliary loss, a scalar; `label` is (B,), 0 or 1."""
        ...
