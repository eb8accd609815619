"""What is no negative in DMA: items that show the same picture or bear the same title (paper Section 3.2, our addition)."""

from __future__ import annotations

import torch
from torch import Tensor

from mim_ray.contrastive.info_nce import same_key_pairs


def equal_content_pairs(keys: Tensor, all_keys: Tensor) -> Tensor:
    """(2, n) pairs (own row, row of all) that share the title or the picture: no negatives of each other.

    Args:
        keys: (B, 2) int64, equal where title (column 0) or picture (column 1) are. all_keys: (P·B, 2), of all workers.
    """
    pairs = torch.cat(
        [same_key_pairs(own.contiguous(), others.contiguous()) for own, others in zip(keys.T, all_keys.T, strict=True)],
        dim=1,
    )
    return torch.unique(pairs, dim=1)


def chance_loss(pairs: Tensor, num_queries: int, num_candidates: int) -> float:
    """The contrastive loss of an aligner that knows nothing: mean of ln(candidates left).

    Args:
        pairs: (2, n) from `equal_content_pairs`; a query's own row is among them.
    """
    hidden = torch.bincount(pairs[0], minlength=num_queries) - 1
    return float(torch.log((num_candidates - hidden).double()).mean())
