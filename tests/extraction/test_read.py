"""mim_ray/extraction/read.py and embed.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mim_ray.data.transforms import PictureFormat, content_hash, decode_image
from mim_ray.errors import TrainingError
from mim_ray.extraction.embed import Embedder
from mim_ray.extraction.plan import plan
from mim_ray.extraction.read import Decoding, read_unit

DECODING = Decoding(PictureFormat(8, "squash"), 100_000, 10_000, 40, "/nowhere")


def prepared(tmp_path: Path, make_items: Callable[..., str], **replaced: Any) -> pa.Table:
    uri = make_items(tmp_path, num=30, row_group_rows=30, files=1, **replaced)
    return pa.concat_tables([block for unit in plan(uri, 16, ["v1"]) for block in read_unit(unit, DECODING, 5)])


def test_every_row_comes_out_once_with_what_an_encoder_takes(tmp_path: Path, make_items: Callable[..., str]) -> None:
    table = prepared(tmp_path, make_items)
    assert table["item_id"].to_pylist() == [f"item-{number}" for number in range(30)]
    assert table["row"].to_pylist() == [*range(16), *range(14)]
    assert table["category"].to_pylist()[:4] == ["c0", "c1", "c2", "c0"]
    assert table["drop_reason"].null_count == 30
    row = table.slice(7, 1).to_pylist()[0]
    uri = next(iter(plan(str(tmp_path / "items.parquet"), 16, ["v1"]))).shard.read(["image"])["image"][7].as_py()
    assert row["pixels"] == decode_image(uri, PictureFormat(8, "squash")).tobytes()
    assert row["content_hash"] == content_hash("title number 7", uri)


def test_unusable_content_is_named_and_the_rest_goes_on(tmp_path: Path, make_items: Callable[..., str]) -> None:
    table = prepared(
        tmp_path,
        make_items,
        image={1: b"\x89PNG broken", 2: None, 3: b"GIF89a", 4: None, 5: b"", 6: b"x" * 100_001, 7: None},
        image_uri={7: "http://169.254.169.254/"},
        title={1: None, 3: "  ", 4: None, 5: " a \n b ", 8: None, 9: "x" * 50},
        item_id={10: None, 11: "item-0"},
    )
    rows = table.to_pylist()
    reasons = {number: (rows[number]["image_reason"], rows[number]["drop_reason"]) for number in range(12)}
    assert reasons == {
        0: (None, None),
        1: ("image corrupt", "no content"),
        2: (None, None),
        3: ("image format", "no content"),
        4: (None, "no content"),
        5: (None, None),
        6: ("image too large", None),
        7: ("image_uri outside data.images_root", None),
        8: (None, None),
        9: (None, None),
        10: (None, "no item id"),
        11: (None, "duplicate item id"),
    }
    assert rows[5]["title"] == "a b"
    assert len(rows[9]["title"]) == 40
    assert rows[6]["content_hash"] == content_hash("title number 6", None)


def test_the_embedder_gives_a_vector_to_usable_rows_only(
    tmp_path: Path, make_items: Callable[..., str], stand_in: Callable[..., Any]
) -> None:
    table = prepared(tmp_path, make_items, image={2: None, 4: None}, title={4: None, 6: None})
    embed = Embedder("uri", 8, False, stand_in())
    whole = embed(table)
    assert "pixels" not in whole.column_names
    vectors = whole["embedding"].to_pylist()
    assert [row for row, vector in enumerate(vectors) if vector is None] == [4]
    images = np.frombuffer(table["pixels"][6].as_py(), np.uint8)
    plain = np.array([0, 0, images.mean(), 1.0])
    np.testing.assert_allclose(vectors[6], plain / np.linalg.norm(plain), rtol=1e-5)
    pieces = [embed(table.slice(start, 7))["embedding"].to_pylist() for start in range(0, 30, 7)]
    assert [vector for piece in pieces for vector in piece] == vectors
    nothing = embed(table.slice(4, 1))
    assert nothing["embedding"].to_pylist() == [None]


def test_an_embedding_that_is_not_finite_stops_the_job(tmp_path: Path, make_items: Callable[..., str]) -> None:
    table = prepared(tmp_path, make_items)
    embed = Embedder("uri", 8, False, lambda uri, use_gpu: lambda t, i, h: np.full((len(t), 2), np.nan, np.float32))
    with pytest.raises(TrainingError, match="not finite"):
        embed(table)
