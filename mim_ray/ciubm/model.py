"""CiUBM (paper Section 3.4): content interest around a user behavior model, and the deep CTR network behind it.

The network takes embedded tensors, not ids: tables are on one side, computation on the other (paper Section 3.5, CMD).
Plain PyTorch; the same module trains, evaluates and serves. With `content_width` None it is the base model: no content
reaches it, everything else is equal.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mim_ray.ciubm.backbones import Side, build_backbone
from mim_ray.ciubm.interest import Norm, content_interest, content_relevance, fusion_interest, similarity_histogram


class EmbeddedBatch(NamedTuple):
    """What the network sees. L may differ from batch to batch."""

    target: Tensor  # (B, d) ID embedding of the target: item and category
    behaviors: Tensor  # (B, L, d), oldest first, padded on the right
    behavior_mask: Tensor  # (B, L) bool
    same_category: Tensor  # (B, L) bool: of the target's category
    user: Tensor | None = None  # (B, u)
    target_mm: Tensor | None = None  # (B, D), zero where there is no content
    behavior_mm: Tensor | None = None  # (B, L, D)
    behavior_age_s: Tensor | None = None  # (B, L) seconds from the behavior to the impression, 0 or more
    context: Tensor | None = None  # (B, c) the row's other features, embedded and normalised
    query_mm: Tensor | None = None  # (B, D) the query in the space of the MM embeddings, zero where there is none


@dataclass(frozen=True)
class NetworkConfig:
    """Architecture of a CtrNetwork; JSON-able.

    Attributes:
        id_width: d, width of an item's ID embedding (item and category).
        user_width: u, 0 without a user embedding.
        content_width: D, None for the base model.
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> NetworkConfig:
        return cls(**{**values, "hidden": tuple(values["hidden"])})


class CtrNetwork(nn.Module):
    """h_B = Concat(h_B^ID, h_B^MM, h_B^Fusion) (Eq. 9) with the other features -> logit of a click.

    Other features, equal for base and +MIM: the target's ID embedding, the logarithm of 1 + the number of behaviors, and
    the user's embedding.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = (
            build_backbone(
                config.backbone, config.id_width, num_searched=config.num_searched, num_short=config.num_short
            )
            if config.id_module
            else None
        )
        width = config.id_width + config.user_width + 1
        if self.backbone is not None:
            width += int(self.backbone.width)  # type: ignore[arg-type]
        if config.content_width is not None:
            width += config.content_width * (config.content_module + config.target_content)
            width += config.id_width * config.fusion_module + config.num_histogram_bins
        layers: list[nn.Module] = []
        for hidden in config.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            if config.dropout > 0:
                layers.append(nn.Dropout(config.dropout))
            width = hidden
        self.network = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, batch: EmbeddedBatch) -> Tensor:
        """Logits (B,)."""
        return self.network(torch.cat(self.features(batch), dim=-1)).squeeze(-1)

    def start_at(self, positive_ratio: float) -> None:
        """Set the last bias to the log-odds of a click over all of train, so that training need not find it."""
        kept = min(max(positive_ratio, 1e-4), 1 - 1e-4)
        last = self.network[-1]
        torch.nn.init.constant_(last.bias, math.log(kept / (1 - kept)))  # type: ignore[arg-type]

    def features(self, batch: EmbeddedBatch) -> list[Tensor]:
        """Input of the deep network, in the order of Eq. 9, then the other features."""
        parts: list[Tensor] = []
        if self.backbone is not None:
            side = Side(batch.same_category, batch.behavior_age_s)
            parts.append(self.backbone(batch.target, batch.behaviors, batch.behavior_mask, side))
        if self.config.content_width is not None:
            parts += self._content(batch)
        count = batch.behavior_mask.sum(dim=1, keepdim=True).to(batch.target.dtype)
        parts += [batch.target, count.log1p()]
        if batch.user is not None:
            parts.append(batch.user)
        return parts

    def _content(self, batch: EmbeddedBatch) -> list[Tensor]:
        config, mask = self.config, batch.behavior_mask
        if batch.target_mm is None or batch.behavior_mm is None:
            raise ValueError("This network uses content: the batch needs target_mm and behavior_mm.")
        relevance = content_relevance(batch.target_mm, batch.behavior_mm, mask)
        parts: list[Tensor] = []
        if config.content_module:
            parts.append(content_interest(relevance, batch.behavior_mm, mask, config.content_norm))
        if config.fusion_module:
            parts.append(fusion_interest(relevance, batch.behaviors, mask, config.content_norm))
        if config.num_histogram_bins > 0:
            has_content = (batch.behavior_mm != 0).any(dim=-1) & (batch.target_mm != 0).any(dim=-1, keepdim=True)
            parts.append(similarity_histogram(relevance, mask & has_content, config.num_histogram_bins))
        if config.target_content:
            parts.append(batch.target_mm)
        return parts
