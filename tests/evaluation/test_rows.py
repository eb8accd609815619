"""Columns and records on a scratch disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mim_ray.data.ids import hash_ids
from mim_ray.evaluation import rows
from mim_ray.evaluation.rows import Columns, Parts


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK_ROWS", 7)
    monkeypatch.setattr(rows, "PART_ROWS", 10)


def test_columns_come_back_in_pieces_as_they_were_appended(tmp_path: Path) -> None:
    columns = Columns(tmp_path)
    for start, stop in ((0, 5), (5, 5), (5, 23)):
        columns.append("a", np.arange(start, stop))
        columns.append("b", np.arange(start, stop, dtype=np.float64) / 2)
    pieces = list(columns.chunks("a", "b"))
    assert [len(a) for a, _ in pieces] == [7, 7, 7, 2]
    assert np.concatenate([a for a, _ in pieces]).tolist() == list(range(23))
    assert all(np.array_equal(a / 2, b) for a, b in pieces)
    assert columns.take("a", np.array([0, 20])).tolist() == [0, 20]


def test_a_column_can_be_written_at_any_place(tmp_path: Path) -> None:
    columns = Columns(tmp_path)
    whole = columns.create("c", 9, np.dtype(np.float64))
    whole[[8, 1]] = 3.0
    assert np.concatenate([c for (c,) in columns.chunks("c")]).tolist() == [0, 3, 0, 0, 0, 0, 0, 0, 3]


def test_equal_hashes_meet_in_one_part_and_nothing_is_lost(tmp_path: Path) -> None:
    user = hash_ids([f"u{number % 30}" for number in range(200)])
    parts = Parts(tmp_path / "parts", [("user", "u8"), ("row", "i8")], 200)
    assert parts.count == 20
    for start in range(0, 200, 50):
        parts.add(user[start : start + 50], user=user[start : start + 50], row=np.arange(start, start + 50))
    read = list(parts.read())
    assert sorted(np.concatenate([records["row"] for records in read]).tolist()) == list(range(200))
    owners = [set(records["user"].tolist()) for records in read]
    assert sum(len(users) for users in owners) == 30
    assert not list((tmp_path / "parts").iterdir())
