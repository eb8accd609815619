"""Pure batch functions: decode pictures, clean titles, hash content, pad and mask behavior sequences. No Ray."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Resize = Literal["shortest", "longest", "squash"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
"""Of an animated file, and of several pictures in a JPEG (MPO), the first counts."""
MAX_JPEG_SCANS = 500
"""A progressive picture has about ten; a file of 8 MB can hold 100,000, each of which goes over all pixels."""


class BadImage(Exception):
    """A picture that cannot be used; `reason` is short and countable: image too large, image corrupt, image format."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class PictureFormat:
    """What an image tower takes, as timm and open_clip describe it.

    Attributes:
        size: side S of the square, in pixels.
        resize: "shortest" scales the shorter side to size / crop_ratio and crops the middle, "longest" does so with the
            longer side and pads, "squash" with both sides, without regard to the proportions.
        crop_ratio: part of the scaled side that is kept (timm's crop_pct).
        fill: RGB of the padding.
    """

    size: int
    resize: Resize = "shortest"
    interpolation: Interpolation = "bilinear"
    crop_ratio: float = 1.0
    fill: tuple[int, int, int] = (255, 255, 255)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PictureFormat:
        """From what `dataclasses.asdict` gave, after JSON."""
        return cls(**{**values, "fill": tuple(values["fill"])})


def decode_image(
    data: bytes, picture: PictureFormat, max_bytes: int = 8_000_000, max_pixels: int = 50_000_000
) -> np.ndarray:
    """An encoded picture as (3, S, S) uint8 RGB; transparent parts become white.

    Raises:
        BadImage: too many bytes (looked at before anything is parsed) or pixels (before decoding), no JPEG, PNG, WebP or
            GIF, or damaged.
    """
    try:
        image = _open(data, max_bytes, max_pixels)
        if _is_jpeg(image):
            scale = _scaled_side(picture)
            image.draft("RGB", (scale, scale))  # decodes at 1/2, 1/4 or 1/8 where that is still large enough
        image = _rgb(ImageOps.exif_transpose(image))
    except _DECODE_ERRORS as error:
        raise BadImage("image corrupt", str(error)) from None
    return np.ascontiguousarray(np.asarray(_square(image, picture), np.uint8).transpose(2, 0, 1))  # (3, S, S)


def decode_images(
    images: Sequence[bytes | None], picture: PictureFormat, max_bytes: int = 8_000_000, max_pixels: int = 50_000_000
) -> tuple[np.ndarray, np.ndarray]:
    """A batch of pictures.

    Returns:
        pixels (B, 3, S, S) uint8, zero where there is none, and has_image (B,) bool, False for None and BadImage.
    """
    pixels = np.zeros((len(images), 3, picture.size, picture.size), np.uint8)
    has_image = np.zeros(len(images), bool)
    for row, data in enumerate(images):
        if data is None:
            continue
        try:
            pixels[row] = decode_image(data, picture, max_bytes, max_pixels)
            has_image[row] = True
        except BadImage:
            continue  # has_image says so; whoever stores the picture has counted it as a reject
    return pixels, has_image


def check_image(data: bytes, max_bytes: int = 8_000_000, max_pixels: int = 50_000_000) -> None:
    """Raise BadImage unless the picture can be decoded to the end."""
    try:
        image = _open(data, max_bytes, max_pixels)
        if _is_jpeg(image):
            image.draft("RGB", (64, 64))
        image.load()
    except _DECODE_ERRORS as error:
        raise BadImage("image corrupt", str(error)) from None


def check_limits(data: bytes, max_bytes: int = 8_000_000, max_pixels: int = 50_000_000) -> None:
    """Raise BadImage where bytes or pixels are beyond the limits; looks at the header only."""
    try:
        _open(data, max_bytes, max_pixels)
    except _DECODE_ERRORS as error:
        raise BadImage("image corrupt", str(error)) from None


def clean_title(title: str | None, max_chars: int = 2_000) -> str | None:
    """White space collapsed, cut to `max_chars`; None where nothing is left."""
    return " ".join(title.split())[:max_chars].strip() or None if title else None


