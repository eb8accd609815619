"""Average pooling: the paper's first baseline."""

from __future__ import annotations

from torch import Tensor, nn

from mim_ray.ciubm.backbones.face import Side


class Average(nn.Module):
    """h_B^ID = the mean of the real behaviors' ID embeddings (a_t,i = 1 / l in Eq. 1)."""

    shares_behaviors = True

    def __init__(self, id_width: int) -> None:
        super().__init__()
        self.width = id_width

    def forward(self, target: Tensor, behaviors: Tensor, behavior_mask: Tensor, side: Side) -> Tensor:
        """(B, d) target and (B, L, d) behaviors -> (B, d); zeros without behaviors. The target is not used."""
        weights = behavior_mask.to(behaviors.dtype)
        total = (weights.unsqueeze(1) @ behaviors).squeeze(1)  # (B, d)
        return total / weights.sum(dim=1, keepdim=True).clamp_min(1.0)
