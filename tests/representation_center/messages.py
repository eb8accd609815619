"""Messages of new items, as tests make them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa

from mim_ray.representation_center.updates import segment_rows

START = datetime(2025, 1, 1, tzinfo=UTC)


def message(ids: list[str], value: float, day: int, **options: object) -> pa.Table:
    """Rows of two equal numbers, of content that came `day` days after START."""
    return segment_rows(
        ids,
        np.full((len(ids), 2), value, np.float32),
        content_hashes=[f"{value}".rjust(32, "0")] * len(ids),
        content_at=[START + timedelta(days=day)] * len(ids),
        **options,  # type: ignore[arg-type]
    )
