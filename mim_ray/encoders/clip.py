"""Towers of open_clip's models (CLIP, SigLIP, EVA-CLIP) as `open_clip:NAME`, image and text apart.

A tower ends where the model says: its own pooling, its own projection into the space that image and text share. Public
weights come from a folder with open_clip_model.safetensors and open_clip_config.json, the layout of open_clip's hub
repositories. Where a model has several public weights, `hub` needs the one that is meant: `open_clip:NAME/TAG`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed
from open_clip.tokenizer import SimpleTokenizer, get_clean_fn
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from mim_ray.encoders.weights import nearest, read_config, safetensors_file, weights_folder
from mim_ray.errors import ArtifactError, ConfigError

PREFIX = "open_clip:"
FILES = ("open_clip_model.safetensors", "open_clip_config.json", "tokenizer*.json", "special_tokens_map.json")
_NO_TEXT = {"width": 8, "heads": 1, "layers": 1, "vocab_size": 8, "context_length": 4}
_NO_VISION = {"image_size": 16, "patch_size": 16, "width": 64, "layers": 1}
_FREE = {"image_size", "patch_dropout", "timm_model_pretrained", "timm_drop", "timm_drop_path", "hf_model_pretrained"}


class ClipVision(nn.Module):
    """The image side of an open_clip model, with the face that timm's networks show to VisionTower.

    Attributes:
        num_features: width of the pooled and projected vector.
        pretrained_cfg: how pictures are prepared, in timm's words.
    """

    def __init__(self, visual: Any, described: Mapping[str, Any], image_size: int) -> None:
        super().__init__()
        self.visual: Any = visual
        self.pretrained_cfg = dict(described)
        with torch.no_grad():
            visual.eval()
            self.num_features = self(torch.zeros(1, 3, image_size, image_size)).shape[1]
            visual.train()

    def forward(self, normalised: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, num_features)."""
        pooled = self.visual(normalised)
        return pooled[0] if isinstance(pooled, tuple) else pooled  # CoCa also gives its tokens

    def forward_features(self, normalised: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, C, h, w) before pooling."""
        norm = getattr(self.visual, "attn_pool", None) is None  # with attention pooling the norm comes after it
        maps = self.visual.forward_intermediates(
            normalised, indices=1, normalize_intermediates=norm, intermediates_only=True
        )
        return maps["image_intermediates"][-1]

    def set_grad_checkpointing(self, enable: bool) -> None:
        self.visual.set_grad_checkpointing(enable)


class ClipText(nn.Module):
    """The text side of an open_clip model.

    Attributes:
        described: what it can be built from again.
        length: titles must be padded to this many tokens: open_clip's masks and some of its poolings need it.
    """

    def __init__(self, described: Mapping[str, Any]) -> None:
        super().__init__()
        values = described["text_cfg"]
        self.text: Any = _model(described["embed_dim"], _NO_VISION, values, described["quick_gelu"]).text
        self.described = dict(described)
        self.length: int = self.text.context_length
        own = "lower" if values.get("hf_tokenizer_name") is None else "whitespace"
        self.clean: Callable[[str], str] = get_clean_fn((values.get("tokenizer_kwargs") or {}).get("clean", own))

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> (B, width), pooled and projected."""
        pooled = self.text(input_ids)
        return pooled[0] if isinstance(pooled, tuple) else pooled

    def token_states(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, states width) before pooling."""
        states = self.text.forward_intermediates(
            input_ids, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
        )
        return states["text_intermediates"][-1]

    def get_input_embeddings(self) -> nn.Embedding:
        return self.text.token_embedding

    def set_grad_checkpointing(self, enable: bool) -> None:
        self.text.set_grad_checkpointing(enable)


def is_clip(model: str) -> bool:
    """Whether a model is one of open_clip's."""
    return model.startswith(PREFIX)


