"""Batches of pairs: what is in them, what is left out, and that they are a function of seed, rank and step."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mim_ray.config.scenario import Data
from mim_ray.csft.dataset import PAIR_COLUMNS, ItemLoader, PairBatches, PairSource, Signal
from mim_ray.csft.negatives import HardNegativeSampler
from mim_ray.csft.purchases import Purchases
from mim_ray.data.batches import RowBatches
from mim_ray.data.catalogue import Catalogue
from mim_ray.data.ids import hash_ids
from mim_ray.encoders import ItemEncoder
from mim_ray.errors import DataError


@pytest.fixture(scope="module")
def catalogue(samples: str) -> Catalogue:
    return Catalogue.open(f"{samples}/catalogue")


@pytest.fixture(scope="module")
def loader(catalogue: Catalogue, encoder_uri: str) -> ItemLoader:
    return ItemLoader(catalogue, ItemEncoder.load(encoder_uri), Data())


def make_batches(
    samples: str, loader: ItemLoader, *, rank: int = 0, world: int = 1, dropout: float = 0.0, signal: Signal = "any"
) -> PairBatches:
    catalogue = loader.catalogue
    pairs = f"{samples}/interest_pairs"
    return PairBatches(
        PairSource(loader, signal=signal, held_out_ratio=0.2),
        RowBatches(pairs, PAIR_COLUMNS, 16, 0, rank, world),
        Purchases.of_pairs(pairs, catalogue),
        HardNegativeSampler(
            catalogue.category_codes[0], np.arange(catalogue.num_items), np.ones(catalogue.num_items, bool)
        ),
        batch_size=16,
        modality_dropout=dropout,
        seed=0,
        rank=rank,
    )


def test_a_batch_holds_positives_then_hard_negatives_of_their_category_that_the_user_did_not_buy(
    samples: str, loader: ItemLoader
) -> None:
    category = loader.catalogue.category_codes[0]
    for batch in make_batches(samples, loader).steps(5):
        rows = batch.items.rows.numpy()
        assert batch.query_pixels.shape == (16, 3, 16, 16)
        assert rows.shape == (32,)
        assert (category[rows[:16]] == category[rows[16:]]).all()
        bought = set(zip(batch.bought[0].tolist(), batch.bought[1].tolist(), strict=True))
        assert all((n, rows[n]) in bought and (n, rows[16 + n]) not in bought for n in range(16))
        assert batch.num_other_category == 0


def test_every_pair_that_is_not_held_out_comes_once_in_an_epoch(samples: str, loader: ItemLoader) -> None:
    source = PairSource(loader, signal="any", held_out_ratio=0.2)
    table = pq.read_table(f"{samples}/interest_pairs", columns=PAIR_COLUMNS)
    train, held_out = source.usable(table, held_out=False), source.usable(table, held_out=True)
    assert len(train) + len(held_out) == table.num_rows
    assert 20 <= len(held_out) <= 80
    again = source.held_out(f"{samples}/interest_pairs", 10)
    assert again is not None
    assert (again.items == held_out.items[:10]).all()
    steps = list(make_batches(samples, loader).steps(len(train) // 16))
    seen = np.concatenate([batch.items.rows[:16].numpy() for batch in steps])
    counts, want = np.bincount(seen, minlength=60), np.bincount(train.items, minlength=60)
    assert (counts <= want).all()


def test_a_run_that_goes_on_from_a_position_sees_the_same_batches(samples: str, loader: ItemLoader) -> None:
    whole = list(make_batches(samples, loader, dropout=0.3).steps(30))  # several epochs
    for start in (1, 11, 23):
        rest = make_batches(samples, loader, dropout=0.3).steps(30, start, whole[start - 1].next)
        for mine, theirs in zip(rest, whole[start:], strict=True):
            assert torch.equal(mine.query_pixels, theirs.query_pixels)
            assert torch.equal(mine.items.rows, theirs.items.rows)
            assert torch.equal(mine.items.has_text, theirs.items.has_text)


def test_ranks_see_different_pairs_in_equally_many_steps(samples: str, loader: ItemLoader) -> None:
    first, second = (list(make_batches(samples, loader, rank=rank, world=2).steps(4)) for rank in (0, 1))
    assert [len(batch.items.rows) for batch in first] == [len(batch.items.rows) for batch in second]
    mine = {batch.query_pixels[n].numpy().tobytes() for batch in first for n in range(16)}
    theirs = {batch.query_pixels[n].numpy().tobytes() for batch in second for n in range(16)}
    of_items = {picture.tobytes() for picture in loader.pictures(np.arange(60))[0]}  # of built pairs, may come again
    assert not mine & theirs - of_items


def test_an_item_never_loses_both_modalities(samples: str, loader: ItemLoader) -> None:
    rows = np.arange(60)
    everything = np.ones(60, bool)
    whole = loader.items(rows)
    assert [int(n) for n in (~whole.has_image).nonzero()] == [7]
    assert [int(n) for n in (~whole.has_text).nonzero()] == [8]
    dropped = loader.items(rows, drop_image=everything, drop_text=everything)
    assert (dropped.has_image ^ dropped.has_text).all()
    assert not dropped.has_image[7]
    assert not dropped.has_text[8]
    assert [int(n) for n in dropped.has_image.nonzero()] == [8]  # the picture goes first, the title is then kept


def test_pairs_that_cannot_be_used_are_counted(samples: str, loader: ItemLoader) -> None:
    good = pq.read_table(f"{samples}/interest_pairs", columns=PAIR_COLUMNS).slice(1, 1).to_pylist()[0]
    rows = [
        good,
        {**good, "item_id": "nothing"},
        {**good, "query_image": b"no picture"},
        {**good, "query_image": None},
        {**good, "query_image": None, "query_item_id": "item7"},
        {**good, "query_image": None, "query_item_id": "item9"},
    ]
    source = PairSource(loader, signal="any", held_out_ratio=0.0)
    table = pa.Table.from_pylist(rows, pq.read_schema(f"{samples}/interest_pairs/part-0.parquet")).select(PAIR_COLUMNS)
    usable = source.usable(table, held_out=False)
    assert usable.query_items.tolist() == [-1, 9]
    assert source.rejected == {"unknown item": 1, "query image corrupt": 1, "no query image": 2}


def test_only_the_wanted_signal_is_used_and_none_at_all_is_said(samples: str, loader: ItemLoader) -> None:
    table = pq.read_table(f"{samples}/interest_pairs", columns=PAIR_COLUMNS)
    clicks = PairSource(loader, signal="click", held_out_ratio=0.0).usable(table, held_out=False)
    assert len(clicks) == 48
    batches = make_batches(samples, loader)
    batches._source = PairSource(loader, signal="any", held_out_ratio=1.0)
    with pytest.raises(DataError, match="No interest pair can be trained on"):
        next(batches.steps(1))


def test_purchases_know_items_and_the_items_of_built_queries(samples: str, catalogue: Catalogue, tmp_path: str) -> None:
    Purchases.of_pairs(f"{samples}/interest_pairs", catalogue).save(str(tmp_path))
    purchases = Purchases.open(str(tmp_path))
    users = ["user3", "nobody", "user5"]
    place, items = purchases.of(hash_ids(users))
    rows = pq.read_table(f"{samples}/interest_pairs").to_pylist()
    for number, user in enumerate(users):
        want = {r["item_id"] for r in rows if r["user_id"] == user}
        want |= {r["query_item_id"] for r in rows if r["user_id"] == user and r["query_item_id"]}
        assert {f"item{i}" for i in items[place == number]} == want
