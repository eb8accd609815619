"""Where the purchased item ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mim_ray.config.scenario import Data
from mim_ray.csft.chunks import Pairs
from mim_ray.csft.items import GalleryChunks, ItemLoader, Items, eligible
from mim_ray.csft.retrieval import HeldOut, ages, ahead_and_tied, embed_items, mean_drift, measure
from mim_ray.data.catalogue import Catalogue
from mim_ray.encoders import ItemEncoder


def test_items_ahead_and_tied_by_hand() -> None:
    items = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    positive = [1, 1, 0]
    best = (queries * items[positive]).sum(1)
    counted = torch.ones(3, 5, dtype=torch.bool)
    counted[torch.arange(3), positive] = False  # the positive itself
    ahead, tied = ahead_and_tied(queries, items, best, counted)
    assert ahead.tolist() == [1, 1, 2]
    assert tied.tolist() == [0, 0, 1]  # the third query: item 3; the item of zeros lacks the modality


def test_an_encoder_that_collapsed_gets_the_middle_rank() -> None:
    ahead, tied = ahead_and_tied(
        torch.ones(2, 3), torch.ones(8, 3), torch.full((2,), 3.0), torch.ones(2, 8, dtype=torch.bool)
    )
    assert (1 + ahead + tied / 2).tolist() == [5.0, 5.0]  # of nine


def test_ranks_over_the_whole_catalogue_equal_a_loop(samples: str, encoder_uri: str) -> None:
    encoder, catalogue = ItemEncoder.load(encoder_uri), Catalogue.open(f"{samples}/catalogue")
    loader = ItemLoader(catalogue, encoder.picture, Data())
    bought, asked = np.array([3, 7, 8, 20, 7]), np.array([-1, 5, -1, 44, 9])
    pixels = loader.items(np.array([15, 5, 20, 44, 9])).pixels
    held_out = HeldOut(Pairs(pixels, bought, np.zeros(5, np.uint64), asked), loader.items(bought))
    chunks = [
        GalleryChunks(samples, encoder.picture, Data(), 2**62, None, 0, rank, 2, chunk_items=7) for rank in range(2)
    ]
    parts = [Items.of_chunk(chunk.open()(i)) for chunk in chunks for i in range(chunk.num_chunks(catalogue))]
    assert sorted(np.concatenate([part.rows for part in parts]).tolist()) == list(range(60))
    levels, num_items = measure(encoder, held_out, parts)
    assert num_items == 60
    with torch.no_grad():
        items = torch.nn.functional.normalize(embed_items(encoder, loader.items(np.arange(60))), dim=-1)
        queries = torch.nn.functional.normalize(encoder.encode_image(torch.from_numpy(pixels)), dim=-1)
    for index, level in enumerate(("mm", "text", "image")):
        ranks = []
        for query, item, own in zip(queries, bought, asked, strict=True):
            if items[item, index].abs().sum() == 0:
                continue  # item 7 has no picture, item 8 no title
            rank = 1.0
            for other in range(60):
                if other in (item, own) or items[other, index].abs().sum() == 0:
                    continue
                gap = float(query @ items[other, index] - query @ items[item, index])
                rank += 1.0 if gap > 1e-6 else 0.5 if gap >= -1e-6 else 0.0
            ranks.append(rank)
        assert levels[level]["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]), rel=1e-6)
        assert levels[level]["recall@10"] == pytest.approx(np.mean([rank <= 10 for rank in ranks]))


def test_a_large_catalogue_is_sampled_the_same_way_by_all_workers(samples: str, encoder_uri: str) -> None:
    catalogue, picture = Catalogue.open(f"{samples}/catalogue"), ItemEncoder.load(encoder_uri).picture
    rows = [GalleryChunks(samples, picture, Data(), 2**62, 10, 0, rank, 2).rows(catalogue) for rank in range(2)]
    assert len(rows[0]) == 10
    assert (rows[0] == rows[1]).all()
    assert len(eligible(catalogue, 0)) == 0


def test_drift_is_the_mean_cosine() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert mean_drift(x, 3 * x) == 1.0
    assert mean_drift(x, torch.tensor([[0.0, 1.0], [0.0, 1.0]])) == 0.5
    assert (list(ages(0)), list(ages(1)), list(ages(10))) == ([], [1], [1, 5, 10])
