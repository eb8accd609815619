"""Which pairs are trained on, and how many of each item."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_ray.config.scenario import Csft, Data
from mim_ray.csft.chunks import PAIR_COLUMNS, PairReader
from mim_ray.csft.items import ItemLoader
from mim_ray.csft.training_pairs import chosen, open_counts, pair_counts, save_counts
from mim_ray.data.catalogue import Catalogue
from mim_ray.data.transforms import PictureFormat


@pytest.mark.parametrize("supervision", ["any", "click", "purchase"])
def test_counts_are_those_of_the_pairs_that_are_trained_on(samples: str, supervision: str) -> None:
    catalogue = Catalogue.open(f"{samples}/catalogue")
    settings = Csft(supervision=supervision, held_out_ratio=0.3)
    table = pq.read_table(f"{samples}/interest_pairs", columns=PAIR_COLUMNS)
    reader = PairReader(ItemLoader(catalogue, PictureFormat(16, "squash"), Data()), settings)
    train, rejects = reader.usable(table, held_out=False)
    assert not rejects
    want = np.zeros(catalogue.num_items, int)
    for item in train.items:
        want[item] += 1
    counts = pair_counts(f"{samples}/interest_pairs", catalogue, settings)
    assert counts.tolist() == want.tolist()
    assert 0 < counts.sum() < chosen(table, Csft(supervision=supervision, held_out_ratio=0.0), held_out=False).sum()


def test_a_pair_is_trained_on_or_held_out_and_items_outside_the_catalogue_do_not_count(
    samples: str, tmp_path: Path
) -> None:
    table = pq.read_table(f"{samples}/interest_pairs", columns=PAIR_COLUMNS)
    settings = Csft(held_out_ratio=0.3)
    assert (chosen(table, settings, held_out=True) != chosen(table, settings, held_out=False)).all()
    unknown = table.set_column(table.schema.get_field_index("item_id"), "item_id", pa.array(["gone"] * table.num_rows))
    pq.write_table(unknown, tmp_path / "pairs.parquet")
    assert not pair_counts(str(tmp_path), Catalogue.open(f"{samples}/catalogue"), settings).any()


def test_saved_counts_are_read_back(tmp_path: Path) -> None:
    save_counts(str(tmp_path), np.array([3, 0, 7]))
    assert open_counts(str(tmp_path)).tolist() == [3, 0, 7]
