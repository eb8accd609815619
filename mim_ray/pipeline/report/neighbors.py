"""What the embeddings find alike: nearest neighbors of a few items after each stage, as pictures."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mim_ray.config import Scenario
from mim_ray.config.scenario import Data, Encoding
from mim_ray.data.catalogue import Catalogue
from mim_ray.data.transforms import IMAGE_FORMATS, BadImage, PictureFormat, decode_image
from mim_ray.encoders.item_encoder import ItemEncoder, encode_batch
from mim_ray.pipeline.layout import Layout
from mim_ray.representation_center.snapshot import Snapshot

STAGES: tuple[tuple[Encoding, str], ...] = (
    ("untrained", "untrained"),
    ("pretraining", "DDA + DMA"),
    ("csft", "C-SFT"),
)


@dataclass(frozen=True)
class Neighbors:
    """Nearest neighbors after one stage.

    Attributes:
        rows: (Q, 1 + n) positions in `pictures`: the item itself, then its neighbors, nearest first.
        style_agreement: mean cosine of the true styles of all sampled items and their neighbors; None for real data.
    """

    title: str
    rows: np.ndarray
    style_agreement: float | None


@dataclass(frozen=True)
class NeighborFigure:
    """`pictures` are data URIs, `titles` what is printed below them."""

    pictures: dict[int, str]
    titles: dict[int, str]
    stages: list[Neighbors]


def neighbor_figure(
    scenario: Scenario, layout: Layout, *, num_sampled: int = 600, num_shown: int = 4, num_neighbors: int = 6
) -> NeighborFigure:
    """Encode a seeded sample of the catalogue with the encoder of each stage and look at the nearest by cosine."""
    catalogue = Catalogue.open(f"{layout.samples}/catalogue")
    chosen = np.random.default_rng(scenario.run.seed).permutation(catalogue.num_items)[: 2 * num_sampled]
    table = catalogue.take(np.sort(chosen))
    images = [value.as_py() for value in table["image"]]
    keep = [index for index, image in enumerate(images) if image is not None][:num_sampled]
    titles = [table["title"][index].as_py() for index in keep]
    ids = [table["item_id"][index].as_py() for index in keep]
    encoded = [images[index] for index in keep]
    styles = None
    if scenario.data.root is None:
        truth = Snapshot.open(layout.true_styles)
        styles = truth.gather(truth.lookup(ids))
    stages = []
    for stage, title in STAGES:
        vectors = _encode(scenario, layout.encoder(stage), titles, encoded)
        similarity = vectors @ vectors.T
        np.fill_diagonal(similarity, -np.inf)
        nearest = np.argsort(-similarity, axis=1)[:, :num_neighbors]
        agreement = None
        if styles is not None:
            agreement = float(np.einsum("id,ind->in", styles, styles[nearest]).mean())
        rows = np.concatenate([np.arange(num_shown)[:, None], nearest[:num_shown]], axis=1)
        stages.append(Neighbors(title, rows, agreement))
    used = sorted({int(index) for stage_rows in stages for index in stage_rows.rows.ravel()})
    return NeighborFigure(
        pictures={index: _thumbnail(encoded[index]) for index in used},
        titles={index: titles[index] or ids[index] for index in used},
        stages=stages,
    )


def _encode(scenario: Scenario, uri: str, titles: list[str | None], images: list[bytes]) -> np.ndarray:
    encoder = ItemEncoder.load(uri)
    parts = []
    for start in range(0, len(images), 256):
        pixels = np.stack([_pixels(image, encoder.picture, scenario.data) for image in images[start : start + 256]])
        has_image = np.ones(len(pixels), dtype=bool)
        parts.append(encode_batch(encoder, titles[start : start + 256], pixels, has_image))
    return np.concatenate(parts)


def _pixels(image: bytes, picture: PictureFormat, data: Data) -> np.ndarray:
    try:
        return decode_image(image, picture, data.max_image_bytes, data.max_image_pixels)
    except BadImage:  # the catalogue was verified; a picture that went bad since shows as black
        return np.zeros((3, picture.size, picture.size), dtype=np.uint8)


def _thumbnail(image: bytes, side: int = 72) -> str:
    with Image.open(io.BytesIO(image), formats=IMAGE_FORMATS) as picture:
        small = picture.convert("RGB")
        small.thumbnail((side, side))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
