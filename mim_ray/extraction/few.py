"""A round of a few thousand changes: prepared by tasks, encoded by the warm pool, committed as one file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from mim_ray.config.scenario import Extraction
from mim_ray.extraction.changes import deletion_rows
from mim_ray.extraction.chosen import Change, ChosenRows, with_times
from mim_ray.extraction.read import COLUMNS, Decoding, prepare_items
from mim_ray.extraction.warm_pool import Parts, WarmPool
from mim_ray.extraction.write import DETAILS
from mim_ray.representation_center.data_files import FILE_SCHEMA
from mim_ray.representation_center.snapshot import Snapshot

ROWS = pa.schema(
    [FILE_SCHEMA.field(name) for name in ("item_id", "embedding", "content_hash", "content_at", "category", "deleted")]
)


@dataclass
class Encoded:
    """What became of a round's rows.

    Attributes:
        tables: of `ROWS`, to be committed. lost: deletion rows of items that have no usable content any more.
        rejects: (key, reason, detail). num_same: whose content turned out to be the known one (a picture still broken).
    """

    tables: list[pa.Table] = field(default_factory=list)
    lost: pa.Table = field(default_factory=lambda: deletion_rows([], []))
    rejects: list[tuple[str, str, str]] = field(default_factory=list)
    num_encoded: int = 0
    num_copied: int = 0
    num_same: int = 0


def encode_few(
    changes: Sequence[Change],
    snapshot: Snapshot | None,
    pool: Callable[[], WarmPool],
    decoding: Decoding,
    settings: Extraction,
    task_cpus: float,
) -> Encoded:
    """Encode changes that have details. Equal content is encoded once, and copied where the snapshot has it exactly.

    Args:
        pool: is called when something is to be encoded.
    """
    if not changes:
        return Encoded()
    owner = np.repeat(np.arange(len(changes)), [change.chosen.num_rows for change in changes])
    details = pa.concat_tables([change.details for change in changes]).combine_chunks()
    source = np.full(len(owner), -1, np.int64)
    if snapshot is not None and snapshot.dtype == "float32":
        source = snapshot.find_content(details["content_hash"])
    copied = source >= 0
    result = Encoded(num_copied=int(copied.sum()))
    if copied.any():
        assert snapshot is not None
        rows = details.filter(pa.array(copied))
        vectors = _lists(snapshot.gather(source[copied]))
        result.tables.append(_rows(rows, vectors, rows["content_hash"]))
    todo = np.flatnonzero(~copied)
    if not len(todo):
        return result
    codes = pc.dictionary_encode(details["content_hash"].combine_chunks().take(pa.array(todo))).indices.to_numpy()
    _, first, which = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first)  # one row for each content, in the order of the slices
    leaders = todo[first[order]]
    answer = np.argsort(order)[which]  # (todo,) number of the leader that speaks for each
    at_once = int(np.clip(-(-len(leaders) // (2 * settings.num_actors)), 1, settings.batch_size))
    parts = _prepared(changes, owner, details, leaders, at_once, decoding, task_cpus)
    found = pa.concat_tables(pool().encode(parts)).combine_chunks()
    result.num_encoded = found.num_rows
    _collect(result, found.take(pa.array(answer)), details.take(pa.array(todo)), found)
    return result


def deletion_table(deletions: pa.Table, width: int) -> pa.Table:
    """Rows of `ROWS` that delete items. Their vectors are zeros: a row has its width, whatever it says."""
    num = deletions.num_rows
    columns = {
        "item_id": deletions["item_id"],
        "embedding": _lists(np.zeros((num, width), np.float32)),
        "content_hash": pa.nulls(num, pa.string()),
        "content_at": deletions["content_at"],
        "category": pa.nulls(num, pa.string()),
        "deleted": pa.repeat(pa.scalar(True), num),
    }
    return pa.table(columns).cast(ROWS)


def _collect(result: Encoded, answers: pa.Table, details: pa.Table, found: pa.Table) -> None:
    """Rows, rejects and losses of details whose encoded rows are `answers`, aligned; `found` are all encoded rows."""
    for item_id, known, at, row in zip(
        details["item_id"].to_pylist(),
        details["known"].to_pylist(),
        details["content_at"].cast(pa.int64()).to_pylist(),
        answers.select(["image_reason", "image_detail", "drop_reason"]).to_pylist(),
        strict=True,
    ):
        if row["image_reason"] is not None:
            result.rejects.append((item_id, row["image_reason"], row["image_detail"] or ""))
        if row["drop_reason"] is not None:
            result.rejects.append((item_id, row["drop_reason"], DETAILS[row["drop_reason"]]))
            if known is not None:
                result.lost = pa.concat_tables([result.lost, deletion_rows([item_id], [at])])
    usable = pc.is_null(answers["drop_reason"])
    same = pc.fill_null(pc.equal(answers["content_hash"], details["known"]), False)
    result.num_same += pc.sum(pc.and_(usable, same)).as_py() or 0
    keep = pc.and_(usable, pc.invert(same))
    answers, details = answers.filter(keep), details.filter(keep)
    vectors = answers["embedding"].combine_chunks()
    if vectors.null_count:  # a row that shows the same as another one was not encoded itself
        whole = found.filter(found["embedding"].is_valid()).combine_chunks()
        vectors = whole["embedding"].combine_chunks().take(pc.index_in(answers["content_hash"], whole["content_hash"]))
    if details.num_rows:
        result.tables.append(_rows(details, vectors, answers["content_hash"]))


def _prepared(
    changes: Sequence[Change],
    owner: np.ndarray,
    details: pa.Table,
    leaders: np.ndarray,
    at_once: int,
    decoding: Decoding,
    task_cpus: float,
) -> Iterator[Parts]:
    """Batches of about `at_once` leaders, as tables that tasks are preparing."""
    task: Any = ray.remote(_prepare).options(num_cpus=task_cpus)
    shared = ray.put(decoding)
    places = details["place"].to_numpy()
    times = details["content_at"].cast(pa.int64()).to_numpy()
    starts = np.searchsorted(owner, np.arange(len(changes)))
    for start in range(0, len(leaders), at_once):
        batch = leaders[start : start + at_once]
        parts = []
        for number in np.unique(owner[batch]).tolist():
            change, rows = changes[number], batch[owner[batch] == number]
            if change.carried is not None:
                parts.append(task.remote(change.carried, places[rows], times[rows], shared, None))
            else:
                parts.append(task.remote(None, rows - starts[number], times[rows], shared, change.chosen))
        yield parts


def _prepare(
    carried: pa.Table | None, places: np.ndarray, times: np.ndarray, decoding: Decoding, chosen: ChosenRows | None
) -> pa.Table:
    """Rows `places` of the carried content or, without, of the chosen rows, as an encoder takes them."""
    rows = carried if carried is not None or chosen is None else chosen.read(COLUMNS)
    assert rows is not None
    rows = with_times(rows.take(pa.array(places)), times).combine_chunks()
    return prepare_items(rows, np.zeros(rows.num_rows, bool), decoding)


def _rows(details: pa.Table, vectors: pa.Array, hashes: pa.ChunkedArray) -> pa.Table:
    columns = {
        "item_id": details["item_id"],
        "embedding": vectors,
        "content_hash": hashes,
        "content_at": details["content_at"],
        "category": details["category"],
        "deleted": pa.repeat(pa.scalar(False), details.num_rows),
    }
    return pa.table(columns).cast(ROWS)


def _lists(matrix: np.ndarray) -> pa.Array:
    offsets = np.arange(len(matrix) + 1, dtype=np.int32) * matrix.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(matrix).reshape(-1)))
