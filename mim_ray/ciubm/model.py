"""The deep CTR network behind CiUBM (paper Section 3.4, Eq. 9).

The network takes embedded tensors, not ids: tables are on one side, computation on the other (paper Section 3.5, CMD).
Plain PyTorch; the same module trains, evaluates and serves. With `content_width` None it is the base model: no content
reaches it, everything else is equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear

from mim_ray.ciubm.backbones import BackboneSettings, build_backbone
from mim_ray.ciubm.batch import EmbeddedBatch
from mim_ray.ciubm.interest import Norm
from mim_ray.ciubm.wrapper import CiUBM, ContentOptions

__all__ = ["CtrNetwork", "EmbeddedBatch", "NetworkConfig"]


@dataclass(frozen=True)
class NetworkConfig:
    """Architecture of a CtrNetwork; JSON-able.

    Attributes:
        id_width: d, width of an item's ID embedding (item and category).
        user_width: u, 0 without a user embedding.
        content_width: D, None for the base model, which ignores all that needs content.
        context_width, query_width: c and D of the row's other features and of its query; 0 without them. Base and +MIM
            are fed both alike.
        auxiliary_weight: of the backbone's auxiliary loss beside the main one.
    """

    backbone: str
    id_width: int
    user_width: int
    content_width: int | None
    id_module: bool = True
    content_module: bool = True
    fusion_module: bool = True
    num_histogram_bins: int = 0
    target_content: bool = False
    content_norm: Norm = "sum"
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.0
    num_searched: int = 20
    num_short: int = 10
    sim_search: Literal["hard", "soft"] = "hard"
    sim_short: Literal["din", "dien"] = "din"
    time_gaps: bool = False
    cross_width: int = 0
    auxiliary_weight: float = 1.0
    similarity_summary: bool = False
    content_attention: bool = False
    missing_content: bool = False
    query_interest: bool = False
    content_projection: int = 0
    context_width: int = 0
    query_width: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> NetworkConfig:
        """Of what `to_json` gave, now or by an earlier version: what is not named has its default."""
        return cls(**{**values, "hidden": tuple(values["hidden"])})


class CtrNetwork(nn.Module):
    """h_B (Eq. 9) with the other features -> logit of a click.

    Other features, equal for base and +MIM: the target's ID embedding, the logarithm of 1 + the number of behaviors, the
    user's embedding, the row's context and its query.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.ciubm = build_ciubm(config)
        width = self.ciubm.width + config.id_width + 1 + config.user_width + config.context_width + config.query_width
        layers: list[nn.Module] = []
        for hidden in config.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            if config.dropout > 0:
                layers.append(nn.Dropout(config.dropout))
            width = hidden
        self.network = nn.Sequential(*layers, nn.Linear(width, 1))
        self.register_load_state_dict_pre_hook(_earlier_names)

    def forward(self, batch: EmbeddedBatch) -> Tensor:
        """Logits (B,)."""
        return self._logits(self.features(batch))

    def loss(self, batch: EmbeddedBatch, label: Tensor) -> tuple[Tensor, Tensor]:
        """The training loss, a scalar, and the logits (B,).

        Binary cross-entropy with `label` (B,), 0 or 1, plus `auxiliary_weight` times the backbone's auxiliary loss.
        """
        if self.config.auxiliary_weight == 0.0:
            logits = self(batch)
            return binary_cross_entropy_with_logits(logits, label), logits
        parts, auxiliary = self.ciubm.parts_and_loss(batch, label)
        logits = self._logits([*parts, *self._other(batch)])
        return binary_cross_entropy_with_logits(logits, label) + self.config.auxiliary_weight * auxiliary, logits

    def start_at(self, positive_ratio: float) -> None:
        """Set the last bias to the log-odds of a click over all of train, so that training need not find it."""
        kept = min(max(positive_ratio, 1e-4), 1 - 1e-4)
        last = self.network[-1]
        torch.nn.init.constant_(last.bias, math.log(kept / (1 - kept)))  # type: ignore[arg-type]

    def features(self, batch: EmbeddedBatch) -> list[Tensor]:
        """Input of the deep network, in the order of Eq. 9, then the other features."""
        parts, size = [*self.ciubm.parts(batch), *self._other(batch)], len(batch.target)
        return [part if len(part) == size else part.expand(size, -1) for part in parts]

    def _logits(self, parts: list[Tensor]) -> Tensor:
        """(B,). Content is frozen: in training the first layer is two, so that no gradient is taken to its inputs."""
        first = self.network[0]
        trains = {part.requires_grad for part in parts}
        if self.config.content_width is None or len(trains) == 1 or not isinstance(first, nn.Linear):
            return self.network(torch.cat(parts, dim=-1)).squeeze(-1)
        columns = first.weight.split([part.shape[-1] for part in parts], dim=1)
        trained, of_trained = _joined(parts, columns, requires_grad=True)
        frozen, of_frozen = _joined(parts, columns, requires_grad=False)
        hidden = torch.addmm(linear(trained, of_trained, first.bias), frozen, of_frozen.t())
        return self.network[1:](hidden).squeeze(-1)

    def _other(self, batch: EmbeddedBatch) -> list[Tensor]:
        count = batch.behavior_mask.sum(dim=1, keepdim=True).to(batch.target.dtype)
        parts = [batch.target, count.log1p()]
        for name, width, values in (
            ("user", self.config.user_width, batch.user),
            ("context", self.config.context_width, batch.context),
            ("query_mm", self.config.query_width, batch.query_mm),
        ):
            if width == 0:
                continue
            if values is None:
                raise ValueError(f"This network was built for {name} of width {width}: the batch needs it.")
            parts.append(values)
        return parts


def _joined(parts: Sequence[Tensor], columns: Sequence[Tensor], *, requires_grad: bool) -> tuple[Tensor, Tensor]:
    """The inputs that require a gradient, or those that do not, and the weights of these inputs."""
    chosen = [number for number, part in enumerate(parts) if part.requires_grad == requires_grad]
    return torch.cat([parts[i] for i in chosen], dim=-1), torch.cat([columns[i] for i in chosen], dim=1)


def _earlier_names(_: nn.Module, weights: dict[str, Tensor], *__: object) -> None:
    """Weights written before the backbone stood inside CiUBM."""
    for name in [name for name in weights if name.startswith("backbone.")]:
        weights[f"ciubm.{name}"] = weights.pop(name)


def build_ciubm(config: NetworkConfig) -> CiUBM:
    """The user behavior model that `config` names, with content around it."""
    content_attention = config.content_attention and config.content_width is not None
    settings = BackboneSettings(
        num_searched=config.num_searched,
        num_short=config.num_short,
        sim_search=config.sim_search,
        sim_short=config.sim_short,
        time_gaps=config.time_gaps,
        cross_width=config.cross_width,
        content=content_attention,
    )
    return CiUBM(
        build_backbone(config.backbone, config.id_width, settings),
        config.id_width,
        config.content_width,
        id_module=config.id_module,
        content_module=config.content_module,
        fusion_module=config.fusion_module,
        content_attention=content_attention,
        options=ContentOptions(
            norm=config.content_norm,
            num_histogram_bins=config.num_histogram_bins,
            summary=config.similarity_summary,
            target_content=config.target_content,
            missing_content=config.missing_content,
            query_interest=config.query_interest,
            projected_width=config.content_projection,
        ),
    )
