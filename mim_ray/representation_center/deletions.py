"""Which items a snapshot leaves out because they were deleted, and when: an older message must not bring them back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mim_ray import artifacts
from mim_ray.data.ids import hash_ids
from mim_ray.representation_center.current_rows import times
from mim_ray.representation_center.data_files import DataFile
from mim_ray.representation_center.key_index import shard_of
from mim_ray.representation_center.stored_rows import NO_TIME
from mim_ray.representation_center.table import EmbeddingTable

_THREADS = 8


class Deletions:
    """Deleted rows of some files of the log: 16 bytes each, of one shard of the keys.

    Reads footers of data files, and those row groups whose statistics say that they hold a deletion.
    """

    def __init__(self, files: Sequence[DataFile], shard: tuple[int, int] = (0, 1)) -> None:
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        with ThreadPoolExecutor(_THREADS) as pool:
            for rows in pool.map(lambda file: list(_deleted_rows(file)), files):
                for part in rows:
                    hashes = hash_ids(part["item_id"])
                    mine = shard_of(hashes, shard[1]) == shard[0]
                    parts.append((hashes[mine], times(part["content_at"])[mine]))
        hashes = np.concatenate([np.empty(0, np.uint64), *(part[0] for part in parts)])
        at = np.concatenate([np.empty(0, np.int64), *(part[1] for part in parts)])
        order = np.lexsort((at, hashes))
        hashes, at = hashes[order], at[order]
        last = np.append(hashes[1:] != hashes[:-1], True)[: len(hashes)]
        self._hashes, self._at = hashes[last], at[last]

    @classmethod
    def until(
        cls, table: EmbeddingTable | None, encoder_version: str, version: int, shard: tuple[int, int]
    ) -> Deletions:
        """Those of a table's commits up to a Delta version; none without a table."""
        if table is None or version < 0 or not table.exists():
            return cls([])
        return cls([file for file in table.scan(encoder_version)[1] if file.commit_version <= version], shard)

    def __len__(self) -> int:
        return len(self._hashes)

    def content_at(self, hashes: np.ndarray) -> np.ndarray:
        """(n,) int64 time of each item's last deletion; NO_TIME where there is none."""
        if not len(self):
            return np.full(len(hashes), NO_TIME, np.int64)
        place = np.minimum(np.searchsorted(self._hashes, hashes), len(self) - 1)
        return np.where(self._hashes[place] == hashes, self._at[place], NO_TIME)


def _deleted_rows(file: DataFile) -> Iterator[pa.Table]:
    fs, path = artifacts.filesystem(file.uri)
    with pq.ParquetFile(path, filesystem=fs) as source:
        column = [source.schema.column(number).path for number in range(len(source.schema))].index("deleted")
        for group in range(source.metadata.num_row_groups):
            statistics = source.metadata.row_group(group).column(column).statistics
            if statistics is None or not statistics.has_min_max or statistics.max:
                rows = source.read_row_group(group, columns=["item_id", "content_at", "deleted"])
                yield rows.filter(rows["deleted"])
