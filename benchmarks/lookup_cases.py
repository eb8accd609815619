"""Cases of benchmarks/lookup.py that need nothing but a snapshot: its speed beside a raw gather, and its size."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from measuring import ratio, seconds_in_turn

from mim_ray.data.ids import hash_ids
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.snapshot_writer import SnapshotWriter

if TYPE_CHECKING:
    from lookup import Plan

KEY_SETS = 16
"""Calls go through this many sets of keys, so that a call does not find its rows in the caches from the one before."""
_BLOCK_ROWS = 2**15


def against_raw_gather(plan: Plan) -> dict[str, Any]:
    """`vs_raw_gather`, `string_keys_vs_raw_gather` (the least of the dtypes), `bytes_per_item` and what is behind them."""
    found: dict[str, Any] = {}
    rows_in, keys_in = {}, {}
    for dtype in ("float16", "float32"):
        snapshot, seconds = make_snapshot(plan.work, plan.rows, plan.width, dtype)
        rows_in[dtype], keys_in[dtype] = _pairs(snapshot, plan.keys, plan.budget_s)
        if dtype == "float16":
            found["bytes_per_item"] = size(snapshot) | {"write_s": round(seconds, 1)}
    found["vs_raw_gather"] = _least(rows_in, plan.rows)
    found["string_keys_vs_raw_gather"] = _least(keys_in, plan.rows)
    if plan.many_rows is not None:
        snapshot, seconds = make_snapshot(plan.work, plan.many_rows, plan.width, "float16")
        rows, keys = _pairs(snapshot, plan.keys, plan.budget_s)
        found["many_rows"] = {
            "rows": plan.many_rows,
            "write_s": round(seconds, 1),
            "vs_raw_gather": rows,
            "string_keys_vs_raw_gather": keys,
        }
    return found


def make_snapshot(work: Path, num_rows: int, width: int, dtype: str) -> tuple[Snapshot, float]:
    """A snapshot of items item-0000000 … with uniform vectors (one block of them, again and again); seconds to write it."""
    line = f"{work}/{dtype}-{num_rows}x{width}"
    start = time.perf_counter()
    ids = item_ids(np.arange(num_rows))
    hashes = hash_ids(ids)
    order = np.argsort(hashes)
    block = np.random.default_rng(0).uniform(-1, 1, (_BLOCK_ROWS, width)).astype(np.float32)
    with SnapshotWriter(
        line,
        encoder_version="benchmark",
        delta_version=0,
        width=width,
        dtype=dtype,
        most_rows=num_rows,
        has_times=True,
        has_contents=False,
    ) as writer:
        for first in range(0, num_rows, _BLOCK_ROWS):
            piece = order[first : first + _BLOCK_ROWS]
            keys = ids.take(pa.array(piece))
            writer.append(hashes[piece], keys, block[: len(piece)], content_at=np.zeros(len(piece), np.int64))
        uri = writer.publish()
    seconds = time.perf_counter() - start
    return Snapshot.open(uri), seconds


def item_ids(numbers: np.ndarray) -> pa.LargeStringArray:
    """Ids of 12 characters."""
    text = np.empty((len(numbers), 12), np.uint8)
    text[:, :5] = np.frombuffer(b"item-", np.uint8)
    for place in range(7):
        text[:, 11 - place] = 48 + numbers // 10**place % 10
    offsets = np.arange(len(numbers) + 1, dtype=np.int64) * 12
    return pa.LargeStringArray.from_buffers(len(numbers), pa.py_buffer(offsets), pa.py_buffer(text))


def size(snapshot: Snapshot) -> dict[str, Any]:
    """Bytes that a parameter machine maps for an item: index, ids, row, time."""
    return {
        "value": round(snapshot.num_mapped_bytes / snapshot.num_rows, 2),
        "row_bytes": snapshot.matrix.nbytes // snapshot.num_rows,
        "id_bytes": 12,
        "rows": snapshot.num_rows,
    }


def raw_gather(matrix: np.ndarray, rows: np.ndarray, as_float32: bool) -> np.ndarray:
    """The fastest gather of the mapped matrix that we know: NumPy's, and torch's conversion, which is faster than NumPy's."""
    taken = np.take(matrix, rows, axis=0)
    return torch.from_numpy(taken).float().numpy() if as_float32 and taken.dtype != np.float32 else taken


def speed(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """How many times as fast as theirs: median over the pairs with quartiles, and both sides' median times."""
    found = ratio(theirs, ours)
    return found | {"mim_ray_ms": found["other_ms"], "other_ms": found["mim_ray_ms"]}


def _pairs(snapshot: Snapshot, num_keys: int, budget_s: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Speeds with row numbers and with string keys in, each for float32 out and the stored dtype out."""
    rng = np.random.default_rng(1)
    sets = [rng.integers(0, snapshot.num_rows, num_keys) for _ in range(KEY_SETS)]
    numbers = [item_ids(rng.integers(0, snapshot.num_rows, num_keys)) for _ in range(KEY_SETS)]
    lists = [keys.to_pylist() for keys in numbers[:4]]
    matrix = snapshot.matrix

    def raw(as_float32: bool) -> Callable[[], object]:
        rows = itertools.cycle(sets)
        return lambda: raw_gather(matrix, next(rows), as_float32)

    def timed(step: Callable[[Any], object], values: list[Any], as_float32: bool) -> dict[str, Any]:
        own = itertools.cycle(values[len(values) // 2 :] + values[: len(values) // 2])
        gc.collect()
        share = budget_s / (2 if snapshot.dtype == "float32" else 5)
        return speed(*seconds_in_turn(lambda: step(next(own)), raw(as_float32), budget_s=share, most=400))

    by_number = {"float32_out": timed(snapshot.gather, sets, True)}
    by_key = {
        "float32_out": timed(lambda keys: snapshot.gather(snapshot.lookup(keys)), numbers, True),
        "python_list_float32_out": timed(lambda keys: snapshot.gather(snapshot.lookup(keys)), lists, True),
    }
    if snapshot.dtype != "float32":
        by_number[f"{snapshot.dtype}_out"] = timed(snapshot.gather_stored, sets, False)
        by_key[f"{snapshot.dtype}_out"] = timed(
            lambda keys: snapshot.gather_stored(snapshot.lookup(keys)), numbers, False
        )
    return by_number, by_key


def _least(by_dtype: dict[str, dict[str, Any]], rows: int) -> dict[str, Any]:
    values = list(_values(by_dtype))
    return {"value": min(values), "rows": rows, **by_dtype}


def _values(by_dtype: dict[str, dict[str, Any]]) -> Iterator[float]:
    for cases in by_dtype.values():
        yield from (case["value"] for case in cases.values())
