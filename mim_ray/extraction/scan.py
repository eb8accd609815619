"""Looking at rows of the catalogue without decoding a picture: which of them differ from what was seen before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mim_ray.data.event_log import is_blank
from mim_ray.data.ids import hash_ids
from mim_ray.data.image_files import ImageFiles
from mim_ray.data.sources import Shard
from mim_ray.data.transforms import BadImage, content_hash
from mim_ray.extraction.read import COLUMNS, Decoding, clean_item_title
from mim_ray.extraction.records import Records, contained
from mim_ray.representation_center.table import times

MAX_CARRIED_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Scanned:
    """Rows of a slice of a catalogue file.

    Attributes:
        records: of the rows with an id. num_rows: of the slice.
        rows: (n,) int64 numbers in the slice of the candidates: rows that were not seen before with this content.
        ids, hashes: their item ids and content hashes, if the picture can be used. title_hashes: if it cannot.
        created_at: (n,) int64 microseconds, NO_TIME where the catalogue names none.
        blank: numbers of rows without an id. carried: whether the candidates' content is returned too.
    """

    records: Records
    num_rows: int
    rows: np.ndarray
    ids: pa.Array
    hashes: pa.Array
    title_hashes: pa.Array
    created_at: np.ndarray
    blank: np.ndarray
    carried: bool


def scan(
    shard: Shard,
    seen: np.ndarray | None,
    decoding: Decoding,
    max_carried_rows: int,
    only: np.ndarray | None = None,
) -> tuple[Scanned, pa.Table | None]:
    """Compare a slice's rows with what was seen.

    Args:
        seen: ascending `Records.pairs` of the files that this and others replace; None: all rows are candidates.
        max_carried_rows: the candidates' content is returned too, where there are no more of them and they are not large.
        only: ascending numbers of the rows that count; None: all.

    Returns:
        what was found, and the candidates' rows of `COLUMNS` or None.
    """
    table = shard.read(COLUMNS) if only is None else shard.read(COLUMNS).take(pa.array(only))
    places = np.arange(table.num_rows) if only is None else only
    has_id = ~is_blank(table["item_id"])
    titles = [clean_item_title(title, decoding.max_title_chars) for title in table["title"].to_pylist()]
    images = _binaries(table["image"])
    uris = table["image_uri"].to_pylist()
    # The content hash itself, or where the picture is elsewhere a hash of its name, which is all that the row says.
    digits = [
        content_hash(title, uri.encode() if image is None and uri else image)
        for title, image, uri in zip(titles, images, uris, strict=True)
    ]
    contents = np.frombuffer(bytes.fromhex("".join(digits)), "<u8")[::2]
    numbers = np.flatnonzero(has_id)
    records = Records.of(hash_ids(table["item_id"])[numbers], contents[numbers], numbers)
    fresh = records.rows if seen is None else records.rows[~contained(records.pairs, seen)]
    rows = np.sort(fresh).astype(np.int64)
    chosen = pa.array(rows)
    hashes = [digits[row] for row in rows]
    elsewhere = [place for place, row in enumerate(rows) if images[row] is None and uris[row]]
    if elsewhere:
        files = ImageFiles(decoding.images_root, decoding.max_image_bytes)
        named = rows[elsewhere]
        found = files.read_all([None] * len(named), [uris[row] for row in named])
        for place, row, image in zip(elsewhere, named, found, strict=True):
            hashes[place] = content_hash(titles[row], None if isinstance(image, BadImage) else image)
    few = len(rows) <= max_carried_rows and sum(len(images[row] or b"") for row in rows) <= MAX_CARRIED_BYTES
    scanned = Scanned(
        Records(records.ids, records.contents, places[records.rows].astype(np.uint32)),
        shard.num_rows,
        places[rows],
        table["item_id"].take(chosen).combine_chunks(),
        pa.array(hashes, pa.string()),
        pa.array([content_hash(titles[row], None) for row in rows], pa.string()),
        times(table["created_at"])[rows],
        places[~has_id],
        few,
    )
    return scanned, table.take(chosen) if few else None


def _binaries(column: pa.ChunkedArray) -> Sequence[memoryview | None]:
    """The values without a copy; None for null and empty ones."""
    found: list[memoryview | None] = []
    for chunk in column.chunks:
        if not len(chunk):
            continue
        _, offset_buffer, data = chunk.buffers()
        offsets = np.frombuffer(offset_buffer, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        whole = memoryview(data) if data is not None else memoryview(b"")
        there = chunk.is_valid().to_pylist()
        for start, stop, valid in zip(offsets[:-1], offsets[1:], there, strict=True):
            found.append(whole[start:stop] if valid and stop > start else None)
    return found
