"""Tensor fusion of image and text (paper Eqs. 3 and 4): exact, with low-rank weights, and its ablation (Table 5).

A missing modality is a zero vector. In Eq. 3 the appended 1 then still carries the other modality's own terms.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


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


class LowRankTensorFusion(nn.Module):
    """Eqs. 3 and 4 for wide towers: the first layer's weights on the outer product have a low rank (Liu et al. 2018, LMF).

    Each hidden unit weighs [h^img; 1] ⊗ [h^txt; 1] with a matrix Σ_r a_r b_r^T, so that the product itself is never
    formed: h = Σ_r (A_r [h^img; 1]) ⊙ (B_r [h^txt; 1]). Weights and work grow with D instead of D^2. It starts as
    h^img + h^txt, as the exact version does.

    Departs from the paper: the rank.
    """

    def __init__(self, width: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.hidden, self.rank = hidden, rank
        scale = (width + 1) ** -0.5
        self.image_factors = nn.Parameter(torch.randn(rank * hidden, width + 1) * scale)  # A, rank by rank
        self.text_factors = nn.Parameter(torch.randn(rank * hidden, width + 1) * scale)  # B
        self.last = nn.Sequential(nn.GELU(), nn.Linear(hidden, width))
        self._start_as_sum(width)

    def forward(self, image_emb: Tensor, text_emb: Tensor) -> Tensor:
        """(B, D) and (B, D) -> (B, D)."""
        image = functional.linear(
            image_emb, self.image_factors[:, :-1], self.image_factors[:, -1]
        )  # (B, rank * hidden)
        text = functional.linear(text_emb, self.text_factors[:, :-1], self.text_factors[:, -1])
        return self.last((image * text).unflatten(1, (self.rank, self.hidden)).sum(dim=1))

    @torch.no_grad()
    def _start_as_sum(self, width: int) -> None:
        """Units 2d and 2d + 1 hold plus and minus entry d: rank 0 the image's (times 1), rank 1 the text's. Their further
        ranks start with text factors of zero, the other units with output weights of zero."""
        if self.rank < 2 or self.hidden < 2 * width:
            return
        last = self.last[1]
        assert isinstance(last, nn.Linear)
        last.weight.zero_()
        last.bias.zero_()
        image = self.image_factors.view(self.rank, self.hidden, width + 1)
        text = self.text_factors.view(self.rank, self.hidden, width + 1)
        image[:2, : 2 * width] = 0.0
        text[:, : 2 * width] = 0.0
        entry = torch.arange(width)
        for offset, sign in ((0, 1.0), (1, -1.0)):
            unit = 2 * entry + offset
            image[0, unit, entry], text[0, unit, width] = sign, 1.0
            image[1, unit, width], text[1, unit, entry] = 1.0, sign
            last.weight[entry, unit] = sign


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


def build_fusion(kind: str, width: int, hidden: int, rank: int) -> nn.Module:
    """The module for a kind of encoders.fusion: `tfn`, `low_rank_tfn` (the only one that uses `rank`) or `concat`."""
    if kind == "low_rank_tfn":
        return LowRankTensorFusion(width, hidden, rank)
    return {"tfn": TensorFusion, "concat": ConcatFusion}[kind](width, hidden)


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
