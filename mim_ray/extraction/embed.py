"""The encoder as an actor: a shard in, its file of embeddings out.

Where there are decoders the blocks of a shard come from tasks on CPUs, while the GPU encodes; else the actor decodes itself,
which on CPUs is the fastest way: pictures stay in one process and every core does what is to be done next.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import ray

from mim_ray.errors import TrainingError
from mim_ray.extraction.plan import Slice, Unit
from mim_ray.extraction.read import Decoding, ShardReader, open_snapshot
from mim_ray.extraction.write import ShardFile, write_shard
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.runtime.memory import keep_freed_memory

Encode: TypeAlias = Callable[[Sequence[str | None], np.ndarray, np.ndarray], np.ndarray]
"""(titles, images uint8 (B, 3, S, S), has_image (B,)) -> float32 (B, D), rows of length 1."""

BLOCKS_AHEAD = 2  # of each decoding task, kept in the object store


@dataclass(frozen=True)
class Model:
    """What an actor loads, once.

    Attributes:
        encoder: URI that `load` understands (a path, never the model itself: a new actor loads it again).
        load: (uri, use_gpu) -> Encode.
    """

    encoder: str
    load: Callable[[str, bool], Encode]
    use_gpu: bool = False


@dataclass(frozen=True)
class Work:
    """What all shards of a job have in common.

    Attributes:
        table: URI of the embedding log. rejects: folder for what cannot be used.
        snapshot: URI of a snapshot of this encoder version whose content is copied; None without one.
    """

    encoder_version: str
    decoding: Decoding
    batch_size: int
    table: str
    rejects: str
    snapshot: str | None = None


def load_encoder(
    uri: str,
    use_gpu: bool,
    precision: Literal["float32", "bfloat16"] = "float32",
    compile: bool = False,
    queries: bool = False,
) -> Encode:
    """The item encoder saved at `uri`, on the GPU if one is asked for and there is one; see tuning.set_speed.

    Args:
        queries: what is encoded are queries, not items.
    """
    # Here and not above: of all the job's processes only the actors need the model libraries, which load for seconds.
    import torch

    from mim_ray.encoders.item_encoder import encode_batch, encode_queries, load_for_tables
    from mim_ray.encoders.tuning import set_speed

    encoder = load_for_tables(uri, "cuda" if use_gpu and torch.cuda.is_available() else "cpu")
    set_speed(encoder, precision, compile)
    return partial(encode_queries if queries else encode_batch, encoder)


class ShardEncoder:
    """The actor's class. Calls of different units may run at once, one after another in the encoder."""

    def __init__(self, model: Model, decoder_cpus: float = 0.0) -> None:
        keep_freed_memory()
        self._encode = model.load(model.encoder, model.use_gpu)
        self._decoder_cpus = decoder_cpus
        self._busy = threading.Lock()
        self._readers: dict[int, _Reader] = {}

    def ready(self) -> None:
        """Returns once the encoder is loaded."""

    def encode_shard(self, work: Work, number: int, unit: Unit, start: int, last: bool) -> ShardFile:
        """Make the shard that begins at `start` and write its file and its rejects.

        Args:
            number: of the unit in this pool; the next shard of a unit is read on from where the last one ended.
            last: no further shard of the unit will be asked of this actor.
        """
        piece = unit.slice(start)
        reader = self._readers.pop(number, None) or self._open(unit, work)
        blocks = []
        for block in reader.read(piece):
            with self._busy:
                blocks.append(embed(block, self._encode, work.decoding.picture.size))
        if last:
            reader.close()
        else:
            self._readers[number] = reader
        whole = pa.concat_tables(blocks)
        rows = resolve(whole, _snapshot(work))
        return write_shard(
            rows,
            shard_id=piece.shard_id,
            table=work.table,
            rejects=work.rejects,
            encoder_version=work.encoder_version,
            num_copied=2 * whole.num_rows - whole["same_as"].null_count - whole["snapshot_row"].null_count,
        )

    def _open(self, unit: Unit, work: Work) -> _Reader:
        return _RemoteReader(unit, work, self._decoder_cpus) if self._decoder_cpus else _Reader(unit, work)


