"""From encoded rows to files, and from files to whole shards in the table."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mim_ray import artifacts
from mim_ray.data.rejects import reject_rows
from mim_ray.data.schema import REJECTS
from mim_ray.representation_center.data_files import Fragment, write_fragment
from mim_ray.representation_center.table import EmbeddingTable

STAGE = "extraction"
TABLE_COLUMNS = ["item_id", "embedding", "content_hash", "content_at", "category"]


def write_pieces(batch: pa.Table, *, table: str, rejects: str, encoder_version: str) -> pa.Table:
    """Write a batch's rows as one file per shard met; rejects beside, under the same name.

    Returns:
        A row per file: shard_id, rows (list: numbers in the shard that the file accounts for), fragment (JSON).
    """
    shards, numbers, fragments = [], [], []
    for shard_id in pc.unique(batch["shard_id"]).to_pylist():
        rows = batch.filter(pc.equal(batch["shard_id"], shard_id))
        good = rows.filter(pc.is_null(rows["drop_reason"])).select(TABLE_COLUMNS)
        fragment = write_fragment(table, good, encoder_version=encoder_version, shard_id=shard_id)
        unusable = unusable_rows(rows)
        if unusable.num_rows:
            sink = pa.BufferOutputStream()
            pq.write_table(unusable, sink)
            artifacts.write_bytes(f"{rejects}/{_name(fragment.path)}", sink.getvalue().to_pybytes())
        shards.append(shard_id)
        numbers.append(rows["row"].to_pylist())
        fragments.append(json.dumps(asdict(fragment)))
    return pa.table(
        {
            "shard_id": pa.array(shards, pa.string()),
            "rows": pa.array(numbers, pa.list_(pa.int64())),
            "fragment": pa.array(fragments, pa.string()),
        }
    )


def read_rejects_of(shard_ids: Iterable[str], *, table: EmbeddingTable, rejects: str, encoder_version: str) -> pa.Table:
    """Rejects of those shards that are in the table. Files of attempts that were never committed do not count."""
    wanted = set(shard_ids)
    files = {file.rpartition("/")[2]: file for file in artifacts.list_files(rejects, ".parquet")}
    tables = []
    for committed in table.scan(encoder_version)[1]:
        name = _name(committed.path)
        if name in files and name.removeprefix("batch-").rpartition("-")[0] in wanted:
            tables.append(pq.read_table(pa.BufferReader(artifacts.read_bytes(files[name]))))
    return pa.concat_tables(tables) if tables else REJECTS.schema.empty_table()


@dataclass
class OpenShards:
    """Collects the files of each shard, however the engine cut and merged blocks, until all of its rows are there.

    Attributes:
        sizes: shard id -> number of its rows.
    """

    sizes: dict[str, int]
    _missing: dict[str, np.ndarray] = field(default_factory=dict)
    _files: dict[str, list[Fragment]] = field(default_factory=dict)

    def add(self, shard_id: str, rows: Iterable[int], fragment: Fragment) -> list[Fragment]:
        """Note a file; the shard's files once it is complete, else none. A file met again changes nothing."""
        missing = self._missing.setdefault(shard_id, np.ones(self.sizes[shard_id], bool))
        numbers = np.asarray(list(rows), np.int64)
        if not missing[numbers].all():  # the engine ran a task twice and its first result was used
            assert not missing[numbers].any(), f"two files share some rows of shard {shard_id}, not all"
            return []
        missing[numbers] = False
        self._files.setdefault(shard_id, []).append(fragment)
        return [] if missing.any() else self._files.pop(shard_id)


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


def unusable_rows(rows: pa.Table) -> pa.Table:
    found = []
    for row in rows.select(["item_id", "row", "image_reason", "image_detail", "drop_reason"]).to_pylist():
        key = row["item_id"] or f"row {row['row']}"
        if row["image_reason"] is not None:
            found.append((key, row["image_reason"], row["image_detail"] or ""))
        if row["drop_reason"] is not None:
            found.append((key, row["drop_reason"], DETAILS[row["drop_reason"]]))
    return reject_rows(STAGE, "items", found)


DETAILS = {
    "no item id": "the row has no item_id",
    "duplicate item id": "the first row with this id is used",
    "no content": "neither a usable image nor a title, so there is nothing to embed",
}


def _name(path: str) -> str:
    return path.rpartition("/")[2]
