"""What every user behavior model looks like from outside."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Side(NamedTuple):
    """What is known of each behavior beside its item; a model uses what it needs, padded places may hold anything finite.

    Attributes:
        same_category: (B, L) bool, True where a behavior is of the target's category.
        age_s: (B, L) seconds from the behavior to the impression, 0 or more; None when the log has no times.
        cross: (B, L, c) embedded features of a user's doing with an item (TWIN's cross features); None without any.
    """

    same_category: Tensor
    age_s: Tensor | None = None
    cross: Tensor | None = None


class Backbone(nn.Module):
    """The face, for type checkers and for readers: a user behavior model of one's own looks like this.

    Attributes:
        width: of the interest.
    """

    width: int

    def forward(self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, side: Side) -> Tensor:
        """Interest of the user in the target: (B, d), (B, L, d), (B, L) bool -> (B, width).

        Behaviors are oldest first and padded on the right.
        """
        raise NotImplementedError
