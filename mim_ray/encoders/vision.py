"""F_V, the image tower: any timm model by name (paper: EVA-02), any open_clip model as `open_clip:NAME`.

Figure 5's are resnet50, swin_*, convnext_*, convnextv2_* (convnextv2_large), eva02_* and beit3_* (BEiT-3's image tower).
Pooling, preparation of pictures and weight layout are the model's own definition. Weights come from a local folder of
safetensors or from the hub (safetensors only), else they are random. Nothing here unpickles.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import open_clip
import timm
import torch
from safetensors import safe_open
from timm.data import resolve_data_config
from timm.models import load_checkpoint
from torch import Tensor

from mim_ray.config.scenario import Vision
from mim_ray.data.transforms import Interpolation, PictureFormat, Resize
from mim_ray.encoders.clip import PREFIX, clip_folder, clip_vision, describe_vision, is_clip
from mim_ray.encoders.tower import Tower
from mim_ray.encoders.weights import nearest, read_config, safetensors_file, weights_folder
from mim_ray.errors import ArtifactError, ConfigError

_PICTURE_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


class VisionTower(Tower):
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
        with self.autocast(pixels.device):
            return self.net(self.normalise(pixels)).float()

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> float (B, 3, S, S) by the model's own mean and standard deviation."""
        return (pixels.to(self.mean.dtype) / 255.0 - self.mean) / self.std

    def feature_map(self, normalised: Tensor) -> Tensor:
        """Float (B, 3, S, S), normalised -> (B, C, h, w) before pooling: tokens on their grid, or the last map."""
        with self.autocast(normalised.device):
            features = self.net.forward_features(normalised).float()
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
    if is_clip(settings.model):
        return _clip_tower(settings, None, clip_folder(settings.model, settings.weights, "encoders.vision.weights"))
    definition: Any = timm.get_pretrained_cfg(settings.model) if timm.is_model(settings.model) else None
    name = None if definition is None else definition.hf_hub_id
    folder = weights_folder(settings.weights, name, ("model.safetensors", "config.json"), "encoders.vision.weights")
    file = safetensors_file(folder)
    tower = build_untrained(settings, _own_config(folder))
    _load(tower, file, settings.model)
    return tower


def build_untrained(
    settings: Vision, overlay: Mapping[str, Any] | None = None, picture: PictureFormat | None = None
) -> VisionTower:
    """A tower with random weights.

    Args:
        overlay: replaces entries of timm's description of a timm model (mean, std, interpolation, crop).
        picture: what pictures it takes, where that was settled before; else by the settings and the description.

    Raises:
        ConfigError: there is no such model, or not with these arguments.
    """
    model = settings.model
    if is_clip(model):
        return _clip_tower(settings, picture, None)
    if not timm.is_model(model):
        known = [*timm.list_models(), *(f"{PREFIX}{name}" for name in open_clip.list_models())]
        hint = nearest(model.partition(".")[0], known, "timm.list_models() names them all.")
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
        raise _cannot_be_built(settings, picture, error) from None


def _clip_tower(settings: Vision, picture: PictureFormat | None, folder: Path | None) -> VisionTower:
    described = describe_vision(settings.model, folder)
    picture = picture or _picture(settings, described)
    try:
        return VisionTower(clip_vision(settings.model, picture.size, settings.model_args, described, folder), picture)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:  # whatever open_clip's constructors raise
        if isinstance(error, ConfigError | ArtifactError):
            raise
        raise _cannot_be_built(settings, picture, error) from None


def _cannot_be_built(settings: Vision, picture: PictureFormat, error: Exception) -> ConfigError:
    return ConfigError(
        f"encoders.vision: {settings.model} cannot be built with image_size {picture.size} and model_args"
        f" {settings.model_args} ({error}). Correct them, or leave model_args out."
    )


def _picture(settings: Vision, own: Mapping[str, Any]) -> PictureFormat:
    """timm's evaluation transform of a model, where the settings do not say otherwise."""
    size = settings.image_size or min(own["input_size"][1:])
    interpolation: Any = own["interpolation"] if own["interpolation"] in get_args(Interpolation) else "bicubic"
    if settings.resize is not None:
        return PictureFormat(size, settings.resize, interpolation)
    resizes: dict[str, Resize] = {"squash": "squash", "border": "longest"}
    resize = resizes.get(own["crop_mode"], "shortest")
    red, green, blue = own.get("fill") or (round(255 * value) for value in own["mean"])
    return PictureFormat(size, resize, interpolation, own["crop_pct"], (red, green, blue))


def _load(tower: VisionTower, file: Path, model: str) -> None:
    net = tower.net
    clean = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)  # timm's, resizes positions
    try:
        with safe_open(file, framework="pt"):  # a clear error for a damaged file
            pass
        result = load_checkpoint(net, str(file), strict=False, filter_fn=clean)
    except Exception as error:  # noqa: BLE001  safetensors and torch raise many kinds for a file that does not fit
        raise ArtifactError(
            f"{file}{_whose(file)} does not fit {model} ({str(error)[:300]}). Give the weights of {model}."
        ) from None
    if result.missing_keys:
        raise ArtifactError(
            f"{file}{_whose(file)} lacks {len(result.missing_keys)} weights of {model}, first {result.missing_keys[0]}:"
            f" they belong to another architecture. Give the weights of {model}, or name their model in"
            " encoders.vision.model."
        )


def _whose(file: Path) -> str:
    name = read_config(file.parent / "config.json").get("architecture")
    return f", of {name}," if name else ""


def _own_config(folder: Path) -> dict[str, Any]:
    """What timm's config.json beside the weights says of the pictures."""
    values = read_config(folder / "config.json").get("pretrained_cfg", {})
    return {key: values[key] for key in _PICTURE_KEYS if key in values}
