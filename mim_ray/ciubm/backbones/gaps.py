"""How long ago a behavior was, as the row of a small table of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_GAPS = 50
"""Two buckets per doubling of the time since, from a minute to 30 years."""


def gap_bucket(age_s: Tensor | None) -> Tensor:
    """(B, L) seconds since each behavior -> (B, L) bucket in [0, NUM_GAPS): floor(2 log2(1 + minutes)).

    Negative ages, which only a wrong clock gives, count as 0.
    """
    if age_s is None:
        raise ValueError("This model uses time gaps: Side.age_s must hold the behaviors' ages in seconds.")
    minutes = age_s.to(torch.float32).clamp_min(0.0) / 60.0
    return ((1.0 + minutes).log2() * 2.0).to(torch.int64).clamp_max(NUM_GAPS - 1)
