"""Titles of the synthetic shop: the noun of the category, some words of the style, and words that say nothing."""

from __future__ import annotations

import numpy as np

from mim_ray.data.ids import uniform
from mim_ray.data.pictures import PALETTES, PATTERNS, SHAPES, style_factors

_STREAM = 200  # of random numbers
# fmt: off
_NOUNS = ("mug", "bag", "lamp", "cushion", "clock", "notebook", "scarf", "tray", "vase", "poster", "box", "shirt", "rug",
          "bowl", "case", "cap")
_OTHER_WORDS = ("new", "classic", "nova", "home", "original", "gift", "small", "large", "daily", "studio", "basic",
                "premium", "urban", "modern", "value", "set")
_STYLE_WORDS = {
    "circle": ("round", "circular"), "square": ("square", "boxy"), "triangle": ("triangle", "wedge"),
    "star": ("star", "starry"), "ring": ("ring", "hoop"), "cross": ("cross", "plus"),
    "red": ("red", "scarlet"), "orange": ("orange", "amber"), "yellow": ("yellow", "lemon"),
    "green": ("green", "emerald"), "cyan": ("teal", "turquoise"), "blue": ("blue", "cobalt"),
    "purple": ("purple", "violet"), "grey": ("grey", "charcoal"),
    "plain": ("plain", "solid"), "stripes": ("striped", "banded"), "pinstripes": ("pinstriped", "ribbed"),
    "checks": ("checked", "plaid"), "dots": ("dotted", "spotted"),
}
# fmt: on


def titles(seed: int, numbers: np.ndarray, styles: np.ndarray, categories: np.ndarray, style_ratio: float) -> list[str]:
    """A title for each item number; every style factor is named with the chance `style_ratio`, by one of its words."""
    draws = uniform(seed, _STREAM, numbers[:, None] * 8 + np.arange(8)).tolist()
    made = []
    for draw, (shape, palette, pattern), category in zip(
        draws, style_factors(styles).tolist(), categories.tolist(), strict=True
    ):
        words = [_pick(_OTHER_WORDS, draw[0])]
        levels = (PALETTES[palette], PATTERNS[pattern], SHAPES[shape])
        for number, level in enumerate(levels, 1):
            if draw[number] < style_ratio:
                words.append(_pick(_STYLE_WORDS[level], draw[3 + number]))
        words.append(noun(category))
        if draw[7] < 0.5:
            words.append(_pick(_OTHER_WORDS, draw[7] * 2))
        made.append(" ".join(words))
    return made


def noun(category: int) -> str:
    """The name of a category, which is also a word of its items' titles."""
    return _NOUNS[category] if category < len(_NOUNS) else f"thing{category}"


def _pick(words: tuple[str, ...], draw: float) -> str:
    return words[int(draw * len(words))]
