"""The user's items table, cleaned, becomes the catalogue: one row per item id, pictures verified."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray.config.scenario import Data
from mim_ray.data.catalogue import CATALOGUE, write_part
from mim_ray.data.event_log import STAGE, UNKNOWN_TIME, complete, is_blank, times_us
from mim_ray.data.ids import IdIndex
from mim_ray.data.image_files import ImageFiles
from mim_ray.data.rejects import reject_rows
from mim_ray.data.schema import TIME
from mim_ray.data.sources import Shard
from mim_ray.data.transforms import BadImage, check_image, clean_title, content_hash


def choose_items(shards: list[Shard]) -> tuple[np.ndarray, pa.Array, np.ndarray, pa.Table]:
    """Which rows of the items table count: those with an id that no earlier row has.

    Returns:
        keep (num_rows,) bool, the ids and created_at (microseconds) of the kept rows, and the rejects.
    """
    tables = [shard.read(["item_id", "created_at"]) for shard in shards]
    rows = pa.concat_tables(tables)
    blank = is_blank(rows["item_id"])
    ids = rows["item_id"].combine_chunks()
    ids = pa.concat_arrays(ids.chunks) if isinstance(ids, pa.ChunkedArray) else ids
    first = IdIndex(pc.fill_null(ids, "")).first_rows()
    keep = first & ~blank
    rejects = [(str(row), "no item id", f"row {row}") for row in np.flatnonzero(blank).tolist()]
    again = np.flatnonzero(~first & ~blank)
    names = ids.take(pa.array(again)).to_pylist()
    rejects += [
        (name, "duplicate item id", f"row {row}; the first row with this id is used")
        for name, row in zip(names, again.tolist(), strict=True)
    ]
    created = times_us(rows["created_at"])[keep]
    return keep, ids.filter(pa.array(keep)), created, reject_rows(STAGE, "items", rejects)


def write_items_part(
    shard: Shard,
    keep: np.ndarray,
    first_seen: np.ndarray,
    settings: Data,
    files: ImageFiles,
    uri: str,
    number: int,
) -> tuple[pa.Array, np.ndarray, pa.Table, dict[str, int]]:
    """Clean one shard and write it as one part of the catalogue.

    Args:
        files: of pictures that the table names by image_uri.
        keep: (shard.num_rows,) as choose_items. first_seen: (number kept,) microseconds, UNKNOWN_TIME without events.

    Returns:
        category and has_image of the kept rows, the rejects, and counts.
    """
    columns = ["item_id", "title", "category", "image", "image_uri", "created_at"]
    rows = shard.read(columns).filter(pa.array(keep)).combine_chunks()
    titles = [clean_title(title, settings.max_title_chars) for title in rows["title"].to_pylist()]
    found = files.read_all(rows["image"].to_pylist(), rows["image_uri"].to_pylist())
    images: list[bytes | None] = []
    rejects = []
    for name, image in zip(rows["item_id"].to_pylist(), found, strict=True):
        usable = None
        try:
            if isinstance(image, BadImage):
                raise image
            if image is not None:
                check_image(image, settings.max_image_bytes, settings.max_image_pixels)
            usable = image
        except BadImage as error:
            rejects.append((name, error.reason, error.detail))
        images.append(usable)
    given = rows["category"]
    category = pc.utf8_trim_whitespace(pc.list_element(pc.split_pattern(given, "|"), 0)).combine_chunks()
    category = pc.if_else(pc.equal(category, ""), pa.scalar(None, pa.string()), category)
    created = times_us(rows["created_at"])
    known = np.where(created == UNKNOWN_TIME, first_seen, created)
    table = complete(
        {
            "item_id": rows["item_id"],
            "title": pa.array(titles, pa.string()),
            "category": category,
            "categories": given,
            "image": pa.array(images, pa.large_binary()),
            "created_at": pa.array(known, mask=known == UNKNOWN_TIME).cast(TIME),
            "first_seen_at": pa.array(first_seen, mask=first_seen == UNKNOWN_TIME).cast(TIME),
            "content_hash": pa.array([content_hash(*content) for content in zip(titles, images, strict=True)]),
        },
        len(titles),
        CATALOGUE,
    )
    write_part(uri, number, table)
    has_image = np.array([image is not None for image in images], bool)
    has_title = np.array([title is not None for title in titles], bool)
    counts = {
        "items": len(titles),
        "items with image": int(has_image.sum()),
        "items with title": int(has_title.sum()),
        "items with neither": int((~has_image & ~has_title).sum()),
    }
    return category, has_image, reject_rows(STAGE, "items", rejects), counts
