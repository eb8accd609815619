"""F_V, the image tower: any timm model by name (paper: EVA-02).

Pooling, normalisation and weight layout are the model's own definition. Weights come from a local folder of safetensors
or from the hub (safetensors only), else they are random. Nothing here unpickles.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import timm
import torch
from safetensors import safe_open
from timm.data import resolve_data_config
from timm.models import load_checkpoint
from torch import Tensor, nn

from mim_ray.config.scenario import Vision
from mim_ray.data.transforms import Interpolation, PictureFormat, Resize
from mim_ray.errors import ArtifactError, ConfigError

_PICTURE_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


class VisionTower(nn.Module):
    """F_V: pixels to one vector per image.

    Attributes:
        width: length of that vector.
        picture, image_size: what pictures it takes, and their side S.
        stride: pixels per cell of the feature map.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: Any, picture: PictureFormat) -> None:
        super().__init__()
        self.net: Any = net
        self.picture = picture
        self.image_size = picture.size
        self.width = int(getattr(net, "head_hidden_size", None) or self.net.num_features)
        values = self.net.pretrained_cfg
        self.register_buffer("mean", torch.tensor(values["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(values["std"]).view(1, 3, 1, 1))
        with torch.no_grad():
            training = self.net.training
            self.net.eval()
            cells = self.feature_map(torch.zeros(1, 3, picture.size, picture.size))
            self.net.train(training)
        self.map_channels = cells.shape[1]
        self.stride = picture.size // cells.shape[2]

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> (B, width), pooled as the model defines it."""
        return self.net(self.normalise(pixels))

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> float (B, 3, S, S) by the model's own mean and standard deviation."""
        return (pixels.to(self.mean.dtype) / 255.0 - self.mean) / self.std

    def feature_map(self, normalised: Tensor) -> Tensor:
        """Float (B, 3, S, S), normalised -> (B, C, h, w) before pooling: tokens on their grid, or the last map."""
        features = self.net.forward_features(normalised)
        if features.ndim == 3:  # (B, prefix + h * w, C), a transformer's tokens
            patches = features[:, int(getattr(self.net, "num_prefix_tokens", 0)) :]
            side = round(patches.shape[1] ** 0.5)
            return patches.transpose(1, 2).unflatten(2, (side, side))
        if getattr(self.net, "output_fmt", "NCHW") == "NHWC":
            return features.permute(0, 3, 1, 2)
        return features


def build_vision(settings: Vision) -> VisionTower:
    """The tower as a scenario describes it.

    Raises:
        ConfigError: timm has no such model, or not with these arguments.
        ArtifactError: the weights are missing or belong to another architecture.
    """
    if settings.weights is None:
        return build_untrained(settings)
    folder = _hub_folder(settings.model) if settings.weights == "hub" else Path(settings.weights)
    file = safetensors_file(folder)
    tower = build_untrained(settings, _own_config(folder))
    _load(tower, file, settings.model)
    return tower


def build_untrained(
    settings: Vision, overlay: Mapping[str, Any] | None = None, picture: PictureFormat | None = None
) -> VisionTower:
    """A tower with random weights.

    Args:
        overlay: replaces entries of timm's description of the model (mean, std, interpolation, crop).
        picture: what pictures it takes, where that was settled before; else by the settings and the description.

    Raises:
        ConfigError: timm has no such model, or not with these arguments.
    """
    model = settings.model
    if not timm.is_model(model):
        near = difflib.get_close_matches(model.partition(".")[0], timm.list_models(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() names them all."
        raise ConfigError(f"encoders.vision.model = {model!r} is no timm model; {hint}")
    arguments: dict[str, Any] = dict(settings.model_args)
    definition: Any = timm.get_pretrained_cfg(model)
    described = ({} if definition is None else definition.to_dict()) | dict(overlay or {})
    picture = picture or _picture(settings, resolve_data_config(pretrained_cfg=described))
    if definition is not None and definition.fixed_input_size:
        arguments.setdefault("img_size", picture.size)
    try:
        net = timm.create_model(model, num_classes=0, pretrained_cfg_overlay=dict(overlay or {}), **arguments)
        return VisionTower(net, picture)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:  # whatever timm's constructors raise
        raise ConfigError(
            f"encoders.vision: {model} cannot be built with image_size {picture.size} and model_args {settings.model_args}"
            f" ({error}). Correct them, or leave model_args out."
        ) from None


def _picture(settings: Vision, own: Mapping[str, Any]) -> PictureFormat:
    """timm's evaluation transform of a model, where the settings do not say otherwise."""
    size = settings.image_size or min(own["input_size"][1:])
    interpolation: Any = own["interpolation"] if own["interpolation"] in get_args(Interpolation) else "bicubic"
    if settings.resize is not None:
        return PictureFormat(size, settings.resize, interpolation)
    resizes: dict[str, Resize] = {"squash": "squash", "border": "longest"}
    resize = resizes.get(own["crop_mode"], "shortest")
    red, green, blue = (round(255 * value) for value in own["mean"])
    return PictureFormat(size, resize, interpolation, own["crop_pct"], (red, green, blue))


def safetensors_file(folder: Path) -> Path:
    """The one safetensors file of a folder of weights.

    Raises:
        ArtifactError: there is none (pickled weights are never loaded), or it is not clear which.
    """
    if (folder / "model.safetensors").is_file():
        return folder / "model.safetensors"
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
    raise ArtifactError(
        f"{folder} has no model.safetensors (found: {found or 'nothing'}). Give a local folder that holds the weights"
        " as safetensors; pickled .bin or .pth files are never loaded."
    )


def _load(tower: VisionTower, file: Path, model: str) -> None:
    net = tower.net
    clean = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)  # timm's, resizes positions
    try:
        with safe_open(file, framework="pt"):  # a clear error for a damaged file
            pass
        result = load_checkpoint(net, str(file), strict=False, filter_fn=clean)
    except Exception as error:  # noqa: BLE001  safetensors and torch raise many kinds for a file that does not fit
        raise ArtifactError(f"{file} does not fit {model} ({str(error)[:300]}). Give the weights of {model}.") from None
    if result.missing_keys:
        raise ArtifactError(
            f"{file} lacks {len(result.missing_keys)} weights of {model}, first {result.missing_keys[0]}: they belong"
            f" to another architecture. Give the weights of {model}, or name their model in encoders.vision.model."
        )


def _own_config(folder: Path) -> dict[str, Any]:
    """What timm's config.json beside the weights says of the pictures."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    values = json.loads(file.read_text()).get("pretrained_cfg", {})
    return {key: values[key] for key in _PICTURE_KEYS if key in values}


def _hub_folder(model: str) -> Path:
    from huggingface_hub import snapshot_download

    definition: Any = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    name = definition.hf_hub_id if definition is not None else None
    if name is None:
        raise ConfigError(f"timm names no hub weights for encoders.vision.model = {model!r}. Give a local folder.")
    try:
        return Path(snapshot_download(name, allow_patterns=["model.safetensors", "config.json"]))
    except Exception as error:  # noqa: BLE001  network, permission, missing files: one sentence for all
        raise ArtifactError(
            f"the weights of {name} cannot be had from the hub ({str(error)[:200]}). Check the network, or copy the"
            " folder here and set encoders.vision.weights to it."
        ) from None
