"""From token states to one vector, and what a folder of weights says about it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mim_ray.encoders.weights import read_config
from mim_ray.errors import ConfigError

POOLINGS = ("cls", "mean", "lasttoken")


def pool(states: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """(B, T, W) and (B, T), 1 for real tokens (on the left) -> (B, W): the first, the last real, or the real ones' mean."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "mean":
        real = attention_mask.unsqueeze(2).to(states.dtype)  # (B, T, 1)
        return (states * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
    last = attention_mask.sum(dim=1).clamp(min=1) - 1  # (B,)
    return states[torch.arange(len(states), device=states.device), last]


def read_pooling(folder: Path) -> str | None:
    """What 1_Pooling/config.json (sentence-transformers) names, None without the file.

    Raises:
        ConfigError: a way of pooling, or several at once, that is not known here.
    """
    file = folder / "1_Pooling" / "config.json"
    values = read_config(file)
    if not values:
        return None
    known = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "lasttoken"}
    flags = [key.removeprefix("pooling_mode_") for key, on in values.items() if key.startswith("pooling_mode_") and on]
    given = values.get("pooling_mode")
    asked = [*flags, *([given] if isinstance(given, str) else given or [])]
    named = {known.get(name, name) for name in asked}
    if len(named) != 1 or not named <= set(POOLINGS):
        raise ConfigError(
            f"{file} asks for the pooling {' + '.join(sorted(named)) or 'nothing'}; known are {', '.join(POOLINGS)}, one at"
            " a time. Use another model, or change the file if you know that its weights were trained otherwise."
        )
    return named.pop()
