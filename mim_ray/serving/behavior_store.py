"""Each user's newest behaviors, memory-mapped: what `/v1/rank` uses when the caller sends none.

The samples stage leaves `behaviors/part-*.parquet` (user_id, behaviors oldest first, and by choice their times). Opening it
once makes one Arrow file sorted by user, kept by content in the cache folder; replicas of a machine map the same file, and a
look-up is a binary search.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mim_ray import artifacts
from mim_ray.data.schema import TIME
from mim_ray.errors import ArtifactError
from mim_ray.local_cache import cache_folder, drop_unused, note_use

_SCHEMA = pa.schema(
    [
        ("user_id", pa.large_string()),
        ("behaviors", pa.large_list(pa.large_string())),
        ("behavior_times", pa.large_list(TIME)),
    ]
)


class BehaviorStore:
    """user id -> item ids, oldest first, and their times."""

    def __init__(self, table: pa.Table) -> None:
        """
        Args:
            table: user_id (unique, sorted by bytes), behaviors and behavior_times, each in at most one chunk.
        """
        self._users = _one_chunk(table["user_id"])
        self._behaviors = _one_chunk(table["behaviors"])
        self._times = _one_chunk(table["behavior_times"].cast(pa.large_list(pa.int64())))

    @classmethod
    def open(cls, uri: str) -> BehaviorStore:
        """Map the store made from the Parquet files at `uri`; the first call makes it.

        Raises:
            ArtifactError: no Parquet files there, or without the two columns.
        """
        if not artifacts.exists(uri):
            raise ArtifactError(
                f"{uri} is not there, so no user's behaviors are known. Run jobs/build_samples.py first."
            )
        store, source = artifacts.fingerprint(uri)[:16], artifacts.source_fingerprint(uri)
        path = cache_folder() / f"behaviors-{store}-{artifacts.fingerprint(source, _SCHEMA.names)}.arrow"
        if not path.exists():
            _write_sorted(_read(uri), path)
            others = [other for other in path.parent.glob(f"behaviors-{store}-*.arrow") if other != path]
            for old in sorted(others, key=_written_at)[:-1]:  # who has them mapped keeps them
                old.unlink(missing_ok=True)
            drop_unused(path.parent.glob("behaviors-*.arrow"))  # of other runs
        note_use(path)
        with pa.memory_map(str(path)) as file:
            return cls(pa.ipc.open_file(file).read_all())

    def __len__(self) -> int:
        return len(self._users)

    def history(self, user_id: str) -> tuple[list[str], list[int] | None]:
        """The user's past items, oldest first, and their times in microseconds, None where these are not known; empty for
        an unknown user."""
        key = user_id.encode()
        low, high = 0, len(self._users)
        while low < high:
            middle = (low + high) // 2
            if self._users[middle].as_buffer().to_pybytes() < key:
                low = middle + 1
            else:
                high = middle
        if low == len(self._users) or self._users[low].as_py() != user_id:
            return [], None
        behaviors, times = self._behaviors[low].as_py(), self._times[low].as_py()
        return behaviors, times if times is not None and len(times) == len(behaviors) else None


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process was first
        return 0.0


def _read(uri: str) -> pa.Table:
    tables = []
    for file in artifacts.list_files(uri, ".parquet"):
        fs, path = artifacts.filesystem(file)
        try:
            table = pq.ParquetFile(path, filesystem=fs).read(_SCHEMA.names)
            if "behavior_times" not in table.column_names:
                table = table.append_column("behavior_times", pa.nulls(len(table), _SCHEMA.field(2).type))
            tables.append(table.select(_SCHEMA.names).cast(_SCHEMA))
        except (pa.ArrowInvalid, ValueError, KeyError) as error:
            raise ArtifactError(
                f"{file} is no table of user_id and behaviors ({error}). Run jobs/build_samples.py again."
            ) from None
    if not tables:
        raise ArtifactError(f"{uri} holds no Parquet files. Run jobs/build_samples.py again.")
    return pa.concat_tables(tables)


def _write_sorted(table: pa.Table, path: Path) -> None:
    """One record batch, sorted by user, complete or not there."""
    order = pc.sort_indices(table["user_id"])  # by bytes, as the look-up compares
    table = table.take(order).combine_chunks()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    os.close(handle)
    with pa.OSFile(temporary, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    os.replace(temporary, path)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 0:
        return pa.array([], type=column.type)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
