"""Batches of pairs: what is in them, what is left out, and that they are a function of seed, rank and step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_ray.config.scenario import Csft, Data
from mim_ray.csft.chunks import CHUNK_PAIRS, PAIR_COLUMNS, PairChunks, PairReader
from mim_ray.csft.dataset import PairBatch, PairBatches, Position
from mim_ray.csft.items import ItemLoader
from mim_ray.csft.training_pairs import pair_counts, save_counts
from mim_ray.csft.user_items import UserItems
from mim_ray.data.catalogue import Catalogue, write_catalogue
from mim_ray.data.feeding import ordered_chunks
from mim_ray.data.ids import hash_ids
from mim_ray.data.transforms import PictureFormat
from mim_ray.errors import DataError

PICTURE = PictureFormat(16, "squash")


@pytest.fixture(scope="module")
def catalogue(samples: str) -> Catalogue:
    return Catalogue.open(f"{samples}/catalogue")


@pytest.fixture(scope="module")
def loader(catalogue: Catalogue) -> ItemLoader:
    return ItemLoader(catalogue, PICTURE, Data())


@pytest.fixture(scope="module")
def user_items(samples: str, catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("user_items"))
    save_inputs(samples, catalogue, uri)
    return uri


def save_inputs(samples: str, catalogue: Catalogue, uri: str) -> None:
    UserItems.bought(f"{samples}/interest_pairs", catalogue).save(f"{uri}/bought")
    save_counts(f"{uri}/counts", pair_counts(f"{samples}/interest_pairs", catalogue, Csft(held_out_ratio=0.2)))


def make_chunks(samples: str, user_items: str, rank: int = 0, world: int = 1, **settings: Any) -> PairChunks:
    values = {"held_out_ratio": 0.2, "modality_dropout": 0.0} | settings
    counts = f"{user_items}/counts"
    return PairChunks(samples, user_items, counts, Csft(**values), Data(), PICTURE, 2**62, 0, rank, world)


def make_batches(chunks: PairChunks, position: Position | None = None) -> PairBatches:
    position = position or Position()
    stream = ordered_chunks(chunks, position.chunk, None, num_decoders=0, cpus_per_decoder=1)
    return PairBatches(stream, position, 16, chunks.rows().steps_per_epoch)


def take(batches: PairBatches, num: int) -> list[tuple[PairBatch, Position]]:
    return [(batches.next(), batches.position) for _ in range(num)]


def test_a_batch_holds_positives_and_hard_negatives_of_their_category_that_the_user_did_not_buy(
    samples: str, user_items: str, catalogue: Catalogue
) -> None:
    category = catalogue.category_codes[0]
    batches = make_batches(make_chunks(samples, user_items))
    for batch, _ in take(batches, 5):
        positives, hard = (group.rows for group in batch.groups)
        assert batch.query_pixels.shape == (16, 3, 16, 16)
        assert (category[positives] == category[hard]).all()
        bought = set(zip(batch.bought[0].tolist(), batch.bought[1].tolist(), strict=True))
        assert all((n, positives[n]) in bought and (n, hard[n]) not in bought for n in range(16))
    assert batches.num_other_category == 0
    (batch, _) = take(make_batches(make_chunks(samples, user_items, hard_negatives=False)), 1)[0]
    assert len(batch.groups) == 1


def test_hard_negatives_follow_the_counted_pairs_of_each_item(
    samples: str, user_items: str, catalogue: Catalogue
) -> None:
    counts = np.load(f"{user_items}/counts/counts.npy")
    mean = {}
    for power in (0.0, 1.0):
        chunks = make_chunks(samples, user_items, hard_negative_power=power)
        make = chunks.open()
        drawn = np.concatenate([make(number)["items1.rows"] for number in range(9)])
        mean[power] = counts[drawn].mean()
    assert mean[0.0] == pytest.approx(counts.mean(), rel=0.15)
    assert mean[1.0] == pytest.approx((counts**2).sum() / counts.sum(), rel=0.15)
    assert mean[1.0] > mean[0.0] + 0.5


def test_pairs_come_at_most_once_in_an_epoch_and_none_is_held_out(
    samples: str, user_items: str, loader: ItemLoader
) -> None:
    reader = PairReader(loader, Csft(held_out_ratio=0.2))
    table = pq.read_table(f"{samples}/interest_pairs", columns=PAIR_COLUMNS)
    (train, _), (held_out, _) = (reader.usable(table, held_out=part) for part in (False, True))
    assert len(train) + len(held_out) == table.num_rows
    assert 20 <= len(held_out) <= 80
    again = reader.held_out(f"{samples}/interest_pairs", 10)
    assert again is not None
    assert (again.items == held_out.items[:10]).all()
    chunks = make_chunks(samples, user_items)
    assert chunks.rows().steps_per_epoch == 240 // CHUNK_PAIRS
    make = chunks.open()
    seen = np.concatenate([make(number)["items0.rows"] for number in range(240 // CHUNK_PAIRS)])
    counts, want = np.bincount(seen, minlength=60), np.bincount(train.items, minlength=60)
    assert (counts <= want).all()
    assert len(seen) > 0.7 * len(train)


def test_a_run_that_goes_on_from_a_position_sees_the_same_batches(samples: str, user_items: str) -> None:
    chunks = make_chunks(samples, user_items, modality_dropout=0.3)
    whole = take(make_batches(chunks), 30)  # several epochs
    for start in (1, 11, 23):
        rest = take(make_batches(chunks, whole[start - 1][1]), 30 - start)
        for (mine, at), (theirs, there) in zip(rest, whole[start:], strict=True):
            assert (mine.query_pixels == theirs.query_pixels).all()
            for group, other in zip(mine.groups, theirs.groups, strict=True):
                assert (group.rows == other.rows).all()
                assert (group.has_text == other.has_text).all()
                assert group.titles == other.titles
            assert (mine.bought[0] == theirs.bought[0]).all()
            assert at == there


def test_ranks_see_different_pairs(samples: str, user_items: str, loader: ItemLoader) -> None:
    first, second = (take(make_batches(make_chunks(samples, user_items, rank, 2)), 3) for rank in (0, 1))
    mine = {batch.query_pixels[n].tobytes() for batch, _ in first for n in range(16)}
    theirs = {batch.query_pixels[n].tobytes() for batch, _ in second for n in range(16)}
    of_items = {
        picture.tobytes() for picture in loader.pictures.take(np.arange(60))[0]
    }  # of built pairs, may come again
    assert not mine & theirs - of_items


def test_an_item_never_loses_both_modalities(loader: ItemLoader) -> None:
    rows = np.arange(60)
    everything = np.ones(60, bool)
    whole = loader.items(rows)
    assert np.flatnonzero(~whole.has_image).tolist() == [7]
    assert np.flatnonzero(~whole.has_text).tolist() == [8]
    dropped = loader.items(rows, drop_image=everything, drop_text=everything)
    assert (dropped.has_image ^ dropped.has_text).all()
    assert not dropped.has_image[7]
    assert not dropped.has_text[8]
    assert np.flatnonzero(dropped.has_image).tolist() == [8]  # the picture goes first, the title is then kept


def test_pairs_that_cannot_be_used_are_named(samples: str, loader: ItemLoader) -> None:
    good = pq.read_table(f"{samples}/interest_pairs", columns=PAIR_COLUMNS).slice(1, 1).to_pylist()[0]
    rows = [
        good,
        {**good, "item_id": "nothing"},
        {**good, "query_image": b"no picture"},
        {**good, "query_image": None},
        {**good, "query_image": None, "query_item_id": "item7"},
        {**good, "query_image": None, "query_item_id": "item9"},
    ]
    table = pa.Table.from_pylist(rows, pq.read_schema(f"{samples}/interest_pairs/part-0.parquet")).select(PAIR_COLUMNS)
    usable, rejects = PairReader(loader, Csft(held_out_ratio=0.0)).usable(table, held_out=False)
    assert usable.query_items.tolist() == [-1, 9]
    assert [reason for _, reason in rejects] == [
        "unknown item", "query image corrupt", "no query image", "no query image",
    ]  # fmt: skip
    assert rejects[0][0] == f"{good['user_id']} nothing {good['timestamp']}"


def test_broken_pictures_are_replaced_from_the_stream_and_listed(samples: str, tmp_path: Path) -> None:
    """Item 9 has a title beside its broken picture, item 10 has nothing else."""
    whole = Catalogue.open(f"{samples}/catalogue")
    items = whole.take(np.arange(60)).to_pylist()
    for item in (9, 10):
        items[item]["image"] = b"\x89PNG broken"
    items[10]["title"] = None
    write_catalogue(f"{tmp_path}/catalogue", [pa.Table.from_pylist(items)])
    (tmp_path / "interest_pairs").symlink_to(f"{samples}/interest_pairs")
    catalogue = Catalogue.open(f"{tmp_path}/catalogue")
    save_inputs(samples, catalogue, str(tmp_path))
    batches = make_batches(make_chunks(str(tmp_path), str(tmp_path), held_out_ratio=0.0))
    seen = [batch for batch, _ in take(batches, 14)]
    rows = np.concatenate([group.rows for batch in seen for group in batch.groups])
    assert 9 in rows
    assert 10 not in rows
    assert all(len(batch) == 16 for batch in seen)
    assert not np.concatenate([group.has_image for batch in seen for group in batch.groups])[rows == 9].any()
    assert {key for key, reason in batches.rejects.items() if reason == "image corrupt"} == {"item9", "item10"}


def test_only_the_wanted_signal_is_used_and_none_at_all_is_said(
    samples: str, user_items: str, loader: ItemLoader
) -> None:
    table = pq.read_table(f"{samples}/interest_pairs", columns=PAIR_COLUMNS)
    reader = PairReader(loader, Csft(supervision="click", held_out_ratio=0.0))
    assert len(reader.usable(table, held_out=False)[0]) == 48
    with pytest.raises(DataError, match="No interest pair can be trained on"):
        make_batches(make_chunks(samples, user_items, held_out_ratio=0.999999)).next()


def test_binary_supervision_brings_items_that_the_user_saw_and_did_not_click(
    samples: str, user_items: str, catalogue: Catalogue, tmp_path: Path
) -> None:
    impressions = pa.table(
        {
            "user_id": ["user1", "user1", "user2", "user2", "user3"],
            "item_id": ["item1", "item2", "item3", "item4", "gone"],
            "label": pa.array([0, 1, 0, 0, 0], pa.int8()),
            "drawn": [False, False, True, None, False],
        }
    )
    pq.write_table(impressions, tmp_path / "i.parquet")
    shown = UserItems.shown_not_clicked(str(tmp_path), catalogue)
    place, rows = shown.draw(hash_ids(["user2", "user3", "user1"]), np.random.default_rng(0))
    assert (place.tolist(), rows.tolist()) == ([0, 2], [4, 1])
    shown.save(f"{user_items}/shown")
    users = pq.read_table(f"{samples}/interest_pairs", columns=["user_id"]).column(0).to_pylist()
    batches = make_batches(make_chunks(samples, user_items, supervision="purchase-binary"))
    found = [batch.shown for batch, _ in take(batches, 12)]
    assert {1, 4} >= {int(row) for _, items in found for row in items.rows}  # type: ignore[misc]
    assert sum(len(places) for places, _ in found) >= 1  # type: ignore[misc]
    assert users.count("user1") + users.count("user2") > 2


@pytest.mark.ray
def test_chunks_through_ray_data_equal_those_of_a_thread(ray_cluster: None, samples: str, user_items: str) -> None:
    chunks = make_chunks(samples, user_items, modality_dropout=0.3)
    here = ordered_chunks(chunks, 3, 9, num_decoders=0, cpus_per_decoder=1)
    there = ordered_chunks(chunks, 3, 9, num_decoders=2, cpus_per_decoder=0)
    for mine, theirs in zip(here, there, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(mine[name].dtype == theirs[name].dtype for name in mine)
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine)


def test_user_items_are_those_bought_and_those_of_built_queries(
    samples: str, catalogue: Catalogue, tmp_path: Path
) -> None:
    UserItems.bought(f"{samples}/interest_pairs", catalogue).save(str(tmp_path))
    bought = UserItems.open(str(tmp_path))
    users = ["user3", "nobody", "user5"]
    place, items = bought.of(hash_ids(users))
    rows = pq.read_table(f"{samples}/interest_pairs").to_pylist()
    for number, user in enumerate(users):
        want = {r["item_id"] for r in rows if r["user_id"] == user}
        want |= {r["query_item_id"] for r in rows if r["user_id"] == user and r["query_item_id"]}
        assert {f"item{i}" for i in items[place == number]} == want
