"""User behavior models (paper Eq. 1): target and behaviors in ID space -> h_B^ID. Definitions and choices per module.

One face: `forward(target (B, d), behaviors (B, L, d), behavior_mask (B, L), same_category (B, L)) -> (B, width)`, with
behaviors padded on the right, oldest first, and `width` an attribute. Any module with that face can be wrapped.
"""

from __future__ import annotations

from torch import Tensor, nn

from mim_ray.ciubm.backbones.average import Average
from mim_ray.ciubm.backbones.din import Din
from mim_ray.ciubm.backbones.sim import Sim

NAMES = ("sim", "din", "average")


class Backbone(nn.Module):
    """The face, for type checkers and for readers: a user behavior model of one's own looks like this."""

    width: int

    def forward(self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, same_category: Tensor) -> Tensor:
        raise NotImplementedError


def build_backbone(name: str, id_width: int, *, num_searched: int, num_short: int) -> nn.Module:
    """The backbone called `name` for ID embeddings of width `id_width`."""
    if name == "average":
        return Average(id_width)
    if name == "din":
        return Din(id_width)
    if name == "sim":
        return Sim(id_width, num_searched=num_searched, num_short=num_short)
    raise ValueError(f"{name!r} is no backbone; choose one of {', '.join(NAMES)}.")
