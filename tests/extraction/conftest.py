"""A small items table with everything that can be wrong in it, and stand-in encoders."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mim_ray.config.scenario import Extraction, Refresh
from mim_ray.data.schema import ITEMS, TIME
from mim_ray.data.transforms import PictureFormat
from mim_ray.extraction.pool import EncoderPool
from mim_ray.extraction.read import Decoding
from mim_ray.extraction.refresh import Refresher
from mim_ray.extraction.run import encoder_pool

SETTINGS = Extraction(num_actors=1, cpus_per_actor=0.25, shard_rows=50, batch_size=25, commit_every_s=0.1)
DECODING = Decoding(PictureFormat(8, "squash"), 100_000, 10_000, 40, "/nowhere")


def png(number: int, size: int = 8) -> bytes:
    """A picture that depends on the number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def picture() -> Callable[[int], bytes]:
    """A picture that depends on the number."""
    return png


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


@pytest.fixture(scope="module")
def pool(ray_cluster: None, stand_in: Callable[..., Any]) -> Iterator[EncoderPool]:
    with encoder_pool("stand-in", SETTINGS, stand_in()) as actors:
        yield actors


@pytest.fixture
def start(tmp_path: Path, pool: EncoderPool) -> Iterator[Callable[..., Refresher]]:
    """`start(items)`: a running refresher of tmp_path/center."""
    opened = []

    def make(items: str, center: str = "center", **settings: Any) -> Refresher:
        made = Refresher(
            items,
            f"{tmp_path}/{center}",
            encoder="stand-in",
            encoder_version="v1",
            decoding=DECODING,
            settings=SETTINGS,
            refresh=Refresh(**{"snapshot_every_s": 0.0} | settings),
            rejects=f"{tmp_path}/{center}-rejects",
            pool=pool,
        )
        opened.append(made.__enter__())
        return made

    yield make
    for made in opened:
        made.__exit__(None, None, None)
