"""Training input made ahead on CPU workers, in order: a Ray Data pipeline of its own for each training worker.

Input comes in chunks. Chunk number i is a function of i alone (which rows, what is drawn, what is decoded), so a resumed
run asks for the chunks from i on and gets the same ones. Ray Data runs one task per chunk, `num_decoders` at a time, keeps
their order (`preserve_order`) and makes no more while the training step is the slower side. `streaming_split` promises no
order and Ray 2.60 no resume in mid-epoch, so the row order is ours (batches.py).
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from mim_ray.data.batches import prefetch
from mim_ray.runtime.cluster import quiet_data, user_error

if TYPE_CHECKING:
    from ray.data.datasource import Datasource

Chunk = dict[str, np.ndarray]
"""Named arrays of any shapes; other values travel as JSON bytes (`json_array`)."""
_ASKED_AHEAD = 3
_SEGMENT = 1_024  # chunks of one Ray Data execution
_BUFFER_BYTES = 256 * 2**20  # of finished chunks that wait, per pipeline; an eighth of a small object store


class ChunkSource(Protocol):
    """Says what chunks are, in a few hashable values that travel to the tasks (a frozen dataclass)."""

    def __hash__(self) -> int: ...

    def open(self) -> Callable[[int], Chunk]:
        """The function that makes chunk i. A process opens a source once and keeps it."""
        ...


def ordered_chunks(
    source: ChunkSource, start: int, stop: int | None, *, num_decoders: int, cpus_per_decoder: float
) -> Iterator[Chunk]:
    """Chunks start, start + 1, … stop − 1 (None: without end), in this order, made ahead.

    Args:
        num_decoders: tasks at once; 0 makes the chunks in a thread of this process, without Ray.
        cpus_per_decoder: CPUs that Ray reserves for each; may be 0 where training has taken all.

    Raises:
        MimRayError: what a task raised on purpose.
    """
    if not num_decoders:
        make, numbers = source.open(), itertools.count(start) if stop is None else range(start, stop)
        return prefetch(make(number) for number in numbers)
    return prefetch(_from_feeder(source, start, stop, num_decoders, cpus_per_decoder), depth=1)


def json_array(value: object) -> np.ndarray:
    """A JSON-able value as uint8 bytes, to travel in a chunk."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def json_value(array: np.ndarray) -> Any:
    """The reverse of `json_array`."""
    return json.loads(array.tobytes())


def decoder_cpus(num_workers: int, cpus_per_worker: float, num_decoders: int) -> float:
    """CPUs to reserve for each decoding task: one, or an even part of what the training workers leave, even none.

    With 0 the tasks still run, beside the training steps; reserving more than there is would wait for ever.
    """
    import ray

    total = ray.cluster_resources().get("CPU", 0.0)
    num_tasks = num_workers * num_decoders
    if total < 1 or not num_tasks:  # a cluster that still has to grow shows no CPUs
        return 1.0
    left = max(0.0, total - num_workers * cpus_per_worker) / num_tasks
    return 1.0 if left >= 1 else int(left * 100) / 100


def _from_feeder(source: ChunkSource, start: int, stop: int | None, num_decoders: int, cpus: float) -> Iterator[Chunk]:
    """The chunks from a process beside this one: Ray Data's executor is a busy thread, and in the training process it
    would take the interpreter from the training steps (measured: steps five times as long)."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    feeder: Any = ray.remote(_Feeder).options(num_cpus=0, scheduling_strategy=here)
    feeder = feeder.remote(source, start, stop, num_decoders, cpus)
    asked = deque(feeder.next.remote() for _ in range(_ASKED_AHEAD))
    try:
        while True:
            row = ray.get(asked.popleft())
            if row is None:
                return
            asked.append(feeder.next.remote())
            yield _unpacked(row.column("layout")[0].as_py(), row.column("data")[0].as_buffer())
    except Exception as error:
        known = user_error(error)
        if known is None:
            raise
        raise known from None
    finally:
        ray.kill(feeder)


class _Feeder:
    """Runs one Ray Data pipeline and hands out its chunks in order, as tables of one row; None at the end."""

    def __init__(self, source: ChunkSource, start: int, stop: int | None, num_decoders: int, cpus: float) -> None:
        self._rows = _through_ray_data(source, start, stop, num_decoders, cpus)

    def next(self) -> pa.Table | None:
        return next(self._rows, None)


def _through_ray_data(
    source: ChunkSource, start: int, stop: int | None, num_decoders: int, cpus: float
) -> Iterator[pa.Table]:
    import ray.data

    quiet_data()
    store = int(ray.cluster_resources().get("object_store_memory", 0))
    buffer = min(_BUFFER_BYTES, store // 8) if store else _BUFFER_BYTES
    while stop is None or start < stop:
        end = start + _SEGMENT if stop is None else min(stop, start + _SEGMENT)
        chunks = ray.data.read_datasource(
            _datasource(source, start, end), override_num_blocks=end - start, concurrency=num_decoders, num_cpus=cpus
        )
        options = chunks.context.execution_options
        options.preserve_order = True
        options.resource_limits = options.resource_limits.copy(object_store_memory=buffer)
        for block in chunks.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            rows = pa.table(block)
            for row in range(rows.num_rows):
                yield rows.slice(row, 1)
        start = end


def _datasource(source: ChunkSource, start: int, end: int) -> Datasource:
    """A Ray Data source whose read task i makes chunk i. (`range` and `from_arrow` would need tasks of a CPU each before.)"""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Chunks(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            metadata = BlockMetadata(num_rows=1, size_bytes=None, exec_stats=None)
            return [ReadTask(partial(_block, source, number), metadata) for number in range(start, end)]

    return Chunks()


def _block(source: ChunkSource, number: int) -> list[pa.Table]:
    layout, data = _packed(_opened(source)(number))
    return [pa.table({"layout": [layout], "data": pa.array([data], pa.large_binary())})]


@lru_cache(maxsize=2)
def _opened(source: ChunkSource) -> Callable[[int], Chunk]:
    return source.open()


def _packed(chunk: Chunk) -> tuple[str, bytes]:
    """Arrays end to end in one buffer, and where each begins."""
    layout, parts, offset = {}, [], 0
    for name, array in chunk.items():
        layout[name] = [array.dtype.str, array.shape, offset]
        parts.append(array.tobytes() + bytes(-array.nbytes % 8))
        offset += len(parts[-1])
    return json.dumps(layout), b"".join(parts)


def _unpacked(layout: str, data: pa.Buffer) -> Chunk:
    chunk = {}
    for name, (dtype, shape, offset) in json.loads(layout).items():
        chunk[name] = np.frombuffer(data, dtype, int(np.prod(shape)), offset).reshape(shape)
    return chunk
