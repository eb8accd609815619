"""Table 4 by name: which pairs C-SFT learns from, and with which loss."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mim_ray.csft.cross_entropy import BinaryObjective, CategoryObjective
from mim_ray.csft.objective import CsftObjective
from mim_ray.errors import DataError

Supervision = Literal["category", "click-binary", "purchase-binary", "click", "purchase", "any"]
Objective = CsftObjective | BinaryObjective | CategoryObjective


def make_objective(
    supervision: Supervision,
    *,
    temperature: float,
    learn_temperature: bool,
    text_loss_weight: float,
    image_loss_weight: float,
    multi_level: bool = True,
    space_time_negatives: bool = True,
    log_q: Tensor | None = None,
    width: int,
    num_categories: int,
) -> Objective:
    """The loss of one row of Table 4.

    Args:
        multi_level: False leaves h^MM as the only level (Table 5).
        space_time_negatives, log_q: of the contrastive loss; see `CsftObjective`.
        width, num_categories: D, and the categories of the catalogue, for v1.

    Raises:
        DataError: v1 is asked for, and the catalogue has fewer than two categories.
    """
    text_loss_weight, image_loss_weight = (text_loss_weight, image_loss_weight) if multi_level else (0.0, 0.0)
    if supervision == "category":
        if num_categories < 2:
            raise DataError(
                f"csft.supervision = category learns to tell categories apart, but the catalogue has {num_categories} of "
                "them. Give the items table a category column with two values or more, or choose another supervision."
            )
        return CategoryObjective(width=width, num_categories=num_categories)
    if supervision.endswith("-binary"):
        return BinaryObjective(
            temperature=temperature,
            learn=learn_temperature,
            text_loss_weight=text_loss_weight,
            image_loss_weight=image_loss_weight,
        )
    return CsftObjective(
        temperature=temperature,
        learn=learn_temperature,
        text_loss_weight=text_loss_weight,
        image_loss_weight=image_loss_weight,
        space_time=space_time_negatives,
        log_q=log_q,
    )
