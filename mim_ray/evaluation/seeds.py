"""Mean and interval of a figure over several seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from mim_ray.evaluation.bootstrap import Estimate

_T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean with its 95 % interval by Student's t over the values; no interval from one value, nothing from none."""
    if not values:
        return Estimate(None, None, None)
    mean = statistics.mean(values)
    if len(values) < 2:
        return Estimate(mean, None, None)
    half = _T_975.get(len(values) - 1, 1.96) * statistics.stdev(values) / len(values) ** 0.5
    return Estimate(mean, mean - half, mean + half)
