"""User behavior models (paper Eq. 1): target and behaviors in ID space -> h_B^ID. Definitions and choices per module.

One face (face.py): `forward(target (B, d), behaviors (B, L, d), behavior_mask (B, L), side) -> (B, width)`, with behaviors
padded on the right, oldest first, and `width` an attribute. Any module with that face can be wrapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from mim_ray.ciubm.backbones.average import Average
from mim_ray.ciubm.backbones.bst import Bst
from mim_ray.ciubm.backbones.dien import Dien
from mim_ray.ciubm.backbones.din import Din
from mim_ray.ciubm.backbones.face import Backbone, Side, WithAttention, WithAuxiliaryLoss
from mim_ray.ciubm.backbones.sim import Sim
from mim_ray.ciubm.backbones.twin import Twin

__all__ = ["NAMES", "Backbone", "BackboneSettings", "Side", "WithAttention", "WithAuxiliaryLoss", "build_backbone"]

NAMES = ("sim", "din", "dien", "bst", "twin", "average")


@dataclass(frozen=True)
class BackboneSettings:
    """What a user behavior model can be told beside its width; each takes what concerns it.

    Attributes:
        num_searched: SIM and TWIN: behaviors that the search keeps (TWIN: for each head).
        num_short: SIM: newest behaviors of the short-term part.
        sim_search, sim_short: SIM's general search unit and short-term part.
        time_gaps: BST, SIM and TWIN use the behaviors' ages.
        cross_width: c of TWIN's cross features.
        content: DIN, SIM and TWIN: the attention is told of content (SA-TA).
    """

    num_searched: int = 20
    num_short: int = 10
    sim_search: Literal["hard", "soft"] = "hard"
    sim_short: Literal["din", "dien"] = "din"
    time_gaps: bool = False
    cross_width: int = 0
    content: bool = False


def build_backbone(name: str, id_width: int, settings: BackboneSettings) -> nn.Module:
    """The backbone called `name` for ID embeddings of width `id_width`."""
    if name == "average":
        return Average(id_width)
    if name == "din":
        return Din(id_width, content=settings.content)
    if name == "dien":
        return Dien(id_width)
    if name == "bst":
        return Bst(id_width, time_gaps=settings.time_gaps)
    if name == "sim":
        return Sim(
            id_width,
            num_searched=settings.num_searched,
            num_short=settings.num_short,
            search=settings.sim_search,
            short=settings.sim_short,
            time_gaps=settings.time_gaps,
            content=settings.content,
        )
    if name == "twin":
        return Twin(
            id_width,
            num_searched=settings.num_searched,
            cross_width=settings.cross_width,
            time_gaps=settings.time_gaps,
            content=settings.content,
        )
    raise ValueError(f"{name!r} is no backbone; choose one of {', '.join(NAMES)}.")
