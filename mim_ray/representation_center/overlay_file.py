"""One file of an overlay (overlay.py): its header and columns as arrays over a memory map.

A header of int64 numbers (`_FIELDS`), then the columns at their full capacity: hashes, content_at, sources, flags, ends (of key and
category of each row in the text), matrix, text. The writer fills in rows first and then raises `published`, the number of
complete rows; a file is closed when its successor is there.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from mim_ray.errors import ArtifactError

DTYPES = {"float32": np.float32, "float16": np.float16}

_MAGIC = 0x4D494D4F564C3031
_FIELDS = [
    "magic",
    "width",
    "itemsize",
    "capacity",
    "text_capacity",
    "first_row",
    "published",
    "closed",
    "synced",
    "retired",
]
_HEADER_BYTES = 4_096
_FIRST_BYTES, _MOST_BYTES = 2**20, 2**28
_TEXT_BYTES = 48  # of key and category, a row, as planned; more closes a file earlier


class OverlayFile:
    """One mapped file: its header and columns as arrays."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self._header = np.frombuffer(buffer, np.int64, len(_FIELDS))
        self._fence = threading.Lock()
        self.width, self.itemsize = self.get("width"), self.get("itemsize")
        self.capacity, self.first_row = self.get("capacity"), self.get("first_row")
        self.text_capacity = self.get("text_capacity")
        arrays, _ = _layout(self.capacity, self.text_capacity, self.width, self.itemsize)
        columns = [
            np.frombuffer(buffer, dtype, int(np.prod(shape)), offset).reshape(shape) for dtype, shape, offset in arrays
        ]
        self.hashes, self.content_at, self.sources, self.flags, self.ends, self.matrix, self.text = columns
        self.texts: pa.LargeStringArray = pa.LargeStringArray.from_buffers(
            2 * self.capacity, pa.py_buffer(self.ends), pa.py_buffer(self.text)
        )
        """(2 capacity,) key and category of each row in turn; only those of published rows may be touched."""

    @classmethod
    def create(
        cls, folder: Path | None, number: int, first_row: int, width: int, dtype: str, text_bytes: int
    ) -> OverlayFile:
        """Large enough for a row with `text_bytes` of text."""
        itemsize = np.dtype(DTYPES[dtype]).itemsize
        wanted = min(_FIRST_BYTES << number, _MOST_BYTES)
        capacity = max(64, wanted // (width * itemsize + 41 + _TEXT_BYTES))
        text_capacity = max(capacity * _TEXT_BYTES, 2 * text_bytes)
        _, size = _layout(capacity, text_capacity, width, itemsize)
        if folder is None:
            buffer = mmap.mmap(-1, size)
        else:
            temporary = folder / f".{number:08d}"
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.posix_fallocate(handle, 0, size)
                buffer = mmap.mmap(handle, size)
            except OSError as error:
                os.unlink(temporary)
                raise ArtifactError(f"{folder}: no room for {size:,} more bytes of new items ({error}).") from None
            finally:
                os.close(handle)
        values = [_MAGIC, width, itemsize, capacity, text_capacity, first_row, 0, 0, 0, 0]
        np.frombuffer(buffer, np.int64, len(_FIELDS))[:] = values
        if folder is not None:
            os.rename(temporary, folder / _name(number))
        return cls(buffer)

    @classmethod
    def open(cls, folder: Path, number: int) -> OverlayFile:
        path = folder / _name(number)
        try:
            with path.open("rb") as file:
                buffer = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"The overlay {path} cannot be read ({error}).") from None
        header = np.frombuffer(buffer, np.int64, len(_FIELDS))
        if header[0] != _MAGIC:
            raise ArtifactError(f"{path} is no overlay of new items.")
        return cls(buffer)

    def get(self, field: str) -> int:
        value = int(self._header[_FIELDS.index(field)])
        with self._fence:  # what is read after this was written before the number was
            return value

    def set(self, field: str, value: int) -> None:
        with self._fence:  # what was written before this is seen by who sees the number
            pass
        self._header[_FIELDS.index(field)] = value

    def has_more(self, indexed: int) -> bool:
        return bool(self._header[6] + self.first_row > indexed or self._header[7])

    def room(self, text_ends: np.ndarray) -> int:
        """How many of the rows whose texts end there fit."""
        rows = self.get("published")
        free = self.text_capacity - int(self.ends[2 * rows])
        return min(self.capacity - rows, int(np.searchsorted(text_ends, free, "right")) - 1, len(text_ends) - 1)

    def write(
        self, hashes: np.ndarray, content_at: np.ndarray, sources: np.ndarray, flags: np.ndarray, ends: np.ndarray,
        matrix: np.ndarray, text: np.ndarray,
    ) -> None:  # fmt: skip
        rows = self.get("published")
        part = slice(rows, rows + len(hashes))
        start = self.ends[2 * rows]
        self.hashes[part], self.content_at[part], self.sources[part] = hashes, content_at, sources
        self.flags[part], self.matrix[part] = flags, matrix
        self.ends[2 * rows : 2 * (rows + len(hashes)) + 1] = ends + start
        self.text[start : start + len(text)] = text
        self.set("published", rows + len(hashes))


def _layout(
    capacity: int, text_capacity: int, width: int, itemsize: int
) -> tuple[list[tuple[np.dtype, tuple[int, ...], int]], int]:
    """(dtype, shape, offset) of each column, and the size of the file."""
    shapes: Sequence[tuple[str, tuple[int, ...]]] = [
        ("u8", (capacity,)),
        ("i8", (capacity,)),
        ("i8", (capacity,)),
        ("u1", (capacity,)),
        ("i8", (2 * capacity + 1,)),
        (f"f{itemsize}", (capacity, width)),
        ("u1", (text_capacity,)),
    ]
    arrays, offset = [], _HEADER_BYTES
    for kind, shape in shapes:
        dtype = np.dtype(kind)
        arrays.append((dtype, shape, offset))
        offset += -(-int(np.prod(shape)) * dtype.itemsize // 64) * 64
    return arrays, offset


def _name(number: int) -> str:
    return f"{number:08d}.rows"
