"""From rows of the items table to what an encoder takes: clean title, decoded picture, content hash. On CPU workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data.block import BlockMetadata
from ray.data.context import DataContext
from ray.data.datasource import Datasource, ReadTask

from mim_ray.data.event_log import is_blank
from mim_ray.data.image_files import ImageFiles
from mim_ray.data.transforms import BadImage, PictureFormat, clean_title, content_hash, decode_image
from mim_ray.extraction.plan import Unit

COLUMNS = ["item_id", "title", "category", "image", "image_uri", "created_at"]


@dataclass(frozen=True)
class Decoding:
    """How content becomes the encoder's input; part of a shard's identity."""

    picture: PictureFormat
    max_image_bytes: int
    max_image_pixels: int
    max_title_chars: int
    images_root: str


class ItemShards(Datasource):
    """The units of a plan as a Ray Data source: one read task per unit, blocks of at most `block_rows` rows."""

    def __init__(self, units: list[Unit], decoding: Decoding, block_rows: int) -> None:
        super().__init__()
        self._units, self._decoding, self._block_rows = units, decoding, block_rows

    def estimate_inmemory_data_size(self) -> int:
        pixels = 3 * self._decoding.picture.size**2
        return sum(unit.num_rows for unit in self._units) * (pixels + 200)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        return [
            ReadTask(
                partial(read_unit, unit, self._decoding, self._block_rows),
                BlockMetadata(num_rows=unit.num_rows, size_bytes=None, exec_stats=None),
            )
            for unit in self._units
        ]


def read_unit(unit: Unit, decoding: Decoding, block_rows: int) -> Iterator[pa.Table]:
    """The shards of a unit as blocks of `prepare_items`, with columns shard_id and row (number in the shard)."""
    rows = unit.shard.read(COLUMNS)
    duplicate = np.zeros(rows.num_rows, bool)
    duplicate[unit.duplicates] = True
    for piece in unit.slices:
        for start in range(piece.start, piece.stop, block_rows):
            stop = min(start + block_rows, piece.stop)
            block = prepare_items(rows.slice(start, stop - start), duplicate[start:stop], decoding)
            block = block.append_column("shard_id", pa.repeat(pa.scalar(piece.shard_id), stop - start))
            yield block.append_column("row", pa.array(np.arange(start, stop, dtype=np.int64) - piece.start))


def prepare_items(rows: pa.Table, duplicate: np.ndarray, decoding: Decoding) -> pa.Table:
    """One row for each row of the items table, usable or not.

    Args:
        rows: the items columns of `COLUMNS`. duplicate: (n,) bool, rows whose item is elsewhere already.

    Returns:
        item_id, title (null if none), pixels (3·S·S bytes, null if none), content_hash, content_at, category;
        image_reason and image_detail where a picture cannot be used, drop_reason where the row gets no embedding.
    """
    size = decoding.picture.size
    titles = [clean_title(title, decoding.max_title_chars) for title in rows["title"].to_pylist()]
    blank = is_blank(rows["item_id"])
    pixels: list[bytes | None] = []
    hashes, image_reasons, image_details, drop_reasons = [], [], [], []
    files = ImageFiles(decoding.images_root, decoding.max_image_bytes)
    images = files.read_all(rows["image"].to_pylist(), rows["image_uri"].to_pylist())
    for title, image, no_id, again in zip(titles, images, blank, duplicate, strict=True):
        picture, reason, detail = None, None, None
        if no_id or again:
            image = None
        if isinstance(image, BadImage):
            reason, detail, image = image.reason, image.detail, None
        elif image is not None:
            try:
                picture = decode_image(
                    image, decoding.picture, decoding.max_image_bytes, decoding.max_image_pixels
                ).tobytes()
            except BadImage as error:
                reason, detail = error.reason, error.detail
        pixels.append(picture)
        image_reasons.append(reason)
        image_details.append(detail)
        hashes.append(content_hash(title, image if picture is not None else None))
        empty = title is None and picture is None
        drop_reasons.append(
            "no item id" if no_id else "duplicate item id" if again else "no content" if empty else None
        )
    category = pc.utf8_trim_whitespace(pc.list_element(pc.split_pattern(rows["category"], "|"), 0))
    columns = {
        "item_id": rows["item_id"],
        "title": pa.array(titles, pa.string()),
        "pixels": pa.array(pixels, pa.binary(3 * size * size)),
        "content_hash": pa.array(hashes, pa.string()),
        "content_at": rows["created_at"],
        "category": pc.if_else(pc.equal(category, ""), pa.scalar(None, pa.string()), category),
        "image_reason": pa.array(image_reasons, pa.string()),
        "image_detail": pa.array(image_details, pa.string()),
        "drop_reason": pa.array(drop_reasons, pa.string()),
    }
    return pa.table(columns)
