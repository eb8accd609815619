"""mim_ray/extraction/read.py and embed.py."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from mim_ray.data.schema import TIME
from mim_ray.data.transforms import PictureFormat, content_hash, decode_image
from mim_ray.errors import TrainingError
from mim_ray.extraction.embed import embed, resolve
from mim_ray.extraction.plan import plan
from mim_ray.extraction.read import Decoding, ShardReader, with_content_times


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


DECODING = Decoding(PictureFormat(8, "squash"), 100_000, 10_000, 40, "/nowhere")


def prepared(tmp_path: Path, make_items: Callable[..., str], **replaced: Any) -> pa.Table:
    uri = make_items(tmp_path, num=30, row_group_rows=30, files=1, **replaced)
    (unit,) = plan(uri, 16, ["v1"]).units(set())
    reader = ShardReader(unit, DECODING, None, 5)
    return pa.concat_tables([block for piece in unit.slices for block in reader.read(piece)])


def test_every_row_comes_out_once_with_what_an_encoder_takes(tmp_path: Path, make_items: Callable[..., str]) -> None:
    table = prepared(tmp_path, make_items)
    assert table["item_id"].to_pylist() == [f"item-{number}" for number in range(30)]
    assert table["row"].to_pylist() == [*range(16), *range(14)]
    assert table["category"].to_pylist()[:4] == ["c0", "c1", "c2", "c0"]
    assert table["drop_reason"].null_count == 30
    row = table.slice(7, 1).to_pylist()[0]
    (unit,) = plan(str(tmp_path / "items.parquet"), 16, ["v1"]).units(set())
    image = unit.rows.read(["image"])["image"][7].as_py()
    assert row["pixels"] == decode_image(image, PictureFormat(8, "squash")).tobytes()
    assert row["content_hash"] == content_hash("title number 7", image)


def test_a_shard_read_alone_or_after_any_other_is_the_same(tmp_path: Path, make_items: Callable[..., str]) -> None:
    uri = make_items(tmp_path, num=50, row_group_rows=50, files=1)
    (unit,) = plan(uri, 12, ["v1"]).units(set())
    whole = unit.rows.read(["item_id"])["item_id"].to_pylist()
    for chosen in ([0, 1, 2, 3, 4], [1, 3], [4], [2, 1, 0]):
        reader = ShardReader(unit, DECODING, None, 5)
        for piece in (unit.slices[number] for number in chosen):
            rows = pa.concat_tables(list(reader.read(piece)))
            alone = pa.concat_tables(list(ShardReader(unit, DECODING, None, 7).read(piece)))
            assert rows.equals(alone)
            assert rows["item_id"].to_pylist() == whole[piece.start : piece.stop]
            assert rows["row"].to_pylist() == list(range(piece.stop - piece.start))


def test_unusable_content_is_named_and_the_rest_goes_on(tmp_path: Path, make_items: Callable[..., str]) -> None:
    table = prepared(
        tmp_path,
        make_items,
        image={1: b"\x89PNG broken", 2: None, 3: b"BM", 4: None, 5: b"", 6: b"x" * 100_001, 7: None},
        image_uri={7: "http://169.254.169.254/"},
        title={1: None, 3: "  ", 4: None, 5: " a \n b ", 8: None, 9: "x" * 50},
        item_id={10: None, 11: "item-0", 12: "x" * 4_097},
    )
    rows = table.to_pylist()
    reasons = {number: (rows[number]["image_reason"], rows[number]["drop_reason"]) for number in range(13)}
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
        12: (None, "item id too long"),
    }
    assert rows[5]["title"] == "a b"
    assert len(rows[9]["title"]) == 40
    assert rows[6]["content_hash"] == content_hash("title number 6", None)


def test_vectors_are_given_to_usable_rows_only(
    tmp_path: Path, make_items: Callable[..., str], stand_in: Callable[..., Any]
) -> None:
    table = prepared(tmp_path, make_items, image={2: None, 4: None}, title={4: None, 6: None})
    encode = stand_in()("uri", False)
    whole = embed(table, encode, 8)
    assert "pixels" not in whole.column_names
    vectors = whole["embedding"].to_pylist()
    assert [row for row, vector in enumerate(vectors) if vector is None] == [4]
    images = np.frombuffer(table["pixels"][6].as_py(), np.uint8)
    plain = np.array([0, 0, images.mean(), 1.0])
    np.testing.assert_allclose(vectors[6], plain / np.linalg.norm(plain), rtol=1e-5)
    pieces = [embed(table.slice(start, 7), encode, 8)["embedding"].to_pylist() for start in range(0, 30, 7)]
    assert [vector for piece in pieces for vector in piece] == vectors
    nothing = embed(table.slice(4, 1), encode, 8)
    assert nothing["embedding"].to_pylist() == [None]


def test_equal_content_of_a_shard_is_decoded_and_encoded_once(
    tmp_path: Path, make_items: Callable[..., str], stand_in: Callable[..., Any]
) -> None:
    same, broken = png(99), b"\x89PNG broken"
    table = prepared(
        tmp_path,
        make_items,
        image={1: same, 9: same, 14: same, 17: same, 2: broken, 8: broken, 3: None},
        title={1: "t", 9: " t ", 14: "another", 17: "t", 2: "b", 8: "b", 3: "b"},
    ).slice(0, 16)
    assert [(row, first) for row, first in enumerate(table["same_as"].to_pylist()) if first is not None] == [
        (3, 2),  # a broken picture shows no more than none
        (8, 2),
        (9, 1),
    ]
    assert table["image_reason"].to_pylist()[2:9:6] == ["image corrupt"] * 2
    assert [row for row in (1, 2, 3, 8, 9, 14) if table["pixels"][row].is_valid] == [1, 14]
    met: list[int] = []

    def encode(titles: Any, images: Any, has_image: Any) -> Any:
        met.append(len(titles))
        return stand_in()("uri", False)(titles, images, has_image)

    rows = resolve(embed(table, encode, 8), None)
    assert met == [13]
    vectors = rows["embedding"].to_pylist()
    assert rows["embedding"].null_count == 0
    assert vectors[9] == vectors[1] != vectors[14]
    assert vectors[8] == vectors[3] == vectors[2]
    assert rows["content_hash"][9] == rows["content_hash"][1]


def test_an_embedding_that_is_not_finite_stops_the_job(tmp_path: Path, make_items: Callable[..., str]) -> None:
    table = prepared(tmp_path, make_items)
    with pytest.raises(TrainingError, match="not finite"):
        embed(table, lambda titles, images, has_image: np.full((len(titles), 2), np.nan, np.float32), 8)


def test_content_is_not_older_than_the_file_that_has_it(make_items: Callable[..., str], tmp_path: Path) -> None:
    """So that what an extraction brings after a refresh is the newer content, by the same rule."""
    uri = make_items(tmp_path, num=8, row_group_rows=8, files=1)
    written_at = datetime(2026, 1, 2, tzinfo=UTC)
    for file in [Path(uri)] if Path(uri).is_file() else Path(uri).rglob("*.parquet"):
        os.utime(file, (written_at.timestamp(), written_at.timestamp()))
    (unit,) = plan(uri, 8, ["v1"]).units(set())
    (block,) = ShardReader(unit, DECODING, None, 8).read(unit.slices[0])
    assert set(block["content_at"].to_pylist()) == {written_at}  # the items were created in 1970
    rows = pa.table({"created_at": pa.array([10, None, 2**62], TIME)})
    later = with_content_times(rows, 5)["created_at"].cast(pa.int64()).to_pylist()
    assert later == [10, 5, 5]  # created in the future: the file's time
