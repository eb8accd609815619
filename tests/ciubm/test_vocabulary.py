"""Ids to rows: unknown ones, hashed ones, and growth that moves nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mim_ray.ciubm.vocabulary import HashedVocabulary, ItemIndex, Vocabulary


def items_of(hash_rows: int | None = None) -> ItemIndex:
    """a, c (category x), b (none), d (y); c was met once only."""
    codes = np.array([0, -1, 0, 1], np.int32)
    counts = np.array([5, 2, 1, 2])
    return ItemIndex.build(pa.array(["a", "b", "c", "d"]), codes, ["x", "y"], counts, 2, hash_rows=hash_rows)


def rows_of(items: ItemIndex, ids: list[str | None]) -> list[int]:
    return items.rows(ids, items.vocabulary.encode(ids)).tolist()


def test_only_items_met_often_enough_have_a_row_and_the_rest_the_unknown_one() -> None:
    items = items_of()
    assert rows_of(items, ["a", "b", "c", "d", "new", None]) == [1, 2, 0, 3, 0, 0]
    assert items.category[items.vocabulary.encode(["a", "b", "c", "d", "new"])].tolist() == [1, 0, 1, 2, 0]
    assert (items.num_table_rows, items.num_category_rows) == (4, 3)


def test_growth_moves_no_row_and_appends_new_items_and_categories() -> None:
    ids = pa.array(["e", "c", "a", "f"], pa.large_string())
    grown = items_of().grow(ids, np.array([0, 1, 2, -1], np.int32), ["z", "x", "w"], np.array([3, 2, 9, 1]), 2)
    assert rows_of(grown, ["a", "b", "c", "d", "e", "f"]) == [1, 2, 4, 3, 5, 0]
    assert list(grown.categories) == ["x", "y", "z", "w"]
    category = grown.category[grown.vocabulary.encode(["a", "b", "c", "d", "e", "f"])]
    assert category.tolist() == [4, 0, 1, 2, 3, 0]  # a has moved to w; b and d are in the later catalogue no more
    users = Vocabulary(pa.array(["u2", "u1"])).grow(pa.array(["u3", "u1", None], pa.large_string()))
    assert users.encode(["u2", "u1", "u3", "u4", None]).tolist() == [1, 2, 3, 0, 0]


@pytest.mark.parametrize("hash_rows", [None, 7])
def test_vocabularies_come_back_from_their_files(tmp_path: Path, hash_rows: int | None) -> None:
    items = items_of(hash_rows)
    items.save(str(tmp_path))
    again = ItemIndex.load(str(tmp_path))
    ids = ["a", "b", "c", "d", "new", None]
    assert rows_of(again, ids) == rows_of(items, ids)
    assert again.num_table_rows == items.num_table_rows
    users = Vocabulary(pa.array(["u2", "u1"])) if hash_rows is None else HashedVocabulary(hash_rows)
    users.save(f"{tmp_path}/users.arrow")
    loaded = Vocabulary.load(f"{tmp_path}/users.arrow")
    assert (len(loaded), loaded.encode(ids).tolist()) == (len(users), users.encode(ids).tolist())


def test_hashed_ids_need_no_list_and_share_the_rows_evenly() -> None:
    users = HashedVocabulary(100)
    rows = users.encode([f"user-{number}" for number in range(20_000)])
    assert (rows.min(), rows.max()) == (1, 100)
    counts = np.bincount(rows)[1:]
    assert abs(counts - 200).max() < 80  # 5.7 standard deviations
    assert users.encode(["user-7", None]).tolist() == [rows[7], 0]
    assert len(users.ids) == 0
    items = items_of(hash_rows=7)
    assert items.num_table_rows == 8
    assert rows_of(items, ["a", "new", None]) == HashedVocabulary(7).encode(["a", "new", None]).tolist()
    grown = items.grow(pa.array(["e"]), np.array([0], np.int32), ["z"], np.array([0]), 1)
    assert rows_of(grown, ["a", "e"]) == HashedVocabulary(7).encode(["a", "e"]).tolist()
    assert grown.num_table_rows == 8
