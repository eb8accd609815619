"""What the network sees (SPEC: embedded tensors, not ids)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class EmbeddedBatch(NamedTuple):
    """B rows with at most L behaviors each. L may differ from batch to batch.

    What all rows have in common, as the candidates of a ranking request have their user's, may be given once, with a first
    dimension of 1: all of behaviors, behavior_mask, behavior_mm and behavior_age_s together, and user and query_mm. What
    comes out is the same.
    """

    target: Tensor  # (B, d) ID embedding of the target: item and category
    behaviors: Tensor  # (B, L, d), oldest first, padded on the right
    behavior_mask: Tensor  # (B, L) bool
    same_category: Tensor  # (B, L) bool: of the target's category
    user: Tensor | None = None  # (B, u)
    target_mm: Tensor | None = None  # (B, D), zero where there is no content
    behavior_mm: Tensor | None = None  # (B, L, D)
    behavior_age_s: Tensor | None = None  # (B, L) seconds from the behavior to the impression, 0 or more
    context: Tensor | None = None  # (B, c) the row's other features, embedded and normalised
    query_mm: Tensor | None = None  # (B, D) the query in the space of the MM embeddings, zero where there is none
    behavior_cross: Tensor | None = None  # (B, L, x) embedded features of a user's doing with an item
