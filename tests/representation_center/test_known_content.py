"""mim_ray/representation_center/known_content.py: opened again upon a newer snapshot, it knows the same and holds less."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa

from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.known_content import KnownContent
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import append_segment, fold, segment_rows

START = datetime(2025, 1, 1, tzinfo=UTC)


def message(ids: list[str], value: int, day: int) -> pa.Table:
    return segment_rows(
        ids,
        np.full((len(ids), 2), value, np.float32),
        content_hashes=[f"{value}".rjust(32, "0")] * len(ids),
        content_at=[START + timedelta(days=day)] * len(ids),
    )


def test_opened_again_it_knows_the_same_and_holds_what_came_since_alone(tmp_path: Path) -> None:
    table, window, line = EmbeddingTable(f"{tmp_path}/table").create(), f"{tmp_path}/window", f"{tmp_path}/line"
    table.append(message(["a", "b"], 1, 1), encoder_version="v1", shard_id="s")
    known = KnownContent(table, window, "v1", line=line)
    assert known.opened_again() is None, "there is no snapshot yet"
    ids = ["a", "b", *(f"n{number}" for number in range(20)), "later"]
    append_segment(window, message(ids[2:-1], 2, 2), encoder_version="v1")
    append_segment(window, message(["b"], 3, 3), encoder_version="v1")
    known.refresh()
    assert len(known._newer) == 21
    fold(window, table, keep_s=0)
    build_snapshot(table, "v1", line)
    append_segment(window, message(["later"], 4, 4), encoder_version="v1")
    again = known.opened_again()
    assert again is not None
    for one in (known, again):
        one.refresh()
    assert [one[:2] for one in again.current(ids)] == [one[:2] for one in known.current(ids)]
    assert [one.hash[-1] for one in again.current(["a", "b", "n7", "later"])] == ["1", "3", "2", "4"]
    assert set(again._newer) == {"later"}
    assert again.opened_again() is None
