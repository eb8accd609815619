import numpy as np
import pyarrow as pa
import pytest

from mim_ray.data.catalogue import Catalogue, write_catalogue
from mim_ray.data.pictures import render
from mim_ray.data.transforms import PictureFormat
from mim_ray.pretraining.dataset import Pictures, PretrainingData, Share, choose_items, titles_of

from_late = 360
CUT_US = 1_000_000


def pictures_of(catalogue: Catalogue, cache_bytes: int = 2**20) -> Pictures:
    return Pictures(catalogue, PictureFormat(16, "squash"), 10**6, 10**7, cache_bytes)


def test_only_items_from_before_the_cut_are_used(catalogue):
    items = choose_items(catalogue, CUT_US)
    for rows in vars(items).values():
        assert rows.max() < from_late
    assert choose_items(catalogue, 0).with_image.size == 0


def test_every_known_item_is_either_trained_on_or_held_out(catalogue):
    items = choose_items(catalogue, CUT_US)
    expected = set(range(from_late))
    assert not set(items.with_title) & set(items.held_out_title)
    assert set(items.with_title) | set(items.held_out_title) == expected - {4}
    assert set(items.with_image) | set(items.held_out_image) == expected - {3}
    assert set(items.with_both) | set(items.held_out_both) == expected - {3, 4}
    assert 4 <= len(items.held_out_both) <= 40  # 5 % of 360


def test_an_item_stays_held_out_when_the_catalogue_grows(catalogue, tmp_path):
    reversed_table = catalogue.take(np.arange(catalogue.num_items)[::-1])
    write_catalogue(str(tmp_path), [reversed_table])
    other = Catalogue.open(str(tmp_path))
    first = set(catalogue.ids.take(pa.array(choose_items(catalogue, CUT_US).held_out_title)).to_pylist())
    assert first == set(other.ids.take(pa.array(choose_items(other, CUT_US).held_out_title)).to_pylist())


def test_pictures_are_the_same_with_and_without_a_cache(catalogue):
    rows = np.array([5, 9, 5, 200])
    kept, fresh = pictures_of(catalogue), pictures_of(catalogue, cache_bytes=0)
    for _ in range(2):
        np.testing.assert_array_equal(kept.take(rows)[0], fresh.take(rows)[0])
        np.testing.assert_array_equal(kept.take(rows)[1], rows)


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_an_unusable_picture_gives_way_to_the_next_usable_one_with_its_title(tmp_path, cache_bytes):
    images = [render(0, 0, 0, 24), b"broken", render(100, 0, 1, 24)]
    table = pa.table({"item_id": ["a", "b", "c"], "title": ["A", "B", "C"], "categories": ["x"] * 3, "image": images})
    write_catalogue(str(tmp_path), [table])
    catalogue = Catalogue.open(str(tmp_path))
    pictures = pictures_of(catalogue, cache_bytes)
    data = PretrainingData(catalogue, pictures, Share(3, 0, 0, 1))
    pixels, titles = data.pair(np.array([0, 1, 2]))
    assert titles == ["A", "C", "C"]
    assert (pixels[1] == pixels[2]).all()
    assert not (pixels[0] == pixels[2]).all()
    assert pictures.num_unusable == 1


def test_missing_titles_are_empty(catalogue):
    assert titles_of(catalogue, np.array([4]))[0] == ""


def test_workers_get_disjoint_batches_that_depend_on_the_seed_only(catalogue):
    rows = choose_items(catalogue, CUT_US).with_title

    def batches(seed: int, rank: int) -> list[list[str]]:
        data = PretrainingData(catalogue, pictures_of(catalogue), Share(32, seed, rank, 2))
        return list(data.titles(rows, 3))

    assert batches(0, 0) == batches(0, 0)
    assert batches(0, 0) != batches(1, 0)
    assert [len(batch) for batch in batches(0, 1)] == [32, 32, 32]
    ids = [list(PretrainingData(catalogue, pictures_of(catalogue), Share(32, 0, r, 2))._rows(rows, 3)) for r in (0, 1)]
    assert not set(np.concatenate(ids[0])) & set(np.concatenate(ids[1]))
