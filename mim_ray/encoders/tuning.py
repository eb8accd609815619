"""How a stage trains the towers: in full, through LoRA, or not at all; with layer-wise rates, less memory, less precision.

None of it changes the architecture that is saved: `merge` folds what LoRA has learnt into the weights.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from timm.models import group_parameters
from torch import nn
from transformers.pytorch_utils import Conv1D

from mim_ray.config.scenario import Tuning
from mim_ray.encoders.item_encoder import ItemEncoder
from mim_ray.encoders.text import TextTower
from mim_ray.encoders.tower import Tower
from mim_ray.encoders.vision import VisionTower
from mim_ray.errors import ConfigError
from mim_ray.training.optim import parameter_groups


def prepare(encoder: ItemEncoder, tuning: Tuning, seed: int) -> None:
    """Make the towers ready to be trained as `tuning` says. Call on every worker, before the optimizer is made.

    Args:
        seed: of LoRA's start values, which must be equal on all workers.

    Raises:
        ConfigError: a tower cannot be tuned so.
    """
    towers: list[tuple[Tower, str]] = [(encoder.vision, tuning.vision_tuning), (encoder.text, tuning.text_tuning)]
    for tower, how in towers:
        tower.set_aside = tuple(p for p in tower.parameters() if p.requires_grad) if how != "full" else ()
        for parameter in tower.set_aside:
            parameter.requires_grad_(False)
        tower.frozen = how == "frozen"
        tower.train(encoder.training)
        if how == "lora":
            _add_lora(tower, tuning.lora_rank, seed)
        _checkpoint_gradients(tower, tuning.gradient_checkpointing and how != "frozen")
    set_speed(encoder, tuning.precision, tuning.compile)


def merge(encoder: ItemEncoder) -> None:
    """Fold LoRA into the weights and make all of them trainable again: the plain architecture, with equal embeddings."""
    for tower in (encoder.vision, encoder.text):
        if any("lora_" in name for name, _ in tower.named_parameters()):
            _fold(tower)
        for parameter in tower.set_aside:
            parameter.requires_grad_(True)
        tower.set_aside, tower.frozen = (), False
        tower.train(encoder.training)


def set_speed(encoder: ItemEncoder, precision: Literal["float32", "bfloat16"], compile: bool) -> None:
    """The precision of the towers' matrix products, and torch.compile of their networks (names of weights stay)."""
    for tower in (encoder.vision, encoder.text):
        tower.precision = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
        if compile:
            tower.net.compile()


def depth_groups(
    module: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups with layer-wise learning rates (Clark et al. 2020; BEiT): each layer of a tower below the next one
    takes `layer_decay` of its rate, and the last one that of what stands on the tower.

    Args:
        module: holds towers, or is one; parameters outside towers take the full rate. 1.0: all do.
    """
    if layer_decay == 1.0:
        return parameter_groups(module, learning_rate, weight_decay)
    factors: dict[int, float] = {}
    for tower in module.modules():
        if isinstance(tower, Tower):
            depths = layer_depths(tower)
            last = max(depths.values())
            factors |= {id(p): layer_decay ** (last + 1 - depths[name]) for name, p in tower.net.named_parameters()}
    by_factor: dict[float, list[nn.Parameter]] = {}
    for parameter in module.parameters():
        by_factor.setdefault(factors.get(id(parameter), 1.0), []).append(parameter)
    return [
        group
        for factor, parameters in sorted(by_factor.items())
        for group in parameter_groups(parameters, learning_rate * factor, weight_decay)
    ]


def layer_depths(tower: Tower) -> dict[str, int]:
    """Depth by name of each parameter of `tower.net`, 0 for embeddings and stems: by timm's own grouping where there is
    one, else by the layer's number in the name."""
    prefix, net = "", tower.net
    trunk = getattr(getattr(net, "visual", None), "trunk", None)  # of an open_clip model
    if trunk is not None:
        prefix, net = "visual.trunk.", trunk
    if hasattr(net, "group_matcher"):
        found: Any = group_parameters(net, net.group_matcher(coarse=False), reverse=True)
        depths = {prefix + name: int(depth) for name, depth in found.items()}
    else:
        numbers = {name: _LAYER.search(name) for name, _ in net.named_parameters()}
        depths = {name: 1 + int(number[1]) for name, number in numbers.items() if number is not None}
        depths |= {name: 0 for name, number in numbers.items() if number is None and _FIRST.search(name)}
    last = max(depths.values(), default=0)
    depths = {name: depths.get(name, last) for name, _ in tower.net.named_parameters()}
    places = {depth: place for place, depth in enumerate(sorted(set(depths.values())))}
    return {name: places[depth] for name, depth in depths.items()}


_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks|resblocks)\.?(\d+)\.")
_FIRST = re.compile(r"embed|wte|wpe|stem|ln_pre|^(?:visual\.)?(?:conv|bn)\d")


def _add_lora(tower: Tower, rank: int, seed: int) -> None:
    """LoRA (Hu et al. 2021) beside the linear layers of the network, or its convolutions where there are none."""
    from peft import LoraConfig, inject_adapter_in_model  # loads for seconds, and only LoRA needs it

    names = _called(tower, (nn.Linear, Conv1D)) or _called(tower, (nn.Conv2d,))
    names = [name for name in names if name != "text.text_projection"]  # open_clip asks it for its class
    if not names:
        raise ConfigError(
            f"LoRA finds no linear layer or convolution in {type(tower.net).__name__}. Tune this tower in full or freeze it."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transposed = isinstance(tower.net.get_submodule(names[0]), Conv1D)  # GPT-2's linear layers
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, fan_in_fan_out=transposed)
        inject_adapter_in_model(config, tower.net)
    for name, parameter in tower.net.named_parameters():
        parameter.requires_grad_("lora_" in name)


def _fold(tower: Tower) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(tower.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(tower.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(tower.net, "peft_config"):
        del tower.net.peft_config  # peft's mark on the network


@torch.no_grad()
def _called(tower: Tower, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    """Names of the layers of some kinds that the network calls: those whose weights alone it uses (torch's multi-head
    attention, EVA's joint projection) would leave an adapter beside them unused."""
    called: dict[str, None] = {}
    modules = [(name, module) for name, module in tower.net.named_modules() if isinstance(module, kinds)]
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.setdefault(name))
        for name, module in modules
        if getattr(module, "groups", 1) == 1
    ]
    training, device = tower.training, next(tower.parameters()).device
    tower.eval()
    if isinstance(tower, VisionTower):
        tower(torch.zeros(1, 3, tower.image_size, tower.image_size, dtype=torch.uint8, device=device))
    elif isinstance(tower, TextTower):
        tower({key: value.to(device) for key, value in tower.tokenize(["a"]).items()})
    tower.train(training)
    for hook in hooks:
        hook.remove()
    return list(called)


def _checkpoint_gradients(tower: Tower, enable: bool) -> None:
    """Recompute layers in the backward pass instead of keeping what they computed."""
    if enable == tower.checkpoints_gradients:
        return
    net, verb = tower.net, "enable" if enable else "disable"
    try:
        if hasattr(net, "gradient_checkpointing_enable"):  # transformers, whose newer versions give it another name
            switch = getattr(net, f"activation_checkpointing_{verb}", None) or getattr(
                net, f"gradient_checkpointing_{verb}"
            )
            switch(*([{"use_reentrant": False}] if enable else []))
        else:
            net.set_grad_checkpointing(enable)
    except (AttributeError, AssertionError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"{type(net).__name__} knows no gradient checkpointing ({error}). Set gradient_checkpointing=false."
        ) from None
    tower.checkpoints_gradients = enable