def content_hash(title: str | None, image: bytes | memoryview | None) -> str:
    """32 hex digits of what an item shows. None and empty differ; equal content gives equal hashes everywhere."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (None if title is None else title.encode(), image):
        digest.update(struct.pack("<q", -1 if part is None else len(part)))
        digest.update(part or b"")
    return digest.hexdigest()


def pad_behaviors(behaviors: Sequence[np.ndarray], length: int, fill: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """Behavior rows of B users as one padded matrix.

    Args:
        behaviors: B arrays of item rows, oldest first, of any lengths.
        length: L; of longer arrays the newest L are kept.

    Returns:
        indices (B, L) int64, padded on the right with `fill`, and mask (B, L) bool, True for real items.
    """
    lengths = np.array([len(row) for row in behaviors], np.int64)
    values = np.concatenate(behaviors).astype(np.int64) if len(behaviors) else np.zeros(0, np.int64)
    return pad_ragged(values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), length, fill)


def pad_ragged(values: np.ndarray, offsets: np.ndarray, length: int, fill: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """pad_behaviors for rows `values[offsets[b]:offsets[b + 1]]`, as an Arrow list column holds them."""
    starts = np.maximum(offsets[:-1], offsets[1:] - length)
    mask = np.arange(length) < (offsets[1:] - starts)[:, None]  # (B, L)
    indices = np.full(mask.shape, fill, np.int64)
    indices[mask] = values[(starts[:, None] + np.arange(length))[mask]]
    return indices, mask


_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8")


def _open(data: bytes, max_bytes: int, max_pixels: int) -> Image.Image:
    if len(data) > max_bytes:
        raise BadImage("image too large", f"{len(data)} bytes, the limit is {max_bytes}")
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        if data.startswith(_MAGIC):
            raise BadImage("image corrupt", "the header cannot be read") from None
        raise BadImage("image format", "neither JPEG nor PNG nor WebP nor GIF") from None
    except Image.DecompressionBombError:
        raise BadImage("image too large", f"the header names far more pixels than the limit of {max_pixels}") from None
    if image.width * image.height > max_pixels:
        raise BadImage("image too large", f"{image.width} x {image.height} pixels, the limit is {max_pixels}")
    if _is_jpeg(image) and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise BadImage("image corrupt", f"a JPEG of more than {MAX_JPEG_SCANS} scans")
    return image


def _is_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO")  # MPO: a JPEG that has an index of more pictures behind it


def _square(image: Image.Image, picture: PictureFormat) -> Image.Image:
    """Scaled, then cropped or padded about the middle, as PictureFormat says; what is cropped is never computed."""
    size, scale = picture.size, _scaled_side(picture)
    sides = image.size  # (width, height)
    if picture.resize == "squash":
        scaled = (scale, scale)
    elif picture.resize == "shortest":
        scaled = (scale * sides[0] // min(sides), scale * sides[1] // min(sides))  # rounded as torchvision does
    else:
        scaled = (max(1, round(scale * sides[0] / max(sides))), max(1, round(scale * sides[1] / max(sides))))
    kept = (min(size, scaled[0]), min(size, scaled[1]))
    start = [round((whole - part) / 2) for whole, part in zip(scaled, kept, strict=True)]
    box = [(first * side / whole) for first, side, whole in zip(start, sides, scaled, strict=True)]
    box += [((f + k) * side / whole) for f, k, side, whole in zip(start, kept, sides, scaled, strict=True)]
    part = image.resize(kept, _FILTERS[picture.interpolation], (box[0], box[1], box[2], box[3]))
    if kept == (size, size):
        return part
    padded = Image.new("RGB", (size, size), picture.fill)
    padded.paste(part, ((size - kept[0]) // 2, (size - kept[1]) // 2))
    return padded


def _scaled_side(picture: PictureFormat) -> int:
    return int(picture.size / picture.crop_ratio)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
