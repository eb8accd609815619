"""How often each item of the catalogue is met in a batch: what the correction of sampling frequencies needs.

Negatives that come with other pairs' positives come as often as they are bought, so the plain loss pushes popular items away
from every query. Yi et al. (RecSys 2019, "Sampling-bias-corrected neural modeling for large corpus item recommendations")
take log q_j from each candidate's logit, the positive's included, where q_j is how often item j is in a batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def sampling_rates(
    pair_counts: np.ndarray, categories: np.ndarray, eligible: np.ndarray, weights: np.ndarray | None
) -> np.ndarray:
    """(num_items,) expected number of times that each item is in a batch, divided by the number of pairs in it.

    A positive comes in proportion to its training pairs. Its hard negative is drawn by weight from the other eligible items
    of its category, as `HardNegativeSampler` does, and evenly from all eligible items where the category has no other. The
    rates add up to 1, or to 2 with hard negatives. Neglected: what one user may not get (doubles, own purchases), and that a
    draw from all items leaves out the positive.

    Args:
        pair_counts: (num_items,) training pairs of each item.
        categories: (num_items,) int code of each item's category, negative without one.
        eligible: (num_items,) bool, items that may be drawn as hard negatives.
        weights: (num_items,) `hard_negative_weights`; None without hard negatives.
    """
    positive = pair_counts / max(1, pair_counts.sum())
    if weights is None:
        return positive
    num_categories = int(categories.max(initial=-1)) + 1
    has_category = categories >= 0
    code = np.where(has_category, categories, num_categories)  # the last one stands for none
    own = np.where(eligible, weights, 0.0)
    members = np.bincount(code[eligible], minlength=num_categories + 1)
    has_others = has_category & (members[code] - eligible > 0)  # from which an item's hard negative is drawn
    others = np.bincount(code, weights=own, minlength=num_categories + 1)[code] - own
    drawn = np.divide(positive, others, out=np.zeros_like(positive), where=has_others)
    in_category = own * (np.bincount(code, weights=drawn, minlength=num_categories + 1)[code] - drawn)
    anywhere = positive[~has_others].sum() / max(1, eligible.sum())
    rates: np.ndarray = positive + np.where(eligible, np.where(has_category, in_category, 0.0) + anywhere, 0.0)
    return rates


def log_q(rates: np.ndarray) -> Tensor:
    """(num_items,) float32 log of `sampling_rates`, for `CsftObjective`.

    The number of pairs in a batch would add the same to all, which no softmax sees. An item that is never expected counts
    as the rarest one that is.
    """
    met = rates[rates > 0]
    floor = met.min() if len(met) else 1.0
    return torch.from_numpy(np.log(np.maximum(rates, floor)).astype(np.float32))
