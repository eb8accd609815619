"""User behavior models (paper Eq. 1): target and behaviors in ID space -> h_B^ID. Definitions and choices per module.

One face (face.py): `forward(target (B, d), behaviors (B, L, d), behavior_mask (B, L), side) -> (B, width)`, with behaviors
padded on the right, oldest first, and `width` an attribute. Any module with that face can be wrapped.
"""

from __future__ import annotations

from torch import nn

from mim_ray.ciubm.backbones.average import Average
from mim_ray.ciubm.backbones.din import Din
from mim_ray.ciubm.backbones.face import Backbone, Side
from mim_ray.ciubm.backbones.sim import Sim

__all__ = ["NAMES", "Backbone", "Side", "build_backbone"]

NAMES = ("sim", "din", "average")


def build_backbone(name: str, id_width: int, *, num_searched: int, num_short: int) -> nn.Module:
    """The backbone called `name` for ID embeddings of width `id_width`."""
    if name == "average":
        return Average(id_width)
    if name == "din":
        return Din(id_width)
    if name == "sim":
        return Sim(id_width, num_searched=num_searched, num_short=num_short)
    raise ValueError(f"{name!r} is no backbone; choose one of {', '.join(NAMES)}.")
