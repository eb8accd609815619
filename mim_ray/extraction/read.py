"""From rows of the items table to what an encoder takes: clean title, decoded picture, content hash. On CPUs.

Equal content is prepared once: what an earlier row of the shard shows, and what the snapshot of this encoder version has, is
neither decoded nor encoded again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray.data.event_log import is_blank
from mim_ray.data.image_files import ImageFiles
from mim_ray.data.schema import TIME
from mim_ray.data.transforms import (
    BadImage,
    PictureFormat,
    check_limits,
    clean_title,
    content_hash,
    decode_image,
)
from mim_ray.extraction.plan import Slice, Unit
from mim_ray.representation_center.current_rows import times
from mim_ray.representation_center.snapshot import NO_TIME, Snapshot

COLUMNS = ["item_id", "title", "category", "image", "image_uri", "created_at"]
MAX_ID_BYTES = 4_096


@dataclass(frozen=True)
class Decoding:
    """How content becomes the encoder's input; part of a shard's identity."""

    picture: PictureFormat
    max_image_bytes: int
    max_image_pixels: int
    max_title_chars: int
    images_root: str


@dataclass
class Seen:
    """What a shard's rows up to now show, so that equal content is decoded and encoded once.

    Attributes:
        snapshot: of this encoder version, whose content need not be encoded again; None without one.
        num_rows: rows of the shard up to now.
    """

    snapshot: Snapshot | None = None
    num_rows: int = 0
    rows: dict[str, int] = field(default_factory=dict)  # hash of the usable content -> the row that is encoded
    bad: dict[str, BadImage] = field(default_factory=dict)  # hash of title and bytes -> why the picture is not used


class ShardReader:
    """Shards of one unit in ascending order, as blocks of `prepare_items`; the file is read on from where it stands.

    Args:
        rows: of a block, at most.
    """

    def __init__(self, unit: Unit, decoding: Decoding, snapshot: Snapshot | None, rows: int) -> None:
        self.unit, self._decoding, self._snapshot, self._rows = unit, decoding, snapshot, rows
        self._stream: Iterator[pa.Table] | None = None
        self._at = -1
        self._left: pa.Table | None = None

    def read(self, piece: Slice) -> Iterator[pa.Table]:
        """Blocks of the shard with all of its rows in order, and a column `row` (number in the shard)."""
        seen = Seen(self._snapshot)
        duplicate = np.isin(np.arange(piece.start, piece.stop), self.unit.duplicates)
        for rows in self._pieces(piece):
            start = seen.num_rows
            rows = with_content_times(rows, self.unit.changed_at)
            block = prepare_items(rows, duplicate[start : start + rows.num_rows], self._decoding, seen)
            yield block.append_column("row", pa.array(np.arange(start, start + rows.num_rows, dtype=np.int64)))

    def close(self) -> None:
        self._stream, self._left = None, None

    def _pieces(self, piece: Slice) -> Iterator[pa.Table]:
        if self._stream is None or self._at > piece.start:
            self._stream = self.unit.rows.batches(
                COLUMNS, start=piece.start, stop=self.unit.rows.num_rows, rows=self._rows
            )
            self._at, self._left = piece.start, None
        while self._at < piece.stop:
            rows = self._left if self._left is not None else next(self._stream)
            self._left = None
            if self._at < piece.start:  # shards between that are done
                skip = min(piece.start - self._at, rows.num_rows)
                self._at += skip
                self._left = rows.slice(skip) if skip < rows.num_rows else None
                continue
            taken = min(rows.num_rows, piece.stop - self._at)
            self._left = rows.slice(taken) if taken < rows.num_rows else None
            self._at += taken
            yield rows.slice(0, taken)


def with_content_times(rows: pa.Table, changed_at: int) -> pa.Table:
    """Rows whose created_at is the time of their content: not before their file's time, the rule of refreshes, too.

    A created_at in the future does not count: no later content could replace it.
    """
    if not changed_at:
        return rows
    created = times(rows["created_at"])
    latest = np.maximum(np.where(created <= time.time_ns() // 1_000, created, NO_TIME), changed_at)
    return rows.set_column(rows.column_names.index("created_at"), "created_at", pa.array(latest, pa.int64()).cast(TIME))


def prepare_items(rows: pa.Table, duplicate: np.ndarray, decoding: Decoding, seen: Seen | None = None) -> pa.Table:
    """One row for each row of the items table, usable or not.

    Args:
        rows: the items columns of `COLUMNS`. duplicate: (n,) bool, rows whose item is elsewhere already.
        seen: of the shard's rows before these; is brought up to date.

    Returns:
        item_id, title (null if none), pixels (3·S·S bytes, null if none), content_hash, content_at, category;
        image_reason and image_detail where a picture cannot be used, drop_reason where the row gets no embedding;
        same_as: the row of the shard that is encoded instead of this one, snapshot_row: the row of the snapshot that is
        copied instead, both null where the row itself is to be encoded.
    """
    seen = Seen() if seen is None else seen
    titles = [clean_item_title(title, decoding.max_title_chars) for title in rows["title"].to_pylist()]
    drop_reasons = _drop_reasons(rows["item_id"], duplicate)
    images: list[bytes | BadImage | None] = _images_of(rows, decoding)
    for row, reason in enumerate(drop_reasons):
        if reason is not None:
            images[row] = None
    met = [content_hash(title, _bytes(image)) for title, image in zip(titles, images, strict=True)]
    known = _find(seen.snapshot, met)
    pixels: list[bytes | None] = []
    hashes, bad, same_as, snapshot_rows = [], [], [], []
    for row, (title, image) in enumerate(zip(titles, images, strict=True)):
        digest, picture, error = met[row], None, image if isinstance(image, BadImage) else seen.bad.get(met[row])
        if isinstance(image, bytes) and error is None and digest not in seen.rows:
            try:
                if known[row] >= 0:
                    check_limits(image, decoding.max_image_bytes, decoding.max_image_pixels)
                else:
                    picture = decode_image(
                        image, decoding.picture, decoding.max_image_bytes, decoding.max_image_pixels
                    ).tobytes()
            except BadImage as found:
                error = seen.bad[digest] = found
        if error is not None:
            digest = content_hash(title, None)
        usable = error is None and isinstance(image, bytes)
        if drop_reasons[row] is None and title is None and not usable:
            drop_reasons[row] = "no content"
        first = same = None
        if drop_reasons[row] is None:
            first = known[row] if error is None else _find(seen.snapshot, [digest])[0]
            first = None if first < 0 else first
            if first is None:
                encoded = seen.rows.setdefault(digest, seen.num_rows + row)
                same = encoded if encoded != seen.num_rows + row else None
        pixels.append(picture)
        hashes.append(digest)
        bad.append(error)
        same_as.append(same)
        snapshot_rows.append(first)
    seen.num_rows += rows.num_rows
    category = pc.utf8_trim_whitespace(pc.list_element(pc.split_pattern(rows["category"], "|"), 0))
    columns = {
        "item_id": rows["item_id"],
        "title": pa.array(titles, pa.string()),
        "pixels": pa.array(pixels, pa.binary(3 * decoding.picture.size**2)),
        "content_hash": pa.array(hashes, pa.string()),
        "content_at": rows["created_at"],
        "category": pc.if_else(pc.equal(category, ""), pa.scalar(None, pa.string()), category),
        "image_reason": pa.array([None if error is None else error.reason for error in bad], pa.string()),
        "image_detail": pa.array([None if error is None else error.detail for error in bad], pa.string()),
        "drop_reason": pa.array(drop_reasons, pa.string()),
        "same_as": pa.array(same_as, pa.int64()),
        "snapshot_row": pa.array(snapshot_rows, pa.int64()),
    }
    return pa.table(columns)


@lru_cache(maxsize=2)
def open_snapshot(uri: str) -> Snapshot:
    """The snapshot at `uri`, once in a process. Its checksums were compared by the job, which names an immutable one."""
    return Snapshot.open(uri, verify=False)


def clean_item_title(title: str | None, max_chars: int) -> str | None:
    """As clean_title; a title of megabytes costs no more than another."""
    return clean_title(title[: 16 * max_chars] if title else title, max_chars)


def _drop_reasons(ids: pa.ChunkedArray, duplicate: np.ndarray) -> list[str | None]:
    too_long = np.asarray(pc.fill_null(pc.greater(pc.binary_length(ids), MAX_ID_BYTES), False), bool)
    return [
        "no item id" if blank else "item id too long" if long else "duplicate item id" if again else None
        for blank, long, again in zip(is_blank(ids), too_long, duplicate, strict=True)
    ]


def _images_of(rows: pa.Table, decoding: Decoding) -> list[bytes | BadImage | None]:
    """The picture's bytes; a row whose picture is too large is not copied out of the table."""
    sizes = pc.fill_null(pc.binary_length(rows["image"]), 0)
    large = np.flatnonzero(np.asarray(pc.greater(sizes, decoding.max_image_bytes), bool))
    given = rows["image"]
    if len(large):
        kept = np.ones(rows.num_rows, bool)
        kept[large] = False
        given = pc.if_else(pa.array(kept), given, pa.scalar(None, given.type))
    files = ImageFiles(decoding.images_root, decoding.max_image_bytes)
    uris = rows["image_uri"].to_pylist()
    for row in large.tolist():
        uris[row] = None
    images = files.read_all(given.to_pylist(), uris)
    for row in large.tolist():
        detail = f"{sizes[row].as_py()} bytes, the limit is {decoding.max_image_bytes}"
        images[row] = BadImage("image too large", detail)
    return images


def _find(snapshot: Snapshot | None, hashes: list[str]) -> list[int]:
    return [-1] * len(hashes) if snapshot is None else snapshot.find_content(hashes).tolist()


def _bytes(image: bytes | BadImage | None) -> bytes | None:
    return image if isinstance(image, bytes) else None