def embed(block: pa.Table, encode: Encode, image_size: int) -> pa.Table:
    """Encode the rows of a block of `prepare_items` that are to be encoded.

    Returns:
        the block with `embedding` (list<float32>, null in all other rows) in place of title and pixels.

    Raises:
        TrainingError: an embedding is not finite.
    """
    rows = block.combine_chunks()
    columns = ("drop_reason", "same_as", "snapshot_row")
    wanted = np.logical_and.reduce([np.asarray(rows[name].is_null(), bool) for name in columns])
    chosen = rows.filter(pa.array(wanted)).combine_chunks()
    vectors = np.zeros((0, 0), np.float32)
    if chosen.num_rows:
        images, has_image = _images(chosen["pixels"], image_size)
        vectors = encode(chosen["title"].to_pylist(), images, has_image)
        if not np.isfinite(vectors).all():
            raise TrainingError(
                "The encoder gives embeddings that are not finite. Train it again with a lower learning rate."
            )
    embedding = _list_array(vectors, wanted)
    return rows.drop_columns(["title", "pixels"]).append_column("embedding", embedding)


def resolve(rows: pa.Table, snapshot: Snapshot | None) -> pa.Table:
    """Give the rows of a shard that have the content of another row, or of the snapshot, its embedding.

    Args:
        rows: all rows of the shard from `embed`, in order. Returned without same_as and snapshot_row.
    """
    same = _numbers(rows["same_as"])
    copied = _numbers(rows["snapshot_row"])
    embedding = rows["embedding"].combine_chunks()
    if (same >= 0).any() or (copied >= 0).any():
        own = np.flatnonzero(np.asarray(embedding.is_valid(), bool))
        values = embedding.flatten().to_numpy()
        width = len(values) // len(own) if len(own) else snapshot.width if snapshot is not None else 0
        matrix = np.zeros((rows.num_rows, width), np.float32)
        matrix[own] = values.reshape(len(own), width)
        if snapshot is not None:
            found = np.flatnonzero(copied >= 0)
            matrix[found] = snapshot.gather(copied[found])
        again = np.flatnonzero(same >= 0)
        matrix[again] = matrix[same[again]]
        usable = np.asarray(rows["drop_reason"].is_null(), bool)
        embedding = _list_array(matrix[usable], usable)
    return rows.drop_columns(["same_as", "snapshot_row", "embedding"]).append_column("embedding", embedding)


class _Reader:
    """Shards of a unit, decoded here."""

    def __init__(self, unit: Unit, work: Work) -> None:
        self._reader = ShardReader(unit, work.decoding, _snapshot(work), work.batch_size)

    def read(self, piece: Slice) -> Iterator[pa.Table]:
        return self._reader.read(piece)

    def close(self) -> None:
        self._reader.close()


class _RemoteReader(_Reader):
    """Shards of a unit, decoded by a task that works ahead of what is read."""

    def __init__(self, unit: Unit, work: Work, num_cpus: float) -> None:
        self._unit, self._work, self._num_cpus = unit, work, num_cpus
        self._blocks: Any = None
        self._expected: deque[int] = deque()

    def read(self, piece: Slice) -> Iterator[pa.Table]:
        if self._blocks is None or self._expected[0] != piece.start:
            self.close()
            starts = self._unit.starts[self._unit.starts >= piece.start]
            self._expected = deque(starts.tolist())
            self._blocks = _decode.options(
                num_cpus=self._num_cpus, _generator_backpressure_num_objects=BLOCKS_AHEAD
            ).remote(self._unit, starts, self._work)
        self._expected.popleft()
        left = piece.stop - piece.start
        while left:
            block = ray.get(next(self._blocks))
            left -= block.num_rows
            yield block

    def close(self) -> None:
        if self._blocks is not None:
            ray.cancel(self._blocks, force=True)
            self._blocks = None


@ray.remote(num_returns="streaming", max_retries=3)
def _decode(unit: Unit, starts: np.ndarray, work: Work) -> Iterator[pa.Table]:
    reader = ShardReader(unit, work.decoding, _snapshot(work), work.batch_size)
    for start in starts.tolist():
        yield from reader.read(unit.slice(start))


def _snapshot(work: Work) -> Snapshot | None:
    return None if work.snapshot is None else open_snapshot(work.snapshot)


def _list_array(vectors: np.ndarray, valid: np.ndarray) -> pa.ListArray:
    """`vectors` (sum of valid, D) as list<float32>, null where not valid."""
    offsets = np.append(0, np.cumsum(np.where(valid, vectors.shape[1], 0))).astype(np.int32)
    values = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array(~valid))


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """(n,) int64, -1 where null."""
    return column.fill_null(-1).to_numpy()


def _images(column: pa.ChunkedArray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, 3, S, S) uint8, zeros where there is none, and (B,) bool."""
    array = pa.concat_arrays(column.chunks)
    has_image = np.asarray(array.is_valid(), bool)
    width = 3 * size * size
    raw = np.frombuffer(array.buffers()[1], np.uint8, len(array) * width, array.offset * width)
    images = raw.reshape(len(array), 3, size, size).copy()
    images[~has_image] = 0
    return images, has_image
