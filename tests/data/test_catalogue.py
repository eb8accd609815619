"""The catalogue gives back what was written, by row and by id."""

import pickle

import numpy as np
import pyarrow as pa
import pytest

from mim_ray.data import catalogue as module
from mim_ray.data.catalogue import Catalogue, write_catalogue
from mim_ray.data.ids import IdIndex, hash_ids, normal, uniform
from mim_ray.data.schema import TIME
from mim_ray.errors import ArtifactError


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_ROWS", 7)
    tables = [
        pa.table(
            {
                "item_id": [f"item-{i}" for i in rows],
                "title": [None if i % 5 == 0 else f"title {i}" for i in rows],
                "categories": [None if i % 11 == 0 else f"c{i % 3}|other" for i in rows],
                "image": pa.array([None if i % 4 == 0 else bytes([i % 256]) * (i % 50) for i in rows], pa.binary()),
                "created_at": pa.array([None if i % 9 == 0 else i * 1_000 for i in rows], TIME),
            }
        )
        for rows in (range(40), range(40, 100))
    ]
    write_catalogue(str(tmp_path / "c"), tables)
    return Catalogue.open(str(tmp_path / "c")), pa.concat_tables(tables).to_pylist()


def test_any_rows_come_back_in_the_asked_order(written):
    catalogue, items = written
    assert catalogue.num_items == 100
    rows = np.random.default_rng(0).integers(0, 100, 300)
    taken = catalogue.take(rows).to_pylist()
    for row, item in zip(rows, taken, strict=True):
        for name in ("item_id", "title", "categories", "image", "created_at"):
            assert item[name] == items[row][name]
        assert item["category"] == (None if row % 11 == 0 else f"c{row % 3}")
        assert len(item["content_hash"]) == 32
    assert catalogue.take(np.array([3]), ["title"]).to_pylist() == [{"title": "title 3"}]
    assert catalogue.take(np.array([], int)).num_rows == 0
    with pytest.raises(IndexError):
        catalogue.take(np.array([-1]))


def test_ids_are_found_and_unknown_ones_are_minus_one(written):
    catalogue, items = written
    assert catalogue.rows([item["item_id"] for item in items]).tolist() == list(range(100))
    wanted = ["item-7", "nothing", None, "item-99", "", "item-7"]
    assert catalogue.rows(wanted).tolist() == [7, -1, -1, 99, -1, 7]
    assert catalogue.rows(pa.chunked_array([wanted[:2], wanted[2:]])).tolist() == [7, -1, -1, 99, -1, 7]
    assert catalogue.rows([]).tolist() == []
    assert catalogue.ids.to_pylist() == [item["item_id"] for item in items]


def test_columns_as_arrays_say_what_is_missing(written):
    catalogue, items = written
    codes, names = catalogue.category_codes
    assert [names[code] if code >= 0 else None for code in codes] == [
        None if row % 11 == 0 else f"c{row % 3}" for row in range(100)
    ]
    assert catalogue.has_image.tolist() == [item["image"] is not None for item in items]
    assert catalogue.has_title.tolist() == [item["title"] is not None for item in items]
    assert catalogue.created_at[10] == 10_000
    assert catalogue.created_at[9] == np.iinfo(np.int64).max
    assert pickle.loads(pickle.dumps(catalogue)).rows(["item-5"]).tolist() == [5]  # noqa: S301


def test_missing_and_damaged_catalogues_are_named(tmp_path, written):
    with pytest.raises(ArtifactError, match="holds no catalogue"):
        Catalogue.open(str(tmp_path / "nothing"))
    (tmp_path / "c" / "hashes.npy").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="is damaged"):
        Catalogue.open(str(tmp_path / "c"))


def test_an_empty_catalogue_opens(tmp_path):
    write_catalogue(str(tmp_path), [])
    catalogue = Catalogue.open(str(tmp_path))
    assert catalogue.num_items == 0
    assert catalogue.rows(["a"]).tolist() == [-1]


def test_hashes_do_not_depend_on_slicing_or_neighbours():
    ids = pa.array(["", "a", "abcdefgh", "abcdefghi", "é" * 40, "a"])
    whole = hash_ids(ids)
    assert whole[1] == whole[5]
    assert len(set(whole.tolist())) == 5
    for row in range(6):
        assert hash_ids(ids.slice(row, 1))[0] == whole[row]
        assert hash_ids([ids[row].as_py()])[0] == whole[row]


def test_ids_survive_hash_collisions_and_repeats():
    ids = pa.array([f"x{i % 6}" for i in range(10)])
    order = np.arange(10)
    colliding = IdIndex(ids, np.full(10, 5, np.uint64), order)
    import mim_ray.data.ids as ids_module

    original = ids_module.hash_ids
    ids_module.hash_ids = lambda wanted: np.full(len(wanted), 5, np.uint64)
    try:
        assert colliding.rows(["x4", "x9", "x0"]).tolist() == [4, -1, 0]
    finally:
        ids_module.hash_ids = original
    assert IdIndex(ids).first_rows().tolist() == [i < 6 for i in range(10)]


def test_random_numbers_are_a_function_of_the_counter():
    counters = np.arange(200_000)
    draws = uniform(3, 1, counters)
    assert (draws == np.concatenate([uniform(3, 1, counters[:7]), uniform(3, 1, counters[7:])])).all()
    assert abs(draws.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(draws, uniform(3, 2, counters))[0, 1]) < 0.01
    assert abs(np.corrcoef(draws, uniform(4, 1, counters))[0, 1]) < 0.01
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.01
    gauss = normal(3, 1, counters)
    assert abs(gauss.mean()) < 0.01
    assert abs(gauss.std() - 1) < 0.01
