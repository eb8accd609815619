"""What came after a snapshot: rows appended to memory-mapped files that other processes of the node read directly.

    overlay = Overlay.create(folder, width=128, dtype="float16")     # one writer
    overlay.append(hashes, keys, matrix, content_at=…, sources=…, deleted=…, category=…)
    overlay.synced(time.monotonic_ns())                              # "all that was there at this time is in"

    reader = Overlay.open(folder)                                    # any process of the node
    reader.poll()                                                    # index only what is new
    rows = reader.find(hashes, keys)                                 # (n,) int64, -1 where not in the overlay

Rows are never changed; of several rows of a key the last one counts: the writer appends a row only where it wins by the table's
rule (lookup.py), so that readers compare nothing.

*Files.* `00000000.rows`, `00000001.rows`, … in the folder, each twice as large as the one before. The writer fills in rows
first and then raises the file's number of published rows; a file is closed when its successor is there. So a writer that dies
leaves a prefix that is right. Disk space is taken when a file is made: a full disk is an error then, not a crash at a later
write. Rows that were replaced stay until the next snapshot starts a new overlay.

With folder None the same lives in the process's own memory.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray.representation_center.overlay_file import DTYPES, OverlayFile
from mim_ray.representation_center.row_index import RowIndex

__all__ = ["DTYPES", "Overlay"]
LARGEST = {"float32": float(np.finfo(np.float32).max), "float16": 65_504.0}
_DELETED, _HAS_CATEGORY = 1, 2


class Overlay:
    """Use `Overlay.create` or `Overlay.open`. One thread writes; `find` and the columns may be read in many."""

    def __init__(self, folder: Path | None, width: int, dtype: str, files: list[OverlayFile]) -> None:
        self.folder, self.width, self.dtype = folder, width, dtype
        self._files = files
        self._starts = np.array([file.first_row for file in files], np.int64)
        self._index = RowIndex()
        self._indexed = 0
        self._lock = threading.Lock()

    @classmethod
    def create(cls, folder: Path | None, *, width: int, dtype: str) -> Overlay:
        """An empty one in a new folder, readable for this user only.

        Args:
            dtype: of the stored vectors, float32 or float16.
        """
        if folder is not None:
            folder.mkdir(parents=True, mode=0o700)
        return cls(folder, width, dtype, [OverlayFile.create(folder, 0, 0, width, dtype, 0)])

    @classmethod
    def open(cls, folder: Path) -> Overlay:
        """Read what another process writes; `poll` takes in what is there.

        Raises:
            ArtifactError: there is none.
        """
        first = OverlayFile.open(folder, 0)
        return cls(folder, first.width, "float16" if first.itemsize == 2 else "float32", [first])

    @property
    def num_rows(self) -> int:
        """Rows indexed so far, replaced ones included."""
        return self._indexed

    @property
    def num_items(self) -> int:
        return len(self._index)

    @property
    def synced_ns(self) -> int:
        """System-wide monotonic time up to which the writer has taken in everything; 0 before the first time."""
        return self._files[0].get("synced")

    @property
    def retired(self) -> bool:
        """Whether the writer has left this overlay for good."""
        return bool(self._files[0].get("retired"))

    def synced(self, at_ns: int) -> None:
        self._files[0].set("synced", at_ns)

    def retire(self) -> None:
        self._files[0].set("retired", 1)

    def poll(self) -> int:
        """Index the rows published since the last time; their number. Without any it costs one read of memory."""
        if not self._files[-1].has_more(self._indexed):
            return 0
        with self._lock:
            before = self._indexed
            while True:
                file = self._files[-1]
                closed = file.get("closed")  # before the number: what is published is then final
                published = file.first_row + file.get("published")
                if published > self._indexed:
                    rows = np.arange(self._indexed, published)
                    self._index_rows(file.hashes[rows - file.first_row], rows)
                if not closed:
                    return self._indexed - before
                assert self.folder is not None
                self._add_file(OverlayFile.open(self.folder, len(self._files)))

    def append(
        self,
        hashes: np.ndarray,
        keys: pa.LargeStringArray,
        matrix: np.ndarray,
        *,
        content_at: np.ndarray,
        sources: np.ndarray,
        deleted: np.ndarray,
        category: pa.Array,
    ) -> None:
        """Publish rows; of a key that is there already the new row counts.

        Args:
            hashes: (n,) `hash_ids` of the keys. matrix: (n, D). content_at: (n,) int64 microseconds. sources: (n,) int64,
                the writer's own note of where each row came from. deleted: (n,) bool. category: (n,) strings or null.
        """
        done = 0
        texts = _interleave(keys, category)  # (2n,)
        ends = np.frombuffer(texts.buffers()[1], np.int64, 2 * len(keys) + 1)
        has_category = np.asarray(category.is_valid(), bool)
        flags = deleted * _DELETED + has_category * _HAS_CATEGORY
        while done < len(keys):
            file = self._files[-1]
            end = done + file.room(ends[2 * done :: 2] - ends[2 * done])
            if end == done:
                self._next_file(int(ends[2 * done + 2] - ends[2 * done]))
                continue
            part = slice(done, end)
            text = np.frombuffer(texts.buffers()[2], np.uint8)[ends[2 * done] : ends[2 * end]]
            rows = np.clip(matrix[part], -LARGEST[self.dtype], LARGEST[self.dtype])
            file.write(
                hashes[part], content_at[part], sources[part], flags[part],
                ends[2 * done : 2 * end + 1] - ends[2 * done], rows, text,
            )  # fmt: skip
            with self._lock:
                self._index_rows(hashes[part], np.arange(self._indexed, self._indexed + end - done))
            done = end

    def find(self, hashes: np.ndarray, keys: pa.LargeStringArray) -> np.ndarray:
        """(n,) int64 row of each key, -1 where the overlay has none (or the key is null).

        Args:
            hashes: (n,) `hash_ids` of the keys.
        """
        return self._index.find(hashes, lambda rows, at: self._same(rows, keys.take(pa.array(at))))

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """(n, D) float32 vectors."""
        return self._column("matrix", rows).astype(np.float32, copy=False)

    def keys(self, rows: np.ndarray) -> pa.LargeStringArray:
        """(n,) item ids."""
        return self._texts(rows, 0)

    def content_at(self, rows: np.ndarray) -> np.ndarray:
        return self._column("content_at", rows)

    def sources(self, rows: np.ndarray) -> np.ndarray:
        return self._column("sources", rows)

    def deleted(self, rows: np.ndarray) -> np.ndarray:
        """(n,) bool."""
        return (self._column("flags", rows) & _DELETED) > 0

    def category(self, rows: np.ndarray) -> pa.Array:
        """(n,) strings or null."""
        there = (self._column("flags", rows) & _HAS_CATEGORY) > 0
        texts = self._texts(rows, 1).cast(pa.string())
        return pc.if_else(pa.array(there), texts, pa.scalar(None, pa.string()))

    def _index_rows(self, hashes: np.ndarray, rows: np.ndarray) -> None:
        self._index.insert(hashes, rows, lambda other, at: self._same(other, self._texts(rows[at], 0)))
        self._indexed += len(rows)

    def _same(self, rows: np.ndarray, keys: pa.Array) -> np.ndarray:
        return np.asarray(pc.fill_null(pc.equal(self._texts(rows, 0), keys), False), bool)

    def _column(self, name: str, rows: np.ndarray) -> np.ndarray:
        files = self._files
        if len(files) == 1:
            return getattr(files[0], name)[rows]
        number = np.searchsorted(self._starts, rows, "right") - 1
        column = getattr(files[0], name)
        result = np.empty((len(rows), *column.shape[1:]), column.dtype)
        for place in np.unique(number):
            inside = number == place
            result[inside] = getattr(files[place], name)[rows[inside] - files[place].first_row]
        return result

    def _texts(self, rows: np.ndarray, which: int) -> pa.Array:
        """Keys (0) or categories (1) of rows."""
        files = self._files
        if len(files) == 1:
            return files[0].texts.take(pa.array(2 * rows + which))
        number = np.searchsorted(self._starts, rows, "right") - 1
        order = np.argsort(number, kind="stable")
        parts = [
            files[place].texts.take(pa.array(2 * (rows[number == place] - files[place].first_row) + which))
            for place in np.unique(number)
        ]
        back = np.empty(len(rows), np.int64)
        back[order] = np.arange(len(rows))
        return pa.concat_arrays([pa.array([], pa.large_string()), *parts]).take(pa.array(back))

    def _next_file(self, text_bytes: int) -> None:
        last = self._files[-1]
        first_row = last.first_row + last.get("published")
        file = OverlayFile.create(self.folder, len(self._files), first_row, self.width, self.dtype, text_bytes)
        self._add_file(file)
        last.set("closed", 1)

    def _add_file(self, file: OverlayFile) -> None:
        self._starts = np.append(self._starts, file.first_row)
        self._files = [*self._files, file]  # second: who sees the file finds its start


def _interleave(keys: pa.LargeStringArray, category: pa.Array) -> pa.LargeStringArray:
    """key 0, category 0, key 1, category 1, …; an empty string for a null."""
    num = len(keys)
    both = pa.concat_arrays([keys, pc.fill_null(category.cast(pa.large_string()), "")])
    return both.take(pa.array(np.arange(2 * num).reshape(2, num).T.reshape(-1)))
