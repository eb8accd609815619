"""Pictures of the synthetic shop: a shape, filled with a pattern in the two colours of a palette.

Everything else about a picture (place, size, phase of the pattern, light, background, noise) is drawn from its key, so two
renderings of one style differ clearly and only the style stays.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
PALETTES = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "grey")
PATTERNS = ("plain", "stripes", "pinstripes", "checks", "dots")
NUM_STYLES = len(SHAPES) * len(PALETTES) * len(PATTERNS)

_COLOURS = np.array(  # main and second colour of each palette
    [
        [(205, 30, 40), (250, 190, 185)],
        [(240, 125, 15), (110, 55, 10)],
        [(245, 215, 40), (150, 120, 0)],
        [(35, 150, 60), (180, 235, 170)],
        [(20, 185, 190), (0, 80, 95)],
        [(35, 70, 200), (165, 195, 250)],
        [(145, 50, 170), (235, 180, 240)],
        [(55, 55, 60), (170, 170, 175)],
    ],
    np.float32,
)


def style_factors(styles: np.ndarray) -> np.ndarray:
    """(n, 3) shape, palette and pattern of style numbers 0 … NUM_STYLES - 1."""
    per_shape = len(PALETTES) * len(PATTERNS)
    return np.stack([styles // per_shape, styles // len(PATTERNS) % len(PALETTES), styles % len(PATTERNS)], -1)


def render(style: int, category: int, key: int, size: int) -> bytes:
    """An encoded picture (JPEG).

    Args:
        style: 0 … NUM_STYLES - 1. category: shows weakly, as the direction in which the background darkens.
        key: any number; equal arguments give equal bytes.
        size: side in pixels; style is recognisable from about 24 on.
    """
    shape, palette, pattern = style_factors(np.array(style)).tolist()
    rng = np.random.default_rng(key % 2**63)
    x0, y0, scale, phase_x, phase_y, light, grey, ratio = rng.random(8).tolist()
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1  # -1 … 1 over the picture
    x = (axis - 0.26 * (x0 - 0.5))[None, :] * np.float32(0.92 + 0.16 * ratio)
    y = (axis - 0.26 * (y0 - 0.5))[:, None]
    radius = 0.62 + 0.24 * scale
    inside = np.clip(0.5 - _distance(SHAPES[shape], x / radius, y / radius) * radius * size / 2, 0, 1)  # (size, size)
    period = 0.5 * radius
    second = _pattern(PATTERNS[pattern], x / period + phase_x, y / period + phase_y, 2 / size / period)
    main, other = _COLOURS[palette]
    fill = main + (other - main) * np.broadcast_to(second, inside.shape)[..., None]  # (size, size, 3)
    angle = 2 * np.pi * category / 8
    shade = 0.22 * (np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None])
    background = np.float32(150 + 75 * grey) * (1 - shade)[..., None] + rng.uniform(-15, 15, 3).astype(np.float32)
    picture = background + (fill - background) * inside[..., None]
    picture = picture * np.float32(0.75 + 0.4 * light) + 6 * rng.standard_normal(picture.shape, np.float32)
    stream = io.BytesIO()
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=88, subsampling=0)
    return stream.getvalue()


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """About the signed distance to the edge of a shape of radius 1; negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 0.95
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.82
    if shape == "triangle":
        return np.maximum(0.87 * np.abs(x) - 0.5 * y, y) - 0.55
    if shape == "star":
        return np.hypot(x, y) - (0.72 + 0.34 * np.cos(5 * np.arctan2(x, -y)))
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72) - 0.25
    return np.minimum(
        np.maximum(np.abs(x) - 0.3, np.abs(y) - 0.98), np.maximum(np.abs(y) - 0.3, np.abs(x) - 0.98)
    )  # cross


def _pattern(pattern: str, u: np.ndarray, v: np.ndarray, pixel: float) -> np.ndarray:
    """How much of the second colour, 0 … 1; one period per unit, edges one pixel soft."""
    soft = 1 / (2 * np.pi * pixel)
    if pattern == "plain":
        return np.zeros((1, 1), np.float32)
    if pattern == "stripes":
        return np.clip(0.5 + soft * np.sin(2 * np.pi * v), 0, 1)
    if pattern == "pinstripes":
        return np.clip(0.5 + soft * np.sin(2 * np.pi * u), 0, 1)
    if pattern == "checks":
        return np.clip(0.5 + soft * np.sin(np.pi * u) * np.sin(np.pi * v), 0, 1)
    return np.clip(0.5 + soft * (np.cos(2 * np.pi * u) + np.cos(2 * np.pi * v) - 0.9), 0, 1)  # dots
