"""The synthetic shop as a set of formulas: every item, user and event is a function of (seed, number).

Nothing is kept per item, so ten million items need no memory, any part can be made alone, and in any order.

The click logit of user u and item i is

    intercept + logit_std · (√style_share · Σ_f W[u, f, level_f(i)] / √3 + √individual_share · p_u · q_i / √6 + √popularity_share · z_i)

where W (the user's taste for each level of the three style factors, centred per factor), p, q and z are standard normal, so
that each part has variance 1 over users and items; the shares are divided by their sum. Content shows the style only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mim_ray.config.scenario import Synthetic
from mim_ray.data.ids import normal, random_bits, uniform
from mim_ray.data.pictures import NUM_STYLES, PALETTES, PATTERNS, SHAPES, style_factors
from mim_ray.errors import ConfigError

START_US = 1_736_121_600_000_000  # Monday 2025-01-06 00:00 UTC, the first event
SECOND_US = 1_000_000
WEEK_US = 7 * 86_400 * SECOND_US
STYLE_WIDTH = len(SHAPES) + len(PALETTES) + len(PATTERNS)

_NUM_LATENT = 6
_LEVELS = (len(SHAPES), len(PALETTES), len(PATTERNS))
_COPRIME = np.array([a for a in range(1, NUM_STYLES) if np.gcd(a, NUM_STYLES) == 1])
_INVERSE = np.array([pow(int(a), -1, NUM_STYLES) for a in _COPRIME])
# Streams of random numbers; each use has its own.
_STYLE, _CATEGORY, _POPULARITY, _ITEM_LATENT, _USER_LATENT, _TASTE, _PRICE, _PAIRS = range(8)


@dataclass(frozen=True)
class ShopModel:
    """The shop of one seed.

    Example: `ShopModel(0, Synthetic()).click_prob(users, items)` with two equally long arrays of numbers.
    """

    seed: int
    settings: Synthetic

    @property
    def duration_us(self) -> int:
        return self.settings.num_weeks * WEEK_US

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of style, individual taste and popularity in the logit's variance; they sum to 1."""
        given = (self.settings.style_share, self.settings.individual_share, self.settings.popularity_share)
        if not sum(given):
            raise ConfigError(
                "synthetic.style_share, individual_share and popularity_share are all 0. Raise one of them."
            )
        style, individual, popularity = (share / sum(given) for share in given)
        return style, individual, popularity

    def styles(self, items: np.ndarray) -> np.ndarray:
        """Style number of each item. Of every NUM_STYLES consecutive items each has another style."""
        blocks, places = np.divmod(items, NUM_STYLES)
        factor, shift, _ = self._block(blocks)
        return (factor * places + shift) % NUM_STYLES

    def items_of_style(self, styles: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """The item with this style among items blocks · NUM_STYLES … (blocks + 1) · NUM_STYLES - 1; inverse of `styles`."""
        _, shift, inverse = self._block(blocks)
        return blocks * NUM_STYLES + inverse * (styles - shift) % NUM_STYLES

    def categories(self, items: np.ndarray) -> np.ndarray:
        return (random_bits(self.seed, _CATEGORY, items) % np.uint64(self.settings.num_categories)).astype(np.int64)

    def prices(self, items: np.ndarray) -> np.ndarray:
        return np.round(np.exp(3.0 + 0.6 * normal(self.seed, _PRICE, items)), 2)

    def created_us(self, items: np.ndarray) -> np.ndarray:
        """Microseconds UTC. Items are numbered by age: the initial ones over eight weeks before START, the others after."""
        initial, total = self._num_initial, self.settings.num_items
        before = START_US + (items + 0.5 - initial) / max(1, initial) * 8 * WEEK_US
        after = START_US + (items + 0.5 - initial) / max(1, total - initial) * self.duration_us
        return np.where(items < initial, before, after).astype(np.int64)

    def num_existing(self, times_us: np.ndarray) -> np.ndarray:
        """How many items were created before each time (items 0 … n - 1); at least 1."""
        initial, total = self._num_initial, self.settings.num_items
        passed = (np.asarray(times_us) - START_US) / self.duration_us * (total - initial) - 0.5
        arrived = np.clip(np.ceil(passed), 0, total - initial).astype(np.int64)
        return np.maximum(1, initial + arrived)

    def style_taste(self, users: np.ndarray, styles: np.ndarray) -> np.ndarray:
        """Standardised taste of each user for each style; arrays broadcast against each other."""
        users, styles = np.broadcast_arrays(users, styles)
        counters = users[..., None] * STYLE_WIDTH + np.arange(STYLE_WIDTH)
        weights = normal(self.seed, _TASTE, counters)  # (…, STYLE_WIDTH)
        total = np.zeros(users.shape)
        start = 0
        for factor, levels in zip(np.moveaxis(style_factors(styles), -1, 0), _LEVELS, strict=True):
            part = weights[..., start : start + levels]
            centred = (part - part.mean(-1, keepdims=True)) * np.sqrt(levels / (levels - 1))
            total += np.take_along_axis(centred, factor[..., None], -1)[..., 0]
            start += levels
        return total / np.sqrt(3)

    def individual_taste(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Standardised taste of each user for each item that no content explains."""
        latent = np.arange(_NUM_LATENT)
        user = normal(self.seed, _USER_LATENT, users[:, None] * _NUM_LATENT + latent)
        item = normal(self.seed, _ITEM_LATENT, items[:, None] * _NUM_LATENT + latent)
        return (user * item).sum(-1) / np.sqrt(_NUM_LATENT)

    def popularity(self, items: np.ndarray) -> np.ndarray:
        return normal(self.seed, _POPULARITY, items)

    def logit_parts(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """(n, 3) what style, individual taste and popularity add to the logit."""
        parts = [
            self.style_taste(users, self.styles(items)),
            self.individual_taste(users, items),
            self.popularity(items),
        ]
        return np.stack(parts, -1) * np.sqrt(self.shares) * self.settings.logit_std

    def click_logit(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """(n,) the true click logit of users and items, paired."""
        return self.intercept + self.logit_parts(users, items).sum(-1)

    def click_prob(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        return sigmoid(self.click_logit(users, items))

    @cached_property
    def intercept(self) -> float:
        """Makes the mean click probability of random users and items `base_ctr`."""
        counters = np.arange(40_000)
        users = (uniform(self.seed, _PAIRS, counters) * self.settings.num_users).astype(np.int64)
        items = (uniform(self.seed, _PAIRS, counters + len(counters)) * self.settings.num_items).astype(np.int64)
        logits = self.logit_parts(users, items).sum(-1)
        low, high = -40.0, 40.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if sigmoid(logits + middle).mean() < self.settings.base_ctr else (low, middle)
        return (low + high) / 2

    @property
    def _num_initial(self) -> int:
        return max(1, round(self.settings.initial_items_ratio * self.settings.num_items))

    def _block(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The permutation a · place + c (mod NUM_STYLES) of each block of items: a, c and the inverse of a."""
        bits = random_bits(self.seed, _STYLE, blocks)
        choice = (bits % np.uint64(len(_COPRIME))).astype(np.int64)
        shift = (bits >> np.uint64(32)).astype(np.int64) % NUM_STYLES
        return _COPRIME[choice], shift, _INVERSE[choice]


def style_vectors(styles: np.ndarray) -> np.ndarray:
    """(n, STYLE_WIDTH) float32 of length 1; the cosine of two styles is the share of factors they have in common."""
    vectors = np.zeros((len(styles), STYLE_WIDTH), np.float32)
    starts = np.cumsum((0, *_LEVELS[:-1]))
    np.put_along_axis(vectors, style_factors(styles) + starts, np.float32(1 / np.sqrt(3)), 1)
    return vectors


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))
