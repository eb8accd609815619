"""A small items table with everything that can be wrong in it, and stand-in encoders."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mim_ray.data.schema import ITEMS, TIME


def png(number: int, size: int = 8) -> bytes:
    """A picture that depends on the number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def make_items() -> Callable[..., str]:
    """Write an items table; returns its URI."""

    def make(folder: Path, num: int = 100, row_group_rows: int = 40, files: int = 2, **replaced: Any) -> str:
        columns: dict[str, list[Any]] = {
            "item_id": [f"item-{number}" for number in range(num)],
            "title": [f"title number {number}" for number in range(num)],
            "category": [f"c{number % 3}|other" for number in range(num)],
            "image": [png(number) for number in range(num)],
            "image_uri": [None] * num,
            "created_at": [number * 1_000_000 for number in range(num)],
            "attributes": [None] * num,
        }
        for name, changes in replaced.items():
            for row, value in changes.items():
                columns[name][row] = value
        arrays = {name: pa.array(values, ITEMS.schema.field(name).type) for name, values in columns.items()}
        table = pa.table(arrays | {"created_at": pa.array(columns["created_at"], TIME)})
        target = folder / "items.parquet"
        target.mkdir(parents=True, exist_ok=True)
        per_file = -(-num // files)
        for file in range(files):
            part = table.slice(file * per_file, per_file)
            pq.write_table(part, target / f"part-{file:05d}.parquet", row_group_size=row_group_rows)
        return str(target)

    return make


@pytest.fixture(scope="session")
def stand_in() -> Callable[..., Any]:
    """A loader of an encoder that needs no model: a vector computed from the content. Travels to workers by value."""

    def make(marker: str | None = None, need_gpu: bool = False) -> Any:
        def load(uri: str, use_gpu: bool) -> Any:
            import os
            import signal

            import numpy as np

            if need_gpu:
                import ray

                assert use_gpu
                assert ray.get_runtime_context().get_accelerator_ids()["GPU"], "no GPU was given to this actor"

            def encode(titles: Any, images: Any, has_image: Any) -> Any:
                if marker is not None and not os.path.exists(marker):
                    open(marker, "w").close()
                    os.kill(os.getpid(), signal.SIGKILL)
                rows = [
                    [len(title or ""), sum((title or "").encode()) % 97, image.mean(), float(there)]
                    for title, image, there in zip(titles, images, has_image, strict=True)
                ]
                vectors = np.array(rows, np.float32)
                return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

            return encode

        return load

    return make
