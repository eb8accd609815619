"""From encoded rows to files, and from files to whole shards in the table."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mim_ray import artifacts
from mim_ray.data.rejects import reject_rows
from mim_ray.data.schema import REJECTS
from mim_ray.extraction.plan import Plan
from mim_ray.extraction.read import MAX_ID_BYTES
from mim_ray.representation_center.data_files import Fragment, write_fragment
from mim_ray.representation_center.table import EmbeddingTable

STAGE = "extraction"
TABLE_COLUMNS = ["item_id", "embedding", "content_hash", "content_at", "category"]


@dataclass(frozen=True)
class ShardFile:
    """A finished shard: the file that holds its rows, which no commit names yet, and how many rows it accounts for.

    Attributes:
        num_copied: rows whose embedding was that of equal content. rejects: URI of the file of its rejects, if it has any.
    """

    num_rows: int
    fragment: Fragment
    num_copied: int = 0
    rejects: str | None = None


def write_shard(
    rows: pa.Table, *, shard_id: str, table: str, rejects: str, encoder_version: str, num_copied: int = 0
) -> ShardFile:
    """Write a shard's rows (embed.resolve) as one file of the table; its rejects, if any, beside under the same name."""
    good = rows.filter(pc.is_null(rows["drop_reason"])).select(TABLE_COLUMNS)
    fragment = write_fragment(table, good, encoder_version=encoder_version, shard_id=shard_id)
    unusable = _unusable(rows)
    if unusable.num_rows:
        sink = pa.BufferOutputStream()
        pq.write_table(unusable, sink)
        uri = f"{rejects}/{_name(fragment.path)}"
        artifacts.write_bytes(uri, sink.getvalue().to_pybytes())
    return ShardFile(rows.num_rows, fragment, num_copied, uri if unusable.num_rows else None)


def read_rejects_of(plan: Plan, rejects: str) -> pa.Table:
    """Rejects of the plan's shards, all of which are in the table. Of a shard that was made twice the first file counts:
    equal shards have equal rejects."""
    by_shard: dict[str, str] = {}
    for file in artifacts.list_files(rejects, ".parquet"):
        by_shard.setdefault(_name(file).removeprefix("batch-").rpartition("-")[0], file)

    with ThreadPoolExecutor(8) as pool:
        wanted = [by_shard[shard_id] for shard_id in plan.shard_ids() if shard_id in by_shard] if by_shard else []
        return pa.concat_tables([REJECTS.schema.empty_table(), *pool.map(read_rejects_file, wanted)])


def read_rejects_file(uri: str) -> pa.Table:
    """The rejects of one shard."""
    return pq.read_table(pa.BufferReader(artifacts.read_bytes(uri)))


class Committer:
    """Commits complete shards every `every_s` seconds in a thread, and at the end. The job's only committer."""

    def __init__(self, table: EmbeddingTable, every_s: float) -> None:
        self._table, self._every_s = table, every_s
        self._waiting: list[Fragment] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name="committer")

    def add(self, fragments: list[Fragment]) -> None:
        """All files of a complete shard."""
        if self._error is not None:
            raise self._error
        with self._lock:
            self._waiting += fragments

    def __enter__(self) -> Committer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()  # complete shards are committed even when the job fails
        if kind is None and self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            stopped = self._stop.wait(self._every_s)
            with self._lock:
                fragments, self._waiting = self._waiting, []
            try:
                if fragments:
                    self._table.commit(fragments)
            except Exception as error:  # noqa: BLE001  (raised again in the job's own thread)
                self._error = error
                return
            if stopped:
                return


def _unusable(rows: pa.Table) -> pa.Table:
    found = []
    for row in rows.select(["item_id", "row", "image_reason", "image_detail", "drop_reason"]).to_pylist():
        key = (row["item_id"] or f"row {row['row']}")[:MAX_ID_BYTES]
        if row["image_reason"] is not None:
            found.append((key, row["image_reason"], row["image_detail"] or ""))
        if row["drop_reason"] is not None:
            found.append((key, row["drop_reason"], _DETAILS[row["drop_reason"]]))
    return reject_rows(STAGE, "items", found)


_DETAILS = {
    "no item id": "the row has no item_id",
    "item id too long": f"the id has more than {MAX_ID_BYTES} bytes",
    "duplicate item id": "the first row with this id is used",
    "no content": "neither a usable image nor a title, so there is nothing to embed",
}


def _name(path: str) -> str:
    return path.rpartition("/")[2]
