"""A slow copy of the encoder that embeds the past batches (He et al., CVPR 2020, "MoCo"): an option, not in the paper.

Past embeddings were made by the encoders of the last k steps. While those move fast the loss can be lowered by fleeing from
one's own past, which teaches nothing. A copy that follows slowly makes the past batches of one piece.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mim_ray.contrastive.gather import gather
from mim_ray.csft.negatives import Candidates

Encoder = TypeVar("Encoder", bound=nn.Module)


class MomentumEncoder(Generic[Encoder]):
    """The exponential moving average of an encoder's parameters; its buffers are copied. Equal on all workers if theirs are.

    Args:
        encoder: it is copied as it is now. The copy is in evaluation mode and takes no gradients.
        momentum: part of the copy that stays at each update, in [0, 1). Keep parameters in float32: in bfloat16 a step of
            1 − momentum can be too small to move one.

    Attributes:
        encoder: the copy.
    """

    def __init__(self, encoder: Encoder, momentum: float) -> None:
        self.encoder = copy.deepcopy(encoder).requires_grad_(False).eval()
        self._momentum = momentum

    @torch.no_grad()
    def update(self, encoder: Encoder) -> None:
        """Move towards `encoder`. Call after each optimizer step."""
        for mine, theirs in zip(self.encoder.parameters(), encoder.parameters(), strict=True):
            mine.lerp_(theirs, 1.0 - self._momentum)
        for buffer, new in zip(self.encoder.buffers(), encoder.buffers(), strict=True):
            buffer.copy_(new)

    def state(self) -> dict[str, Tensor]:
        """Flat tensors for a checkpoint."""
        return dict(self.encoder.state_dict())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.encoder.load_state_dict(dict(state))


def with_embeddings(fresh: Candidates, own_items: Tensor) -> Candidates:
    """The batch's items as `PastBatches.push` takes them, embedded by the copy. A collective.

    Args:
        fresh: from `CsftLoss`. own_items: (2N, 3, D) of this worker's positives and hard negatives.
    """
    return replace(fresh, embeddings=gather(normalize(own_items.float(), dim=-1)))
