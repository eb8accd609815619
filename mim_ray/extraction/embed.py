"""The encoder as an actor: batches of prepared items in, the same rows with embeddings out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa

from mim_ray.errors import TrainingError

Encode: TypeAlias = Callable[[Sequence[str | None], np.ndarray, np.ndarray], np.ndarray]
"""(titles, images uint8 (B, 3, S, S), has_image (B,)) -> float32 (B, D), rows of length 1."""

DROPPED = ["title", "pixels"]  # columns that end here


def load_encoder(
    uri: str, use_gpu: bool, precision: Literal["float32", "bfloat16"] = "float32", compile: bool = False
) -> Encode:
    """The item encoder saved at `uri`, on the GPU if one is asked for and there is one; see tuning.set_speed."""
    # Here and not above: of all the job's processes only the actors need the model libraries, which load for seconds.
    import torch

    from mim_ray.encoders.item_encoder import ItemEncoder, encode_batch
    from mim_ray.encoders.tuning import set_speed

    encoder = ItemEncoder.load(uri)
    set_speed(encoder, precision, compile)
    if use_gpu and torch.cuda.is_available():
        encoder = encoder.cuda()
    return partial(encode_batch, encoder)


class Embedder:
    """Ray Data calls an instance for every batch; each actor loads the encoder once.

    Args:
        uri: of the saved encoder (a path, never the model itself: an actor that restarts loads it again).
        load: (uri, use_gpu) -> Encode.
    """

    def __init__(self, uri: str, image_size: int, use_gpu: bool, load: Callable[[str, bool], Encode]) -> None:
        self._image_size = image_size
        self._encode = load(uri, use_gpu)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Add `embedding` (list<float32>, null in rows with a drop_reason) in place of title and pixels."""
        rows = batch.combine_chunks()
        usable = np.asarray(rows["drop_reason"].is_null(), bool)
        chosen = rows.filter(pa.array(usable)).combine_chunks()
        vectors = np.zeros((0, 0), np.float32)
        if chosen.num_rows:
            images, has_image = _images(chosen["pixels"], self._image_size)
            vectors = self._encode(chosen["title"].to_pylist(), images, has_image)
            if not np.isfinite(vectors).all():
                raise TrainingError(
                    "The encoder gives embeddings that are not finite. Train it again with a lower learning rate."
                )
        width = vectors.shape[1]
        offsets = np.append(0, np.cumsum(np.where(usable, width, 0))).astype(np.int32)
        embedding = pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(np.ascontiguousarray(vectors).reshape(-1)), mask=pa.array(~usable)
        )
        return rows.drop_columns(DROPPED).append_column("embedding", embedding)


def _images(column: pa.ChunkedArray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, 3, S, S) uint8, zeros where there is none, and (B,) bool."""
    array = pa.concat_arrays(column.chunks)
    has_image = np.asarray(array.is_valid(), bool)
    width = 3 * size * size
    raw = np.frombuffer(array.buffers()[1], np.uint8, len(array) * width, array.offset * width)
    images = raw.reshape(len(array), 3, size, size).copy()
    images[~has_image] = 0
    return images, has_image