def clip_vision(
    model: str, image_size: int, model_args: Mapping[str, Any], described: Mapping[str, Any], folder: Path | None
) -> ClipVision:
    """The image tower, with the weights in `folder` or random ones; positions are resized to `image_size`.

    Raises:
        ArtifactError: the weights do not fit. TypeError and the like: model_args do not fit.
    """
    config = _config(model, "encoders.vision.model")
    values, embed_dim = _vision_values(config, model_args)
    in_timm = values.get("timm_model_name") is not None
    if not in_timm:
        values["image_size"] = image_size
    visual: Any = _model(embed_dim, values, _NO_TEXT, config.get("quick_gelu", False)).visual
    if folder is not None:
        _load(visual, "vision", folder, model, model_args)
    if in_timm and visual.image_size != (image_size, image_size):
        visual.set_input_size((image_size, image_size))
    return ClipVision(visual, described, image_size)


def clip_text(described: Mapping[str, Any], folder: Path | None = None, model: str = "") -> ClipText:
    """The language tower of a description, with the weights of `model` in `folder` or random ones.

    Raises:
        ArtifactError: the weights do not fit. TypeError and the like: the description does not fit.
    """
    net = ClipText(described)
    if folder is not None:
        _load(net.text, "text", folder, model, described)
    return net


def describe_vision(model: str, weights: Path | None) -> dict[str, Any]:
    """How the model's pictures are prepared, in timm's words; what the folder of weights says comes first."""
    name, tag = _parts(model)
    config = _config(model, "encoders.vision.model")
    tags = open_clip.list_pretrained_tags_by_model(name)
    public: dict[str, Any] = open_clip.get_pretrained_cfg(name, tag or tags[0]) if tags else {}
    given = public | (read_config(weights / "open_clip_config.json").get("preprocess_cfg", {}) if weights else {})
    size = config["vision_cfg"].get("image_size", 224)
    return {
        "input_size": (3, size, size),
        "mean": tuple(given.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        "std": tuple(given.get("std", open_clip.OPENAI_DATASET_STD)),
        "interpolation": given.get("interpolation", "bicubic"),
        "crop_mode": {"longest": "border", "squash": "squash"}.get(given.get("resize_mode", "shortest"), "center"),
        "crop_pct": 1.0,
        "fill": (given.get("fill_color", 0),) * 3,
    }


def describe_text(model: str, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """What a ClipText is built from."""
    config = _config(model, "encoders.text.model")
    if config["text_cfg"].get("hf_model_name"):
        raise ConfigError(
            f"encoders.text.model = {model!r} has the text tower {config['text_cfg']['hf_model_name']} of transformers."
            " Name that model instead."
        )
    unknown = set(config["text_cfg"].get("tokenizer_kwargs") or {}) - {"clean"}
    if unknown:
        raise ConfigError(
            f"encoders.text.model = {model!r} wants its tokens prepared in a way that is not known here"
            f" ({', '.join(sorted(unknown))}). Use another text tower; its image side can be used."
        )
    values, embed_dim = _text_values(config, model_args)
    return {
        "model_type": "open_clip",
        "embed_dim": embed_dim,
        "quick_gelu": config.get("quick_gelu", False),
        "text_cfg": values,
    }


def clip_folder(model: str, weights: str, key: str) -> Path:
    """The folder with a model's weights; see weights_folder."""
    name, tag = _parts(model)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights == "hub" and tag is None and len(tags) != 1:
        raise ConfigError(
            f"{key} = 'hub', but {model} has {len(tags)} public weights. Say which, as in {PREFIX}{name}/"
            f"{tags[0] if tags else 'TAG'} (known: {', '.join(tags) or 'none'}), or give a local folder or hub:OWNER/NAME."
        )
    known = open_clip.get_pretrained_cfg(name, tag or tags[0]) if tags else {}
    return weights_folder(weights, known.get("hf_hub"), FILES, key)


def clip_tokenizer() -> Tokenizer:
    """open_clip's byte pair encoding, which comes with the library, as a `tokenizers.Tokenizer` with the same ids.

    Give it cleaned titles (ClipText.clean): repaired, unescaped and lower-cased, as open_clip does.
    """
    known: Any = SimpleTokenizer()
    start, end = known.all_special_ids[:2]
    names = [known.decoder[start], known.decoder[end]]
    merges = sorted(known.bpe_ranks, key=known.bpe_ranks.get)
    tokenizer = Tokenizer(models.BPE(vocab=known.encoder, merges=merges, end_of_word_suffix="</w>"))
    tokenizer.add_special_tokens(names)
    words = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} $A {names[1]}", special_tokens=[(names[0], start), (names[1], end)]
    )
    return tokenizer


