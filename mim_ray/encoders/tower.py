"""What the image and the language tower share: staying frozen, and the precision of the work inside. See tuning.py."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn


class Tower(nn.Module):
    """F_V or F_L.

    Attributes:
        frozen: stays in evaluation mode (dropout off, BatchNorm statistics kept) even while the encoder trains.
        set_aside: parameters that train no more until `tuning.merge`.
        checkpoints_gradients: computes layers again in the backward pass.
        precision: of the matrix products inside; weights and outputs are float32.
    """

    net: Any
    frozen = False
    set_aside: tuple[nn.Parameter, ...] = ()
    checkpoints_gradients = False
    precision = torch.float32

    def train(self, mode: bool = True) -> Tower:
        """As nn.Module's, but a frozen tower stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """The context in which the network runs."""
        return torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32)
