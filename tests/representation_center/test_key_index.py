"""mim_ray/representation_center/key_index.py."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pytest

from mim_ray.data.ids import hash_ids
from mim_ray.representation_center import buckets, key_index
from mim_ray.representation_center.buckets import Buckets
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


@pytest.mark.parametrize("num", [0, 1, 5, 1_000])
@pytest.mark.parametrize("spread", [2**64 - 1, 2**50, 7])
def test_the_table_of_prefixes_is_the_same_made_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num: int, spread: int
) -> None:
    hashes = np.sort(np.random.default_rng(num).integers(0, spread, num, np.uint64))
    hashes.tofile(tmp_path / "hashes")
    monkeypatch.setattr(buckets, "_PIECE_ROWS", 7)
    file = buckets.BucketFile(tmp_path / "hashes", num)
    with (tmp_path / "groups").open("wb") as groups, (tmp_path / "steps").open("wb") as steps:
        file.write(_Raw(groups), _Raw(steps))
    whole = buckets.Buckets.of(hashes)
    assert file.bits == whole.bits
    assert np.fromfile(tmp_path / "groups", file.groups).tolist() == whole.groups.tolist()
    assert np.fromfile(tmp_path / "steps", file.steps).tolist() == whole.steps.tolist()
    asked = np.random.default_rng(1).integers(0, 2**64 - 1, 50, np.uint64)
    first = whole.first_rows(asked)
    shift = np.uint64(64 - whole.bits)
    assert first.tolist() == [int((hashes >> shift < key >> shift).sum()) for key in asked]


def test_ids_are_found_behind_four_gigabytes_of_ids() -> None:
    index, _ = build_key_index(IDS)
    start = 2**32 - 40  # as if the ids before these had taken that many bytes
    offsets = np.append(0, np.cumsum([len(key.encode()) for key in index.ids.to_pylist()])) + start
    wraps = key_index.wrap_rows(offsets, 5, start)
    assert len(wraps) == 1
    late = key_index.KeyIndex(
        index.hashes, offsets.astype(np.uint32), index.key_bytes, Buckets.of(index.hashes), first_byte=start
    )
    shifted = key_index.KeyIndex(
        index.hashes,
        offsets.astype(np.uint32),
        index.key_bytes,
        _Moved(index.hashes, 5),
        first_row=5,
        first_byte=start,
        wraps=wraps,
    )
    assert shifted.find(IDS).tolist() == index.find(IDS).tolist()
    assert shifted.ids.to_pylist() == index.ids.to_pylist()
    assert (late.find(IDS) == -1).any()  # the wrap matters


class _Raw:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, array: np.ndarray) -> None:
        array.tofile(self._file)


class _Moved(Buckets):
    """The table of rows that begin at number `first`."""

    def __init__(self, hashes: np.ndarray, first: int) -> None:
        table = Buckets.of(hashes)
        super().__init__(table.bits, table.groups + first, table.steps)