def brings_bpe(model: str) -> bool:
    """Whether the model reads open_clip's own byte pair encoding (SigLIP and others bring theirs with their weights)."""
    return _config(model, "encoders.text.model")["text_cfg"].get("hf_tokenizer_name") is None


def _parts(model: str) -> tuple[str, str | None]:
    name, _, tag = model.removeprefix(PREFIX).partition("/")
    return name, tag or None


def _config(model: str, key: str) -> dict[str, Any]:
    name = _parts(model)[0]
    known = open_clip.list_models()
    if name not in known:
        hint = nearest(name, known, "open_clip.list_models() names them all.")
        raise ConfigError(f"{key} = {model!r} is no open_clip model; {hint}")
    config = open_clip.get_model_config(name)
    assert config is not None
    return config


def _vision_values(config: Mapping[str, Any], model_args: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    values = dict(config["vision_cfg"]) | dict(model_args) | {"timm_model_pretrained": False}
    return values, values.pop("embed_dim", config["embed_dim"])


def _text_values(config: Mapping[str, Any], model_args: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    values = dict(config["text_cfg"]) | dict(model_args)
    return values, values.pop("embed_dim", config["embed_dim"])


def _model(embed_dim: int, vision: Mapping[str, Any], text: Mapping[str, Any], quick_gelu: bool) -> Any:
    build: Any = open_clip.CustomTextCLIP  # takes mappings; its annotations name the dataclasses only
    return build(embed_dim, dict(vision), dict(text), quick_gelu=quick_gelu)


def _load(tower: Any, side: str, folder: Path, model: str, asked: Mapping[str, Any]) -> None:
    """Put the weights of a folder into a tower. `asked`: model_args of an image tower, description of a language tower."""
    file = safetensors_file(folder, ("open_clip_model.safetensors", "model.safetensors"))
    _refuse_other(folder, side, model, asked)
    prefix = "visual." if side == "vision" else "text."
    try:
        state = convert_to_custom_text_state_dict(load_file(file))
        resize_pos_embed(state, SimpleNamespace(visual=tower))
        tower.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    except Exception as error:  # noqa: BLE001  safetensors and torch raise many kinds for a file that does not fit
        text = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{file} does not fit {model} ({text}). Give the weights of {model}.") from None


def _refuse_other(folder: Path, side: str, model: str, asked: Mapping[str, Any]) -> None:
    """Compare the folder's open_clip_config.json, where there is one, with what is asked for."""
    found = read_config(folder / "open_clip_config.json")
    found = found.get("model_cfg", found)
    if not found:
        return
    wanted = _config(model, f"encoders.{side}.model")
    if side == "vision":
        wanted["vision_cfg"], wanted["embed_dim"] = _vision_values(wanted, asked)
    else:
        wanted |= {"text_cfg": asked["text_cfg"], "embed_dim": asked["embed_dim"]}
    essence = _essence(found, side)
    if essence == _essence(wanted, side):
        return
    names = [name for name in open_clip.list_models() if essence == _essence(_config(PREFIX + name, ""), side)]
    other = f"{PREFIX}{names[0]}" if names else f"another model ({side}_cfg {found.get(f'{side}_cfg')})"
    raise ArtifactError(
        f"{folder} holds weights of {other}, but encoders.{side}.model asks for {model}. Name the model of the weights,"
        f" or give weights of {model}."
    )


def _essence(config: Mapping[str, Any], side: str) -> dict[str, Any]:
    """What makes a tower another one."""
    kind: Any = open_clip.CLIPVisionCfg if side == "vision" else open_clip.CLIPTextCfg
    try:
        values = asdict(kind(**config[f"{side}_cfg"]))
    except (KeyError, TypeError) as error:
        logging.getLogger(__name__).debug("no open_clip configuration: %s", error)
        return {"unknown": True}
    return {key: value for key, value in values.items() if key not in _FREE} | {
        "embed_dim": config.get("embed_dim"),
        "quick_gelu": config.get("quick_gelu", False),
    }
