"""Content hashes in a snapshot: 16 bytes a row, and an index from a hash to a row that has it.

A hash is 32 hex digits in lower case (`data.transforms.content_hash`); anything else, and 16 zero bytes, counts as unknown.
"""

from __future__ import annotations

import binascii
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray.data.ids import Ids
from mim_ray.representation_center.key_index import concatenated, string_array
from mim_ray.representation_center.snapshot_files import BlockWriter

DIGEST_BYTES = 16
_DIGITS = np.frombuffer(b"0123456789abcdef", np.uint8)
_VALUES = np.full(256, 255, np.uint8)
_VALUES[_DIGITS] = np.arange(16)
_PAIR = np.dtype([("key", "<u8"), ("row", "<i8")])


class ContentIndex:
    """Content hashes of rows.

    Args:
        digests: (N, 16) uint8, zeros where unknown.
        keys: (M,) uint64, ascending: the first 8 bytes of the known ones as little-endian numbers. rows: (M,) int64.
    """

    def __init__(self, digests: np.ndarray, keys: np.ndarray, rows: np.ndarray) -> None:
        self.digests, self._keys, self._rows = digests, keys, rows

    def find(self, hashes: Ids) -> np.ndarray:
        """(n,) int64: a row with this content hash, -1 where there is none."""
        wanted, known = content_digests(hashes)
        found = np.full(len(wanted), -1, np.int64)
        pending = np.flatnonzero(known)
        keys = digest_keys(wanted)
        places = np.searchsorted(self._keys, keys[pending])
        while len(pending):  # a second round only where two contents share 8 bytes
            alive = places < len(self._keys)
            pending, places = pending[alive], places[alive]
            alive = self._keys[places] == keys[pending]
            pending, places = pending[alive], places[alive]
            rows = self._rows[places]
            same = (self.digests[rows] == wanted[pending]).all(axis=1)
            found[pending[same]] = rows[same]
            pending, places = pending[~same], places[~same] + 1
        return found


def content_digests(hashes: Ids) -> tuple[np.ndarray, np.ndarray]:
    """(n, 16) uint8 of 32 hex digits each, zeros where it is something else; (n,) bool known."""
    array = string_array(hashes)
    digests = np.zeros((len(array), DIGEST_BYTES), np.uint8)
    right = np.asarray(pc.fill_null(pc.equal(pc.binary_length(array), 2 * DIGEST_BYTES), False), bool)
    characters, _ = concatenated(array.filter(pa.array(right)))
    digests[right] = _all_digests(characters)
    return digests, np.asarray(digests.any(axis=1))


def _all_digests(characters: np.ndarray) -> np.ndarray:
    """(n, 16) uint8 of (32n,) uint8 characters."""
    text = characters.tobytes()
    try:
        found = binascii.unhexlify(text)
    except binascii.Error:
        found = b""
    if binascii.hexlify(found) == text:  # all are digits in lower case
        return np.frombuffer(found, np.uint8).reshape(-1, DIGEST_BYTES)
    values = _VALUES[characters].reshape(-1, 2 * DIGEST_BYTES)
    return np.where((values < 16).all(axis=1)[:, None], (values[:, ::2] << 4) | (values[:, 1::2] & 15), 0)


def content_hash_strings(digests: np.ndarray, known: np.ndarray) -> pa.StringArray:
    """(n,) 32 hex digits of (n, 16) uint8; null where zero or not `known`."""
    known = known & digests.any(axis=1)
    characters = np.empty((int(known.sum()), 2 * DIGEST_BYTES), np.uint8)
    characters[:, ::2], characters[:, 1::2] = _DIGITS[digests[known] >> 4], _DIGITS[digests[known] & 15]
    offsets = np.zeros(len(known) + 1, np.int64)
    np.cumsum(known * 2 * DIGEST_BYTES, out=offsets[1:])
    mask = pa.array(known).buffers()[1]
    return pa.LargeStringArray.from_buffers(len(known), pa.py_buffer(offsets), pa.py_buffer(characters), mask).cast(
        pa.string()
    )


def digest_keys(digests: np.ndarray) -> np.ndarray:
    """(n,) uint64 first 8 bytes of each."""
    return np.ascontiguousarray(digests).view("<u8").reshape(len(digests), 2)[:, 0]


class ContentIndexWriter:
    """Collects (content, row) pairs and writes them sorted, in parts that fit into memory.

    Args:
        folder: for the parts. num_rows: at most. memory_bytes: for sorting a part.
    """

    def __init__(self, folder: Path, num_rows: int, memory_bytes: int) -> None:
        self._bits = max(0, (4 * _PAIR.itemsize * num_rows // memory_bytes).bit_length())
        self._paths = [folder / f"content-part-{part}" for part in range(2**self._bits)]
        self._buffers: list[list[np.ndarray]] = [[] for _ in self._paths]
        self._num_buffered = 0
        self._most_buffered = max(memory_bytes // (8 * _PAIR.itemsize), 1)

    def append(self, digests: np.ndarray, first_row: int) -> None:
        """(n, 16) uint8 of rows that follow each other."""
        known = np.flatnonzero(digests.any(axis=1))
        pairs = np.empty(len(known), _PAIR)
        pairs["key"], pairs["row"] = digest_keys(digests)[known], known + first_row
        if self._bits:
            part = (pairs["key"] >> np.uint64(64 - self._bits)).astype(np.int64)
            order = np.argsort(part, kind="stable")
            pieces = np.split(pairs[order], np.searchsorted(part[order], np.arange(1, len(self._paths))))
        else:
            pieces = [pairs]
        for buffer, piece in zip(self._buffers, pieces, strict=True):
            if len(piece):
                buffer.append(piece)
        self._num_buffered += len(pairs)
        if self._num_buffered > self._most_buffered:
            self._flush()

    def write(self, keys: BlockWriter, rows: BlockWriter) -> None:
        """Write all pairs in the order of their keys, and delete the parts."""
        for number, path in enumerate(self._paths):
            stored = [np.fromfile(path, _PAIR)] if path.exists() else []
            pairs = np.concatenate([*stored, *self._buffers[number], np.empty(0, _PAIR)])
            self._buffers[number] = []
            order = np.argsort(pairs["key"], kind="stable")
            keys.write(pairs["key"][order])
            rows.write(pairs["row"][order])
            path.unlink(missing_ok=True)

    def _flush(self) -> None:
        for path, buffer in zip(self._paths, self._buffers, strict=True):
            if buffer:
                with path.open("ab") as file:
                    np.concatenate(buffer).tofile(file)
                buffer.clear()
        self._num_buffered = 0
