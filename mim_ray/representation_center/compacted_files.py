"""Writing the result of a merge: few large files, streamed, with the marks of all files whose rows they hold."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from types import TracebackType

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mim_ray import artifacts
from mim_ray.representation_center.data_files import (
    COMPACTED,
    FILE_SCHEMA,
    SEGMENTS_KEY,
    SHARDS_KEY,
    WRITE_OPTIONS,
    DataFile,
    Fragment,
    Marks,
    segment_time,
)

FILE_BYTES = 256 * 2**20
GROUP_ROWS = 65_536


class CompactedFiles:
    """A context in which rows are written to new files of about 256 MiB; `fragments` names them afterwards.

    Args:
        sources: the files being merged: one encoder version. Their sizes say how many rows a new file may have.
        segments: all window segments that will be accounted for; their first and last time stand in the names.
    """

    def __init__(self, table_uri: str, sources: Sequence[DataFile], segments: Iterable[str]) -> None:
        self._table_uri = table_uri
        self._encoder_version = sources[0].encoder_version
        written_at = [segment_time(name) for name in segments]
        self._name = f"{COMPACTED}{min(written_at, default=0)}-{max(written_at, default=0)}"
        num_rows = sum(file.num_rows for file in sources)
        self._file_rows = max(GROUP_ROWS, -(-num_rows // self.expected_files(sources)))
        self._pending: list[pa.Table] = []
        self._num_pending = 0
        self._marks = Marks()
        self._file: _File | None = None
        self.fragments: list[Fragment] = []
        self.num_rows = 0

    @staticmethod
    def expected_files(sources: Sequence[DataFile]) -> int:
        """Files that rows of these sizes fill."""
        return max(1, -(-sum(file.num_bytes for file in sources) // FILE_BYTES))

    def write(self, rows: pa.Table) -> None:
        """Rows of `FILE_SCHEMA` (more columns are left out)."""
        self._pending.append(rows.select(FILE_SCHEMA.names))
        self._num_pending += rows.num_rows
        while self._num_pending >= GROUP_ROWS:
            self._flush(GROUP_ROWS)

    def account_for(self, marks: Marks) -> None:
        """The rows that these marks stand for have been written, or need not be."""
        self._marks = Marks(self._marks.shards | marks.shards, self._marks.segments | marks.segments)

    def __enter__(self) -> CompactedFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self._flush(self._num_pending)
            self._file = self._file or self._open()
            self._finish()
        elif self._file is not None:
            self._file.abandon()

    def _flush(self, num: int) -> None:
        rows = pa.concat_tables(self._pending) if self._pending else FILE_SCHEMA.empty_table()
        group, rest = rows.slice(0, num), rows.slice(num)
        self._pending, self._num_pending = [rest], rest.num_rows
        if not num:
            return
        if self._file is not None and self._file.num_rows >= self._file_rows:
            self._finish()
        self._file = self._file or self._open()
        self._file.write(group)
        self.num_rows += num

    def _open(self) -> _File:
        path = f"encoder_version={self._encoder_version}/{self._name}-{uuid.uuid4().hex[:12]}.parquet"
        return _File(self._table_uri, path)

    def _finish(self) -> None:
        assert self._file is not None
        self.fragments.append(self._file.close(self._encoder_version, self._marks))
        self._file, self._marks = None, Marks()


class _File:
    """One Parquet file that is being written."""

    def __init__(self, table_uri: str, path: str) -> None:
        self.path, self.num_rows = path, 0
        self._fs, self._target = artifacts.filesystem(f"{table_uri}/{path}")
        self._is_local = artifacts.local_path(table_uri) is not None
        if self._is_local:
            os.makedirs(os.path.dirname(self._target), exist_ok=True)
        self._stream = self._fs.open_output_stream(self._target)
        self._writer = pq.ParquetWriter(self._stream, FILE_SCHEMA, **WRITE_OPTIONS)
        self._shards: list[str] = []

    def write(self, rows: pa.Table) -> None:
        self._writer.write_table(rows, row_group_size=rows.num_rows)
        self.num_rows += rows.num_rows
        extremes = pc.min_max(rows["shard_id"]).as_py()
        self._shards += [extremes["min"], extremes["max"]]

    def close(self, encoder_version: str, marks: Marks) -> Fragment:
        self._writer.add_key_value_metadata(
            {SHARDS_KEY: json.dumps(sorted(marks.shards)), SEGMENTS_KEY: json.dumps(sorted(marks.segments))}
        )
        self._writer.close()
        self._stream.close()
        if self._is_local:
            artifacts.sync(self._target)
        size = self._fs.get_file_info(self._target).size
        ids = {*self._shards, *marks.shards, *marks.segments}
        return Fragment(self.path, size, self.num_rows, encoder_version, [min(ids), max(ids)] if ids else [])

    def abandon(self) -> None:
        """Close and delete what was written: nobody will name it."""
        with contextlib.suppress(OSError):
            self._writer.close()
            self._stream.close()
            self._fs.delete_file(self._target)
