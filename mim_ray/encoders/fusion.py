"""Tensor fusion of image and text (paper Eqs. 3 and 4), and plain concatenation as its ablation (Table 5).

A missing modality is a zero vector. In Eq. 3 the appended 1 then still carries the other modality's own terms.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def outer_product(image_emb: Tensor, text_emb: Tensor) -> Tensor:
    """All products of image and text entries, and both alone (paper Eq. 3): [h^img; 1] ⊗ [h^txt; 1].

    Args:
        image_emb: (B, D) h^img, zeros where the item has no image.
        text_emb: (B, D) h^txt, zeros where the item has no text.

    Returns:
        (B, D + 1, D + 1): entry [d, e] is the product of image entry d and text entry e; column D holds the image
        alone, row D the text alone, the corner is 1.
    """
    one = image_emb.new_ones(image_emb.shape[0], 1)
    image = torch.cat([image_emb, one], dim=1)  # (B, D + 1)
    text = torch.cat([text_emb, one], dim=1)  # (B, D + 1)
    return image.unsqueeze(2) * text.unsqueeze(1)  # (B, D + 1, D + 1)


class TensorFusion(nn.Module):
    """h^MM = MLP([h^img; 1] ⊗ [h^txt; 1]) (paper Eqs. 3 and 4), exact.

    The MLP has one hidden layer: width (D + 1)^2 -> hidden -> D. It starts as h^img + h^txt (see `_start_as_sum`), so
    that an item's fused embedding means something before C-SFT has trained it.

    Departs from the paper: start values, the number of layers (the paper gives none).
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        side = width + 1
        self.mlp = nn.Sequential(nn.Linear(side * side, hidden), nn.GELU(), nn.Linear(hidden, width))
        index = torch.arange(width)
        _start_as_sum(self.mlp, image_columns=index * side + width, text_columns=width * side + index)

    def forward(self, image_emb: Tensor, text_emb: Tensor) -> Tensor:
        """(B, D) and (B, D) -> (B, D)."""
        return self.mlp(outer_product(image_emb, text_emb).flatten(1))


class ConcatFusion(nn.Module):
    """The ablation "without TFN" (Table 5): h^MM = MLP([h^img; h^txt])."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * width, hidden), nn.GELU(), nn.Linear(hidden, width))
        index = torch.arange(width)
        _start_as_sum(self.mlp, image_columns=index, text_columns=width + index)

    def forward(self, image_emb: Tensor, text_emb: Tensor) -> Tensor:
        """(B, D) and (B, D) -> (B, D)."""
        return self.mlp(torch.cat([image_emb, text_emb], dim=1))


FUSIONS: dict[str, type[TensorFusion] | type[ConcatFusion]] = {"tfn": TensorFusion, "concat": ConcatFusion}


@torch.no_grad()
def _start_as_sum(mlp: nn.Sequential, image_columns: Tensor, text_columns: Tensor) -> None:
    """Set the MLP so that it returns h^img + h^txt at first, from GELU(x) - GELU(-x) = x.

    Hidden units 2d and 2d + 1 hold plus and minus entry d. Those beyond 2D keep their random input weights and start
    with output weights of zero. With fewer than 2D hidden units the start stays random.
    """
    first, last = mlp[0], mlp[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    width = last.out_features
    if first.out_features < 2 * width:
        return
    last.weight.zero_()
    last.bias.zero_()
    first.weight[: 2 * width] = 0.0
    first.bias[: 2 * width] = 0.0
    entry = torch.arange(width)
    for offset, sign in ((0, 1.0), (1, -1.0)):
        unit = 2 * entry + offset
        first.weight[unit, image_columns] = sign
        first.weight[unit, text_columns] = sign
        last.weight[entry, unit] = sign
