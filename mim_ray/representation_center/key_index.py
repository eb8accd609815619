"""Item id -> row number for many ids at once: sorted 64-bit hashes beside the ids themselves, no Python object per id.

A lookup hashes all ids in a few NumPy passes, finds the few rows whose hash begins with the same bits in a table of prefixes,
steps to the hash and compares the ids' bytes eight at a time, so that it is exact even where two ids share a hash. Unlike
`data.ids.IdIndex` the ids stand in the order of their hashes, so that all arrays can be files that are memory mapped and any
range of hashes is a range of rows (`shard_of`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from mim_ray.data.ids import IdBytes, Ids, hash_ids, words_of

KEY_PADDING = 8
"""Zero bytes behind the last id, so that eight bytes can be read from any position."""
_HALF = np.uint64(32)


class KeyIndex:
    """Finds ids in a fixed set of ids. All arrays may be read-only mappings.

    Args:
        hashes: (N,) uint64 `hash_ids`, ascending.
        offsets: (N + 1,) uint32, where each id begins, modulo 2^32.
        key_bytes: uint8, the ids in UTF-8 one after another in the order of their hashes, then `KEY_PADDING` zeros.
        buckets: (B + 1,) unsigned, first row of each value of a hash's leading bits (`bucket_table`), or a part of it.
        first_bucket: number of the first entry of `buckets`. first_row: number of the first row, which its entries count in.
        bucket_bits: how many leading bits.
        wraps: numbers of the rows, counted as `first_row` is, at which the offsets begin at 0 again.
        first_byte: place of key_bytes[0] in the whole, for offsets.
    """

    def __init__(
        self,
        hashes: np.ndarray,
        offsets: np.ndarray,
        key_bytes: np.ndarray,
        buckets: np.ndarray,
        *,
        bucket_bits: int,
        first_bucket: int = 0,
        first_row: int = 0,
        first_byte: int = 0,
        wraps: Sequence[int] = (),
    ) -> None:
        self.hashes, self.offsets, self.key_bytes, self.buckets = hashes, offsets, key_bytes, buckets
        self._shift = np.uint64(64 - bucket_bits)
        self._first_bucket, self._first_row, self._first_byte = first_bucket, first_row, first_byte
        self._wraps = np.array(wraps, np.int64)
        self._words = words_of(key_bytes)

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def ids(self) -> pa.LargeStringArray:
        """(N,) the ids in row order; their bytes are not copied, 8 bytes of offset are made for each."""
        lengths = np.diff(self.offsets)  # modulo 2^32, as the offsets
        starts = np.zeros(len(self) + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        return pa.LargeStringArray.from_buffers(len(self), pa.py_buffer(starts), pa.py_buffer(self.key_bytes))

    def find(self, ids: Ids, hashes: np.ndarray | None = None) -> np.ndarray:
        """(n,) int64 row of each id; -1 for an unknown or null one.

        Args:
            hashes: (n,) `hash_ids` of the ids, where they are known already.
        """
        array = string_array(ids)
        if not len(array) or not len(self):
            return np.full(len(array), -1, np.int64)
        keys = IdBytes.of(array)
        wanted = hash_ids(keys) if hashes is None else hashes
        found = self._first_at_least(wanted)
        pending = np.arange(len(keys))
        if array.null_count:
            pending = np.flatnonzero(np.asarray(array.is_valid(), bool))
        rows = found[pending]
        found[:] = -1
        while len(pending):  # a second round only for ids whose hash belongs to several
            alive = np.flatnonzero((self.hashes.take(rows, mode="clip") == wanted[pending]) & (rows < len(self)))
            if len(alive) < len(pending):
                pending, rows = pending[alive], rows[alive]
            same = self._same(rows, keys, pending)
            if same.all():
                found[pending] = rows
                break
            found[pending[same]] = rows[same]
            pending, rows = pending[~same], rows[~same] + 1
        return found

    def _first_at_least(self, wanted: np.ndarray) -> np.ndarray:
        """(n,) int64 first row whose hash is not less, looked for within the hash's own bucket."""
        bucket = (wanted >> self._shift).view(np.int64)
        if self._first_bucket:
            bucket -= self._first_bucket
        rows = self.buckets.take(bucket, mode="clip").astype(np.int64)
        ends = self.buckets.take(bucket + 1, mode="clip").astype(np.int64)
        if self._first_row:
            rows -= self._first_row
            np.maximum(rows, 0, out=rows)
            ends -= self._first_row
        pending = np.flatnonzero((self.hashes.take(rows, mode="clip") < wanted) & (rows < ends))
        at, ends, wanted = rows[pending] + 1, ends[pending], wanted[pending]
        while len(pending):
            rows[pending] = at
            less = np.flatnonzero((self.hashes.take(at, mode="clip") < wanted) & (at < ends))
            pending, at, ends, wanted = pending[less], at[less] + 1, ends[less], wanted[less]
        return rows

    def _same(self, rows: np.ndarray, keys: IdBytes, positions: np.ndarray) -> np.ndarray:
        """(m,) bool: whether the id of each row is the asked one at each position."""
        offsets = self.offsets.take(rows)
        lengths = (self.offsets.take(rows + 1) - offsets).astype(np.int64)  # the difference modulo 2^32 is right
        everyone = len(positions) == len(keys)
        asked = keys.starts if everyone else keys.starts[positions]
        same = lengths == (keys.lengths if everyone else keys.lengths[positions])
        stored = offsets.astype(np.int64)
        if len(self._wraps):
            stored += np.searchsorted(self._wraps, rows + self._first_row, "right") << 32
        if self._first_byte:
            stored -= self._first_byte
        if not same.all():
            where = np.flatnonzero(same)
            same[where] = self._same_bytes(stored[where], asked[where], lengths[where], keys.words)
            return same
        return self._same_bytes(stored, asked, lengths, keys.words)

    def _same_bytes(self, stored: np.ndarray, asked: np.ndarray, lengths: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Compare ids of equal length: whole words, then the last word, which overlaps the one before it."""
        if not len(lengths):
            return np.empty(0, bool)
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest >= 8:
            same = self._words[stored] == words[asked]
        else:
            unused = np.maximum(8 - lengths, 0).astype(np.uint64) << np.uint64(3)
            differ = (self._words[stored] ^ words[asked]) << unused
            same = (differ == 0) | (lengths == 0)
        if longest > 8 and shortest >= 8:
            same &= self._words[stored + (lengths - 8)] == words[asked + (lengths - 8)]
        elif longest > 8:
            long = np.flatnonzero(lengths > 8)
            last = lengths[long] - 8
            same[long] &= self._words[stored[long] + last] == words[asked[long] + last]
        for position in range(8, longest - 8, 8):
            long = np.flatnonzero(lengths > position + 8)
            same[long] &= self._words[stored[long] + position] == words[asked[long] + position]
        return same


def shard_of(hashes: np.ndarray, num_shards: int) -> np.ndarray:
    """(n,) int64 in [0, num_shards): the shard of each `hash_ids`. Shards are equal ranges of the hashes, in order."""
    return (((hashes >> _HALF) * np.uint64(num_shards)) >> _HALF).astype(np.int64)


def shard_start(shard: int, num_shards: int) -> int:
    """Least hash that `shard_of` puts into this shard or a later one; 2^64 for `shard` = `num_shards`."""
    return -((-shard << 32) // num_shards) << 32


def bucket_bits(num_rows: int) -> int:
    """Leading bits for `bucket_table`: one to two rows a bucket, so 2 to 4 bytes a row."""
    return max(1, (max(num_rows, 1) - 1).bit_length() - 1)


def bucket_table(hashes: np.ndarray, bits: int, first: int = 0, num: int | None = None) -> np.ndarray:
    """(num,) int64: of each bucket from `first` on, the first of the ascending hashes that is in it or behind it."""
    num = 2**bits + 1 - first if num is None else num
    starts = np.arange(first, first + num, dtype=np.uint64) << np.uint64(64 - bits)
    table = np.searchsorted(hashes, starts).astype(np.int64)
    if first + num > 2**bits:  # the end, which no uint64 can say
        table[-1] = len(hashes)
    return table


def build_key_index(ids: Ids) -> tuple[KeyIndex, np.ndarray]:
    """An index of these ids, and (N,) int64: the position in `ids` of each of its rows.

    Raises:
        ValueError: an id is null or there twice.
    """
    keys = string_array(ids)
    order = sorted_order(keys)
    hashes = hash_ids(keys)[order]
    key_bytes, lengths = concatenated(keys.take(pa.array(order)))
    ends = np.zeros(len(keys) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    bits = bucket_bits(len(keys))
    index = KeyIndex(
        hashes,
        ends.astype(np.uint32),
        np.concatenate([key_bytes, np.zeros(KEY_PADDING, np.uint8)]),
        bucket_table(hashes, bits).astype(np.uint32 if len(keys) < 2**32 else np.uint64),
        bucket_bits=bits,
        wraps=wrap_rows(ends, 0, 0),
    )
    return index, order


def sorted_order(keys: pa.LargeStringArray, hashes: np.ndarray | None = None) -> np.ndarray:
    """(N,) int64: positions of the ids in the order of their hashes.

    Raises:
        ValueError: an id is null or there twice.
    """
    if keys.null_count:
        raise ValueError("an id is null")
    hashes = hash_ids(keys) if hashes is None else hashes
    order = np.argsort(hashes, kind="stable").astype(np.int64)
    ordered = hashes[order]
    shared = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(shared):  # only ids that share their hash are compared
        names = keys.take(pa.array(order[np.unique(np.concatenate([shared, shared + 1]))])).to_pylist()
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise ValueError(f"id {name!r} is there twice")
            seen.add(name)
    return order


def concatenated(keys: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 bytes of all ids, one after another, and their (n,) int64 lengths."""
    if not len(keys):
        return np.empty(0, np.uint8), np.empty(0, np.int64)
    _, offsets, data = keys.buffers()
    bounds = np.frombuffer(offsets, np.int64, len(keys) + 1, keys.offset * 8)
    first, end = int(bounds[0]), int(bounds[-1])
    return (np.frombuffer(data, np.uint8, end - first, first) if end > first else np.empty(0, np.uint8)), np.diff(
        bounds
    )


def wrap_rows(starts: np.ndarray, first_row: int, first_byte: int) -> list[int]:
    """Rows at which an id's start passes a multiple of 2^32.

    Args:
        starts: (n + 1,) int64 of consecutive rows. first_row: the number of the first. first_byte: the start before it.
    """
    turns = np.concatenate([[first_byte >> 32], starts >> 32])
    return [int(row) + first_row for row in np.repeat(np.arange(len(starts)), np.diff(turns))]


def string_array(ids: Ids) -> pa.LargeStringArray:
    """Ids of any accepted kind as one Arrow array."""
    if isinstance(ids, pa.ChunkedArray):
        ids = pa.concat_arrays(ids.chunks) if ids.num_chunks else pa.array([], pa.large_string())
    if isinstance(ids, pa.Array):
        return ids if ids.type == pa.large_string() else ids.cast(pa.large_string())
    return pa.array(ids, pa.large_string(), from_pandas=True)
