"""Item id -> row number for many ids at once: sorted 64-bit hashes beside the ids themselves, no Python object per id.

A lookup hashes all ids in a few NumPy passes, finds in a table of prefixes where the hashes that begin like it stand, steps
to the hash and compares the ids' bytes eight at a time, so that it is exact even where two ids share a hash. Unlike
`data.ids.IdIndex` the ids stand in the order of their hashes, so that all arrays can be files that are memory mapped and any
range of hashes is a range of rows (`shard_of`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from mim_ray.data.ids import IdBytes, Ids, hash_ids, tail_masks
from mim_ray.representation_center.buckets import Buckets

KEY_PADDING = 24
"""Zero bytes behind the last id, so that two aligned words can be read from any position."""
_HALF, _THREE, _SEVEN, _WORD_BITS = np.uint64(32), np.uint64(3), np.uint64(7), np.uint64(64)


class KeyIndex:
    """Finds ids in a fixed set of ids. All arrays may be read-only mappings.

    Args:
        hashes: (N,) uint64 `hash_ids`, ascending.
        offsets: (N + 1,) uint32, where each id begins, modulo 2^32.
        key_bytes: uint8, the ids in UTF-8 one after another in the order of their hashes, then `KEY_PADDING` zeros;
            begins at a multiple of 8 in memory.
        buckets: the table of prefixes, or the part of it for these rows.
        first_row: number of the first row, which `buckets` and `wraps` count in.
        first_byte: place of key_bytes[0] in the whole, for offsets.
        wraps: rows at which the offsets begin at 0 again.
    """

    def __init__(
        self,
        hashes: np.ndarray,
        offsets: np.ndarray,
        key_bytes: np.ndarray,
        buckets: Buckets,
        *,
        first_row: int = 0,
        first_byte: int = 0,
        wraps: Sequence[int] = (),
    ) -> None:
        self.hashes, self.offsets, self.key_bytes, self.buckets = hashes, offsets, key_bytes, buckets
        self._first_row, self._first_byte = first_row, first_byte
        self._wraps = np.array(wraps, np.int64)
        self._words = key_bytes[: len(key_bytes) // 8 * 8].view(np.uint64)

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def ids(self) -> pa.LargeStringArray:
        """(N,) the ids in row order; their bytes are not copied, 8 bytes of offset are made for each."""
        return self.ids_between(0, len(self))

    def ids_between(self, first: int, end: int) -> pa.LargeStringArray:
        """(end - first,) the ids of those rows, as `ids`."""
        offsets = self.offsets[first : end + 1]
        lengths = np.diff(offsets)  # modulo 2^32, as the offsets
        starts = np.empty(end - first + 1, np.int64)
        starts[0] = self._starts(np.array([first]), offsets[:1])[0]
        np.cumsum(lengths, out=starts[1:], dtype=np.int64)
        starts[1:] += starts[0]
        return pa.LargeStringArray.from_buffers(end - first, pa.py_buffer(starts), pa.py_buffer(self.key_bytes))

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
        rows = self._first_at_least(wanted)
        alive = self.hashes.take(rows, mode="clip") == wanted
        if array.null_count:
            alive &= np.asarray(array.is_valid(), bool)
        if alive.all():
            same = self._same(rows, keys, None)
            if same.all():
                return rows
        else:
            same = np.zeros(len(keys), bool)
            same[alive] = self._same(rows[alive], keys, np.flatnonzero(alive))
        found = np.where(same, rows, -1)
        pending = np.flatnonzero(alive & ~same)
        rows = rows[pending]
        while len(pending):  # ids whose hash belongs to several
            rows += 1
            alive = (self.hashes.take(rows, mode="clip") == wanted[pending]) & (rows < len(self))
            pending, rows = pending[alive], rows[alive]
            same = self._same(rows, keys, pending)
            found[pending[same]] = rows[same]
            pending, rows = pending[~same], rows[~same]
        return found

    def _first_at_least(self, wanted: np.ndarray) -> np.ndarray:
        """(n,) int64 first row whose hash is not less, from the first row of the hash's bucket on."""
        rows = self.buckets.first_rows(wanted)
        if self._first_row:
            rows -= self._first_row
            np.maximum(rows, 0, out=rows)
        pending = np.flatnonzero(self.hashes.take(rows, mode="clip") < wanted)
        at, wanted = rows[pending], wanted[pending]
        while len(pending):
            at += 1
            rows[pending] = at
            less = np.flatnonzero((self.hashes.take(at, mode="clip") < wanted) & (at < len(self)))
            pending, at, wanted = pending[less], at[less], wanted[less]
        return rows

    def _same(self, rows: np.ndarray, keys: IdBytes, where: np.ndarray | None) -> np.ndarray:
        """(m,) bool: whether the id of each row is the asked one; `where` are the m positions in `keys`, None: all."""
        offsets = self.offsets.take(rows)
        asked = keys.lengths if where is None else keys.lengths[where]
        same: np.ndarray = (self.offsets.take(rows + 1) - offsets) == asked  # the difference modulo 2^32 is right
        if not same.all():
            equal = np.flatnonzero(same)
            if len(equal):
                same[equal] = self._same(rows[equal], keys, equal if where is None else where[equal])
            return same
        if not keys.longest:
            return same
        starts = self._starts(rows, offsets)
        place, bits = starts >> 3, (starts.view(np.uint64) & _SEVEN) << _THREE
        rest = _WORD_BITS - bits
        word = self._words.take(place, mode="clip")
        for number in range(-(-keys.longest // 8)):
            # Two aligned reads are faster than one that is not; a shift by 64 gives 0.
            place += 1
            following = self._words.take(place, mode="clip")
            stored = (word >> bits) | (following << rest)
            word = following
            if 8 * number < keys.shortest:
                if keys.shortest < 8 * number + 8:
                    stored &= tail_masks(asked, number)
                same &= stored == keys.words(number, where)
            else:
                long = np.flatnonzero(asked > 8 * number)
                stored = stored[long] & tail_masks(asked[long], number)
                same[long] &= stored == keys.words(number, long if where is None else where[long])
        return same

    def _starts(self, rows: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """(m,) int64 place in `key_bytes` at which the id of each row begins."""
        starts = offsets.astype(np.int64)
        if len(self._wraps):
            starts += np.searchsorted(self._wraps, rows + self._first_row, "right") << 32
        if self._first_byte:
            starts -= self._first_byte
        return starts


def shard_of(hashes: np.ndarray, num_shards: int) -> np.ndarray:
    """(n,) int64 in [0, num_shards): the shard of each `hash_ids`. Shards are equal ranges of the hashes, in order."""
    return (((hashes >> _HALF) * np.uint64(num_shards)) >> _HALF).astype(np.int64)


def shard_start(shard: int, num_shards: int) -> int:
    """Least hash that `shard_of` puts into this shard or a later one; 2^64 for `shard` = `num_shards`."""
    return -((-shard << 32) // num_shards) << 32


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
    padded = np.concatenate([key_bytes, np.zeros(KEY_PADDING, np.uint8)])
    index = KeyIndex(hashes, ends.astype(np.uint32), padded, Buckets.of(hashes), wraps=wrap_rows(ends, 0, 0))
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
    text = np.frombuffer(data, np.uint8, end - first, first) if end > first else np.empty(0, np.uint8)
    return text, np.diff(bounds)


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
