"""mim_ray/representation_center/key_index.py."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from mim_ray.data.ids import hash_ids
from mim_ray.representation_center import key_index
from mim_ray.representation_center.key_index import build_key_index

IDS = ["", "a", "item-1", "12345678", "123456789", "ü" * 9, "x" * 100, "item-2", "商品", "a\x00", "a\x00\x00"]


def test_the_hash_is_what_stored_snapshots_hold() -> None:
    found = key_index.hash_ids(["", "item-1", "123456789", "商品"])
    assert found.tolist() == [6238072747940578789, 13790239139271260934, 2332954340312916458, 797272096349731388]


def test_every_id_is_found_at_its_own_row_and_no_other_id_is() -> None:
    index, order = build_key_index(IDS)
    rows = index.find(IDS)
    assert [IDS[order[row]] for row in rows] == IDS
    assert index.ids.to_pylist() == [IDS[position] for position in order]
    assert index.find(["item-3", "12345678 ", None, "A", "a\x00\x00\x00"]).tolist() == [-1] * 5


@pytest.mark.parametrize("kind", ["list", "string", "large_string", "chunked", "sliced", "numpy"])
def test_ids_may_come_in_any_form(kind: str) -> None:
    index, _ = build_key_index(IDS)
    forms = {
        "list": IDS,
        "string": pa.array(IDS),
        "large_string": pa.array(IDS, pa.large_string()),
        "chunked": pa.chunked_array([IDS[:3], [], IDS[3:]]),
        "sliced": pa.array(["before", *IDS, "after"]).slice(1, len(IDS)),
        "numpy": np.array(IDS, object),
    }
    assert index.find(forms[kind]).tolist() == index.find(IDS).tolist()


def test_many_ids_agree_with_a_dictionary() -> None:
    rng = np.random.default_rng(0)
    ids = [f"item-{number}" for number in rng.choice(10**7, 20_000, replace=False)]
    index, order = build_key_index(ids)
    place = {ids[position]: row for row, position in enumerate(order)}
    asked = ids[:500] + [f"item-{number}" for number in rng.integers(0, 10**7, 5_000)]
    assert index.find(asked).tolist() == [place.get(key, -1) for key in asked]


def test_ids_that_share_a_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_index, "hash_ids", lambda keys: hash_ids(keys) % np.uint64(3))
    ids = [f"i{number}" for number in range(50)]
    index, order = build_key_index(ids)
    assert [ids[order[row]] for row in index.find(ids)] == ids
    assert index.find(["i50", "j1"]).tolist() == [-1, -1]
    with pytest.raises(ValueError, match="'i7' is there twice"):
        build_key_index([*ids, "i7"])


def test_empty_index_finds_nothing() -> None:
    index, _ = build_key_index([])
    assert index.find(["a", None]).tolist() == [-1, -1]
    assert index.find([]).tolist() == []
    with pytest.raises(ValueError, match="null"):
        build_key_index(["a", None])
