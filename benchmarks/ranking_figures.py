"""What benchmarks/ranking.py makes of the outcomes of its load: rates, percentiles, the overload's figures. Arithmetic only."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from ranking_load import Outcomes

WINDOW_S = 0.5


def latencies_ms(outcomes: Outcomes) -> np.ndarray:
    """Of the answers that rank.

    Raises:
        RuntimeError: there are none.
    """
    ranked = np.array(outcomes.status) == 200
    if not ranked.any():
        raise RuntimeError(f"no request was ranked; statuses: {statuses(outcomes)} (0: no answer)")
    return np.array(outcomes.latency)[ranked] * 1_000


def p50(outcomes: Outcomes) -> float:
    return float(np.median(latencies_ms(outcomes)))


def rate(outcomes: Outcomes) -> float:
    """Rankings per second."""
    return len(latencies_ms(outcomes)) / outcomes.elapsed_s


def statuses(outcomes: Outcomes) -> dict[str, int]:
    return {str(status): count for status, count in sorted(Counter(outcomes.status).items())}


def of_pairs(values: Sequence[float], **sides: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of one value for each pair of runs, and the medians of both sides."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {
        "value": round(statistics.median(values), 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "pairs": len(values),
        **{name: round(statistics.median(side), 4) for name, side in sides.items()},
    }


def overload(
    outcomes: Outcomes, phases: Sequence[tuple[float, float]], normal_p99_ms: float
) -> dict[str, dict[str, Any]]:
    """
    Args:
        phases: before, overload, after, as (requests per second, seconds).
        normal_p99_ms: of answers at half of the capacity.
    """
    begin = phases[0][1]
    end = begin + phases[1][1]
    due, latency, status = np.array(outcomes.due), np.array(outcomes.latency) * 1_000, np.array(outcomes.status)
    meanwhile = (due >= begin) & (due < end)
    accepted, refused = meanwhile & (status == 200), meanwhile & (status == 503)
    p99 = float(np.percentile(latency[accepted], 99)) if accepted.any() else None
    told = np.array(outcomes.retry_after)[refused]
    usual = float((status[due < begin] == 503).mean()) if (due < begin).any() else 0.0
    last = sum(seconds for _, seconds in phases)
    found: dict[str, dict[str, Any]] = {
        "overload_p99_ratio": {
            "value": None if p99 is None else round(p99 / normal_p99_ms, 4),
            "p99_ms": None if p99 is None else round(p99, 2),
            "normal_p99_ms": round(normal_p99_ms, 2),
            "accepted_per_s": round(int(accepted.sum()) / phases[1][1], 1),
            "offered_per_s": round(phases[1][0], 1),
            "refused": int(refused.sum()),
            "other": {
                str(one): count for one, count in Counter(status[meanwhile & ~accepted & ~refused].tolist()).items()
            },
            "sent_late_p99_ms": round(float(np.percentile(np.array(outcomes.late)[meanwhile], 99)) * 1_000, 2),
        },
        "overload_503_p50_ms": {"value": round(float(np.median(latency[refused])), 2) if refused.any() else None},
        "overload_retry_after_ratio": {"value": round(float(told.mean()), 4) if refused.any() else None},
        "recovery_s": {
            "value": recovery_s(due, latency, status, end, last, limit_ms=2 * normal_p99_ms, refused=usual),
            "refused_before": round(usual, 4),
        },
    }
    return found


def recovery_s(
    due: np.ndarray,
    latency_ms: np.ndarray,
    status: np.ndarray,
    end: float,
    last: float,
    *,
    limit_ms: float,
    refused: float,
) -> float | None:
    """Seconds from `end` to the first half second in which nine of ten requests were within the limit, none failed, and no
    larger share than `refused` (rounded up to a request) was refused; None: no such."""
    for step in range(int((last - end) / WINDOW_S)):
        begin = end + step * WINDOW_S
        within = (due >= begin) & (due < begin + WINDOW_S)
        if not within.any() or not np.isin(status[within], (200, 503)).all():
            continue
        few = (status[within] == 503).sum() <= np.ceil(refused * within.sum())
        if few and np.percentile(latency_ms[within], 90) <= limit_ms:
            return round(step * WINDOW_S, 2)
    return None


def failed(outcomes: Outcomes) -> int:
    """Requests without an answer, or with one that is neither a ranking nor 503."""
    return sum(status not in (200, 503) for status in outcomes.status)
