"""When train ends and test begins, and how the test set looks by item age."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from mim_ray import artifacts
from mim_ray.config.scenario import Samples
from mim_ray.data.event_log import DAY_US
from mim_ray.errors import ConfigError

NUM_BUCKETS = 10


@dataclass(frozen=True)
class Split:
    """Microseconds from which samples are validation and test."""

    validation_start: int
    test_start: int

    def of(self, times: np.ndarray) -> np.ndarray:
        """(n,) number of the split (0 train, 1 validation, 2 test) of each time."""
        return (times >= self.validation_start).astype(np.int64) + (times >= self.test_start)


def split_by_time(times: np.ndarray, settings: Samples) -> Split:
    """The configured instants, else the instants that leave the configured shares of `times` to validation and test.

    Raises:
        ConfigError: the instants are no ISO times or not in order.
    """
    times = np.sort(times)
    both = settings.validation_ratio + settings.test_ratio
    if both >= 1:
        raise ConfigError(f"samples.validation_ratio + samples.test_ratio is {both}: nothing is left for train.")
    validation = _instant(settings.validation_start, "samples.validation_start")
    test = _instant(settings.test_start, "samples.test_start")
    if test is None:
        test = _quantile(times, 1 - settings.test_ratio, settings.time_resolution)
    if validation is None:
        share = 1 - both if settings.test_start is None else 1 - settings.validation_ratio
        known = times if settings.test_start is None else times[times < test]
        validation = _quantile(known, share, settings.time_resolution)
    if validation > test:
        raise ConfigError(
            f"Validation would start at {iso(validation)}, after test at {iso(test)}. "
            "Set samples.validation_start before samples.test_start."
        )
    return Split(validation, test)


def age_shares(first_positive: np.ndarray, num_rows: np.ndarray, num_positives: np.ndarray) -> list[dict[str, Any]]:
    """Rows and share of positives of the test set in the ten age buckets.

    S1: items without a positive in train. S2-S10: nine bins by first positive in train, newest first, nearly equal in
    rows; an item is in the bin in which the middle of its rows falls.

    Args:
        first_positive, num_rows, num_positives: by item of the test set; first_positive -1 where there is none in train.
    """
    bucket = np.zeros(len(num_rows), np.int64)
    seen = np.flatnonzero(first_positive >= 0)
    order = seen[np.argsort(-first_positive[seen], kind="stable")]
    if len(order):
        rows = num_rows[order]
        middle = np.cumsum(rows) - rows / 2
        bucket[order] = 1 + np.minimum((middle * (NUM_BUCKETS - 1) / rows.sum()).astype(np.int64), NUM_BUCKETS - 2)
    rows = np.bincount(bucket, num_rows, NUM_BUCKETS)
    positives = np.bincount(bucket, num_positives, NUM_BUCKETS)
    return [
        {"bucket": f"S{i + 1}", "num_rows": int(rows[i]), "positive_ratio": float(positives[i] / rows[i]) if rows[i] else None}
        for i in range(NUM_BUCKETS)
    ]  # fmt: skip


def iso(us: int) -> str:
    """UTC microseconds as ISO text."""
    return datetime.fromtimestamp(us / 1_000_000, UTC).isoformat(timespec="microseconds")


def validation_start_us(samples: str) -> int:
    """Microseconds UTC from which nothing of the samples at a URI may be known to the encoders."""
    value = artifacts.read_json(f"{samples}/samples.json")["validation_start"]
    return int(datetime.fromisoformat(value).timestamp() * 1_000_000)


def _instant(text: str | None, key: str) -> int | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"{key} = {text!r} is no ISO time. Write it like 2024-05-31 or 2024-05-31T12:00:00Z."
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1_000_000)


def _quantile(times: np.ndarray, share: float, time_resolution: str) -> int:
    if not len(times):
        return 0
    found = int(times[min(len(times) - 1, int(share * len(times)))]) if share < 1 else int(times[-1]) + 1
    return found // DAY_US * DAY_US if time_resolution == "day" else found
