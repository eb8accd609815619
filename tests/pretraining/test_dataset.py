import pickle

import numpy as np
import pyarrow as pa
import pytest

from mim_ray.data.catalogue import Catalogue, write_catalogue
from mim_ray.data.decoded import DecodedPictures
from mim_ray.data.feeding import ordered_chunks
from mim_ray.data.pictures import render
from mim_ray.data.transforms import PictureFormat
from mim_ray.errors import DataError
from mim_ray.pretraining.dataset import (
    Batches,
    BatchSource,
    Content,
    Share,
    choose_items,
    content_keys,
    titles_in,
    titles_of,
)

from_late = 360
CUT_US = 1_000_000


def pictures_of(catalogue: Catalogue, cache_bytes: int = 2**20) -> DecodedPictures:
    return DecodedPictures(catalogue, PictureFormat(16, "squash"), 10**6, 10**7, cache_bytes)


def content_of(catalogue: Catalogue) -> Content:
    return Content(str(catalogue._folder), PictureFormat(16, "squash"), 10**6, 10**7, CUT_US)


def batches_of(
    catalogue: Catalogue, phase: str, seed: int = 0, rank: int = 0, world: int = 2, size: int = 32
) -> Batches:
    return BatchSource(content_of(catalogue), phase, Share(size, seed, rank, world)).open()


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
        assert kept.take(rows)[1].all()


@pytest.fixture
def broken(tmp_path) -> Catalogue:
    """20 items, each third with a picture that cannot be decoded."""
    images = [b"broken" if i % 3 == 0 else render(i, 0, i, 24) for i in range(20)]
    table = pa.table(
        {
            "item_id": [f"i{i}" for i in range(20)],
            "title": [f"title {i}" for i in range(20)],
            "categories": ["x"] * 20,
            "image": images,
            "created_at": pa.array([0] * 20, pa.timestamp("us", "UTC")),
        }
    )
    write_catalogue(str(tmp_path), [table])
    return Catalogue.open(str(tmp_path))


def test_broken_pictures_are_replaced_from_the_stream_with_their_titles_and_told(broken):
    batches = batches_of(broken, "alignment", world=1, size=16)
    allowed = set(choose_items(broken, CUT_US).with_both)
    batch = batches(0)
    assert len(batch["rows"]) == 16
    assert all(row % 3 for row in batch["rows"])
    assert set(batch["rows"]) <= allowed
    assert {row for row in batches.rows_of(0) if row % 3 == 0} <= set(batch["broken"])
    assert all(row % 3 == 0 for row in batch["broken"])
    assert titles_in(batch) == [f"title {row}" for row in batch["rows"]]
    np.testing.assert_array_equal(batch["pixels"], pictures_of(broken).take(batch["rows"])[0])
    np.testing.assert_array_equal(batch["rows"], batches_of(broken, "alignment", world=1, size=16)(0)["rows"])


def test_when_no_picture_can_be_decoded_a_sentence_says_so(tmp_path):
    table = pa.table({"item_id": ["a", "b"], "categories": ["x"] * 2, "image": [b"1", b"2"]})
    table = table.append_column("created_at", pa.array([0, 0], pa.timestamp("us", "UTC")))
    write_catalogue(str(tmp_path), [table])
    with pytest.raises(DataError, match=r"none could be decoded.*Run the samples stage again"):
        batches_of(Catalogue.open(str(tmp_path)), "image", world=1)(0)


def test_missing_titles_are_empty(catalogue):
    assert titles_of(catalogue, np.array([4]))[0] == ""


def test_a_step_is_a_function_of_its_number_in_any_process(catalogue):
    batches = batches_of(catalogue, "alignment", rank=1)
    in_order = [batches(step)["rows"].tolist() for step in range(12)]
    assert batches(7)["rows"].tolist() == in_order[7]
    assert batches_of(catalogue, "alignment", seed=1, rank=1)(7)["rows"].tolist() != in_order[7]
    assert batches_of(catalogue, "image", rank=1)(7)["rows"].tolist() != in_order[7]


def test_a_source_travels_light_and_makes_the_same_batches(catalogue):
    source = BatchSource(content_of(catalogue), "alignment", Share(32, 0, 1, 2))
    travelling = pickle.dumps(source)
    assert len(travelling) < 1_000
    again = pickle.loads(travelling)  # noqa: S301  (made here)
    assert hash(again) == hash(source)
    mine, other = source.open()(7), again.open()(7)
    assert all(np.array_equal(mine[name], other[name]) for name in mine)
    chunks = ordered_chunks(source, 5, 8, num_decoders=0, cpus_per_decoder=0.0)
    assert [chunk["rows"].tolist() for chunk in chunks][2] == mine["rows"].tolist()


def test_workers_share_an_epoch_without_overlap(catalogue):
    workers = [batches_of(catalogue, "text", rank=rank) for rank in (0, 1)]
    per_epoch = len(workers[0].rows) // 2 // 32
    rows = [[row for step in range(per_epoch) for row in worker.rows_of(step)] for worker in workers]
    assert len(rows[0]) == len(set(rows[0])) == len(rows[1])
    assert not set(rows[0]) & set(rows[1])
    assert workers[0].rows_of(per_epoch).tolist() != workers[0].rows_of(0).tolist()  # a new order


def test_with_fewer_items_than_a_batch_every_worker_has_as_many(catalogue):
    few = batches_of(catalogue, "text", size=10)
    few.rows = np.array([3, 4, 5])
    assert len(few.rows_of(0)) == len(few.rows_of(5)) == 1
    few.rows = np.zeros(0, np.int64)
    with pytest.raises(DataError, match="No items are left"):
        few.rows_of(0)


def test_keys_are_equal_where_title_or_picture_is(tmp_path):
    images = [b"1", b"1", b"2", None]
    table = pa.table(
        {"item_id": list("abcd"), "categories": ["x"] * 4, "image": images, "title": ["A", "B", "A", None]}
    )
    write_catalogue(str(tmp_path), [table])
    keys = content_keys(Catalogue.open(str(tmp_path)), np.arange(4))
    assert keys.shape == (4, 2)
    assert (keys[:, 0] == keys[0, 0]).tolist() == [True, False, True, False]
    assert (keys[:, 1] == keys[0, 1]).tolist() == [True, True, False, False]
