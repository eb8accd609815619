"""The workload of extraction.py: seeded JPEGs of 512 x 512 pixels in an items table, and the encoder."""

from __future__ import annotations

import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIDE = 512
QUALITY = 85
ROWS_PER_GROUP = 64


@dataclass(frozen=True)
class Workload:
    """Items, pictures and encoder on disk. Attributes: items: URI of the table. encoder: URI of the saved encoder."""

    items: str
    encoder: str
    num_items: int


def jpeg(number: int) -> bytes:
    """A picture of coloured areas with noise, about 55 KB; equal numbers give equal bytes."""
    rng = np.random.default_rng(number)
    areas = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = np.asarray(areas).astype(np.int16) + rng.integers(-12, 13, (SIDE, SIDE, 3), np.int16)
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def make(work: Path, num_items: int) -> Workload:
    """Write what is not there yet below `work`."""
    items = work / f"items-{num_items}" / "items.parquet"
    if not items.exists():
        partial = items.with_name("partial")
        partial.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for number, start in enumerate(range(0, num_items, 1_024)):
                rows = range(start, min(start + 1_024, num_items))
                table = pa.table(
                    {
                        "item_id": [f"item-{row:09d}" for row in rows],
                        "image": pa.array(list(pool.map(jpeg, rows)), pa.binary()),
                    }
                )
                path = partial / f"part-{number:05d}.parquet"
                pq.write_table(table, path, row_group_size=ROWS_PER_GROUP, compression="none", use_dictionary=False)
        partial.rename(items)
    return Workload(str(items), str(_encoder(work)), num_items)


def _encoder(work: Path) -> Path:
    """timm's resnet18 at 224 x 224 with random weights in the project's item encoder, width 128."""
    folder = work / "encoder"
    if not (folder / "encoder.json").exists():
        from mim_ray.config import load_scenario
        from mim_ray.config.scenario import Encoders
        from mim_ray.encoders.item_encoder import ItemEncoder
        from mim_ray.encoders.tokenizer import train_tokenizer

        settings = load_scenario("tiny").encoders.model_dump()
        settings |= {"width": 128, "vision": {"model": "resnet18", "image_size": 224}}
        tokenizer = train_tokenizer(["a title"], 100)
        ItemEncoder.build(Encoders.model_validate(settings), tokenizer, seed=0).save(str(folder), stage="csft")
    return folder


def picture_json(workload: Workload) -> str:
    """What pictures the encoder takes."""
    described = json.loads((Path(workload.encoder) / "encoder.json").read_text())
    return json.dumps(described["picture"])


def to_json(workload: Workload) -> str:
    return json.dumps(asdict(workload))
