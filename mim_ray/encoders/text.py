"""F_L, the language tower: models of transformers by name, folder or type (paper: BGE), and open_clip's as `open_clip:NAME`.

Figure 5's are `bert`, `gpt2`, BAAI/bge-* and, in the size and with the vocabulary of BEiT-3's text side (a transformer
over an XLM-R-like vocabulary of 64,010), `xlm-roberta` with model_args. The pooled vector is the model's own definition:

- what 1_Pooling/config.json (sentence-transformers) says, where the folder of weights has one;
- else the first token's last state (BERT, BGE), in a causal model (GPT-2) that of the last real token, the end token;
- for open_clip's models their own pooling and projection.

Weights come from a local folder of safetensors or from the hub (safetensors only), else they are random. Remote code never
runs; nothing here unpickles.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from mim_ray.config.scenario import Text
from mim_ray.encoders.clip import (
    ClipText,
    brings_bpe,
    clip_folder,
    clip_text,
    clip_tokenizer,
    describe_text,
    is_clip,
)
from mim_ray.encoders.pooling import pool
from mim_ray.encoders.text_weights import FILES, first_line, load_text, own_tokenizer
from mim_ray.encoders.tokenizer import special_tokens
from mim_ray.encoders.tower import Tower
from mim_ray.encoders.weights import nearest, weights_folder
from mim_ray.errors import ArtifactError, ConfigError

Tokens = Mapping[str, Tensor]
"""input_ids (B, T) int64 and attention_mask (B, T) int64, 1 for real tokens."""
_FIELDS_OF_ORIGIN = ("_name_or_path", "transformers_version", "dtype")


class TextTower(Tower):
    """F_L: titles to one vector each.

    Attributes:
        width: length of that vector. states_width: of a token's state.
        max_tokens: longer titles are cut.
        tokenizer: the tokenizer that belongs to the weights.
        pooling: cls, mean, lasttoken, or own (open_clip).
        causal: no token sees a later one (GPT-2), so that next-token prediction means something.
    """

    def __init__(self, net: Any, tokenizer: Tokenizer, max_tokens: int, pooling: str | None = None) -> None:
        super().__init__()
        self.net: Any = net
        if getattr(net, "pooler", None) is not None:
            net.pooler = None  # its weights would get no gradient: states are pooled as they are
        self.max_tokens = max_tokens
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.special = special_tokens(self.tokenizer)
        padding = self.tokenizer.padding
        pad = self.special.pad if padding is None else int(padding["pad_id"])
        self.tokenizer.enable_truncation(max_tokens)
        self.tokenizer.enable_padding(pad_id=pad, length=net.length if isinstance(net, ClipText) else None)
        self._clean: Callable[[str], str] = net.clean if isinstance(net, ClipText) else str
        training = net.training
        net.eval()
        with torch.no_grad():
            self.causal, self.states_width = self._try_out(net.length if isinstance(net, ClipText) else 2)
        net.train(training)
        self.pooling = "own" if isinstance(net, ClipText) else pooling or ("lasttoken" if self.causal else "cls")
        projected = self.pooling == "own" and net.text.text_projection is not None
        self.width: int = net.text.output_dim if projected else self.states_width

    def tokenize(self, titles: Sequence[str | None]) -> dict[str, Tensor]:
        """Titles as padded ids on the CPU. A missing title becomes the empty one; the caller keeps which are missing."""
        encodings = self.tokenizer.encode_batch([self._clean(title or "") for title in titles])
        return {
            "input_ids": torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64),  # (B, T)
            "attention_mask": torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.int64),
        }

    def forward(self, tokens: Tokens) -> Tensor:
        """Tokens (B, T) -> (B, width), pooled as the model defines it."""
        if not isinstance(self.net, ClipText):
            return pool(self.token_states(tokens), tokens["attention_mask"], self.pooling)
        with self.autocast(tokens["input_ids"].device):
            return self.net(tokens["input_ids"]).float()

    def token_states(self, tokens: Tokens) -> Tensor:
        """Tokens (B, T) -> (B, T, states_width): the last layer's states."""
        ids = tokens["input_ids"]
        with self.autocast(ids.device):
            if isinstance(self.net, ClipText):
                return self.net.token_states(ids).float()
            return self.net(input_ids=ids, attention_mask=tokens["attention_mask"]).last_hidden_state.float()

    def described(self) -> dict[str, Any]:
        """What `build_from_config` builds the same architecture from, as JSON values."""
        if isinstance(self.net, ClipText):
            return self.net.described
        values = json.loads(self.net.config.to_json_string(use_diff=True))
        kept = {key: value for key, value in values.items() if key not in _FIELDS_OF_ORIGIN}
        return kept | {"pooling": self.pooling}

    def _try_out(self, length: int) -> tuple[bool, int]:
        """Whether the first token's state is the same whatever the second token is, and the width of a state."""
        ids = torch.zeros(2, length, dtype=torch.int64)
        ids[:, 1] = torch.tensor([1, 2])
        states = self.token_states({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        return torch.allclose(states[0, 0], states[1, 0], rtol=1e-5, atol=1e-6), states.shape[-1]


def build_text(settings: Text, tokenizer: Tokenizer | None) -> TextTower:
    """The tower as a scenario describes it.

    Args:
        tokenizer: trained on the catalogue; needed when the model brings none, ignored when it does.

    Raises:
        ConfigError: no such model.
        ArtifactError: the weights are missing, pickled, or of another model type.
    """
    if is_clip(settings.model):
        return _clip(settings, tokenizer)
    if settings.weights is not None:
        name = settings.model if "/" in settings.model else None
        folder = weights_folder(settings.weights, name, FILES, "encoders.text.weights")
        net, brought, pooling = load_text(folder, settings.model)
        return _checked(net, brought, settings.max_tokens, str(folder), pooling)
    return build_from_config(_config(settings, _needed(tokenizer)), _needed(tokenizer), settings.max_tokens)


def brings_tokenizer(settings: Text) -> bool:
    """Whether the model comes with a tokenizer, so that none is trained."""
    return settings.weights is not None or (is_clip(settings.model) and brings_bpe(settings.model))


def build_from_config(config: Mapping[str, Any], tokenizer: Tokenizer, max_tokens: int) -> TextTower:
    """A tower with random weights from `TextTower.described()` or a transformers configuration with `model_type`.

    Raises:
        ConfigError: the configuration cannot be built.
    """
    values = {key: value for key, value in config.items() if key not in ("model_type", "pooling")}
    try:
        net: Any
        if config["model_type"] == "open_clip":
            net = clip_text(config)
        else:
            net = AutoModel.from_config(AutoConfig.for_model(config["model_type"], **values), trust_remote_code=False)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"encoders.text: {config['model_type']} cannot be built from its model_args ({str(error)[:300]})."
            " Correct them."
        ) from None
    return _checked(net, tokenizer, max_tokens, config["model_type"], config.get("pooling"))


def _clip(settings: Text, tokenizer: Tokenizer | None) -> TextTower:
    described, own = describe_text(settings.model, settings.model_args), brings_bpe(settings.model)
    if settings.weights is None:
        tokenizer = clip_tokenizer() if own else _needed(tokenizer)
        if not own:
            described["text_cfg"] |= {"vocab_size": tokenizer.get_vocab_size()}
        return build_from_config(described, tokenizer, settings.max_tokens)
    folder = clip_folder(settings.model, settings.weights, "encoders.text.weights")
    tokenizer = clip_tokenizer() if own else own_tokenizer(folder)
    return _checked(clip_text(described, folder, settings.model), tokenizer, settings.max_tokens, settings.model)


def _needed(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise ConfigError(
            "encoders.text has no weights, so it needs a tokenizer trained on titles. Run pre-training first, or set"
            " encoders.text.weights to a local folder or `hub`."
        )
    return tokenizer


def _config(settings: Text, tokenizer: Tokenizer) -> dict[str, Any]:
    own = {"vocab_size": tokenizer.get_vocab_size(), "pad_token_id": special_tokens(tokenizer).pad}
    if settings.model in CONFIG_MAPPING_NAMES:
        return {"model_type": settings.model} | own | settings.model_args
    if "/" not in settings.model and not Path(settings.model).is_dir():
        hint = nearest(settings.model, CONFIG_MAPPING_NAMES, "Give a type such as `bert`.")
        raise ConfigError(f"encoders.text.model = {settings.model!r} is no transformers model type; {hint}")
    try:
        config = AutoConfig.from_pretrained(settings.model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"encoders.text.model = {settings.model!r} cannot be read ({first_line(error)}). Give a local folder, or a"
            " model type such as `bert` with model_args."
        ) from None
    return config.to_dict() | own | settings.model_args


def _checked(net: Any, tokenizer: Tokenizer, max_tokens: int, name: str, pooling: str | None = None) -> TextTower:
    """The tower; refuses what would fail or mean something else later, in a sentence."""
    config: Any = getattr(net, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # keys and values are kept for generation only
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"encoders.text: {name} is an encoder-decoder, whose states are no embedding of a title. Use an encoder (bert,"
            " BGE, xlm-roberta) or a causal model (gpt2)."
        )
    longest = net.length if isinstance(net, ClipText) else _positions(net)
    if longest is not None and max_tokens > longest:
        raise ConfigError(
            f"encoders.text.max_tokens = {max_tokens} is more than the {longest} positions of {name}."
            f" Set it to {longest} or less."
        )
    vocabulary, known = tokenizer.get_vocab_size(), net.get_input_embeddings().num_embeddings
    if vocabulary > known:
        raise ArtifactError(f"the tokenizer of {name} has {vocabulary} tokens, its weights only {known}.")
    tower = TextTower(net, tokenizer, max_tokens, pooling)
    if tower.pooling == "cls" and tower.special.cls is None:
        raise ConfigError(
            f"encoders.text: {name} has no first ([CLS]) token to pool. Use a BERT-like model (bert, BGE, roberta)."
        )
    return tower


def _positions(net: nn.Module) -> int | None:
    longest: int | None = getattr(net.config, "max_position_embeddings", None)
    table: Any = getattr(getattr(net, "embeddings", None), "position_embeddings", None)
    if longest is not None and getattr(table, "padding_idx", None) is not None:  # RoBERTa counts from there
        return longest - table.padding_idx - 1
    return longest
