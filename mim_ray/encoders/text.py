"""F_L, the language tower: BERT-like models of transformers by name, folder or type (paper: BGE).

The pooled vector is the first token's last state, as BGE and BERT define it. Weights come from a local folder of
safetensors or from the hub (safetensors only), else they are random. Remote code never runs; nothing here unpickles.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from mim_ray.config.scenario import Text
from mim_ray.encoders.tokenizer import special_tokens
from mim_ray.errors import ArtifactError, ConfigError

Tokens = Mapping[str, Tensor]
"""input_ids (B, T) int64 and attention_mask (B, T) int64, 1 for real tokens."""


class TextTower(nn.Module):
    """F_L: titles to one vector each.

    Attributes:
        width: length of that vector.
        max_tokens: longer titles are cut.
        tokenizer: the tokenizer that belongs to the weights.
        causal: no token sees a later one (GPT-2), so that next-token prediction means something.
    """

    def __init__(self, net: Any, tokenizer: Tokenizer, max_tokens: int) -> None:
        super().__init__()
        self.net: Any = net
        self.net.pooler = None  # its weights would get no gradient: the first token's state is taken as it is
        self.width = int(self.net.config.hidden_size)
        self.max_tokens = max_tokens
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.special = special_tokens(self.tokenizer)
        self.tokenizer.enable_truncation(max_tokens)
        self.tokenizer.enable_padding(pad_id=self.special.pad)
        self.causal = self._sees_nothing_ahead()

    def tokenize(self, titles: Sequence[str | None]) -> dict[str, Tensor]:
        """Titles as padded ids on the CPU. A missing title becomes the empty one; the caller keeps which are missing."""
        encodings = self.tokenizer.encode_batch([title or "" for title in titles])
        return {
            "input_ids": torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64),  # (B, T)
            "attention_mask": torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.int64),
        }

    def forward(self, tokens: Tokens) -> Tensor:
        """Tokens (B, T) -> (B, width): the last state of the first token, of the last real one in a causal tower."""
        states = self.token_states(tokens)
        if not self.causal:
            return states[:, 0]
        last = tokens["attention_mask"].sum(dim=1).clamp(min=1) - 1  # (B,)
        return states[torch.arange(len(states), device=states.device), last]

    def token_states(self, tokens: Tokens) -> Tensor:
        """Tokens (B, T) -> (B, T, width)."""
        states = self.net(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return states.last_hidden_state

    @torch.no_grad()
    def _sees_nothing_ahead(self) -> bool:
        """Tried out: does the first token's state change with the second token?"""
        training = self.net.training
        self.net.eval()
        ids = torch.tensor([[0, 1], [0, 2]])
        states = self.token_states({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        self.net.train(training)
        return bool(torch.equal(states[0, 0], states[1, 0]))


def build_text(settings: Text, tokenizer: Tokenizer | None) -> TextTower:
    """The tower as a scenario describes it.

    Args:
        tokenizer: trained on the catalogue; needed when no weights bring one, ignored when they do.

    Raises:
        ConfigError: no such model.
        ArtifactError: the weights are missing, pickled, or of another model type.
    """
    if settings.weights is not None:
        name = settings.model if settings.weights == "hub" else settings.weights
        return _pretrained(name, settings)
    if tokenizer is None:
        raise ConfigError(
            "encoders.text has no weights, so it needs a tokenizer trained on titles. Run pre-training first, or set"
            " encoders.text.weights to a local folder or `hub`."
        )
    config = _config(settings, tokenizer)
    return build_from_config(config, tokenizer, settings.max_tokens)


def brings_tokenizer(settings: Text) -> bool:
    """Whether the weights come with a tokenizer, so that none is trained."""
    return settings.weights is not None


def build_from_config(config: Mapping[str, Any], tokenizer: Tokenizer, max_tokens: int) -> TextTower:
    """A tower with random weights from a transformers configuration (a mapping with `model_type`).

    Raises:
        ConfigError: the configuration cannot be built.
    """
    values = {key: value for key, value in config.items() if key != "model_type"}
    try:
        net = AutoModel.from_config(AutoConfig.for_model(config["model_type"], **values), trust_remote_code=False)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"encoders.text: {config['model_type']} cannot be built from its model_args ({str(error)[:300]})."
            " Correct them."
        ) from None
    return _checked(TextTower(net, tokenizer, max_tokens), config["model_type"])


def _config(settings: Text, tokenizer: Tokenizer) -> dict[str, Any]:
    own = {"vocab_size": tokenizer.get_vocab_size(), "pad_token_id": special_tokens(tokenizer).pad}
    if settings.model in CONFIG_MAPPING_NAMES:
        return {"model_type": settings.model} | own | settings.model_args
    if "/" not in settings.model and not Path(settings.model).is_dir():
        near = difflib.get_close_matches(settings.model, list(CONFIG_MAPPING_NAMES), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "Give a type such as `bert`."
        raise ConfigError(f"encoders.text.model = {settings.model!r} is no transformers model type; {hint}")
    try:
        config = AutoConfig.from_pretrained(settings.model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"encoders.text.model = {settings.model!r} cannot be read ({_first_line(error)}). Give a local folder, or a"
            " model type such as `bert` with model_args."
        ) from None
    return config.to_dict() | own | settings.model_args


def _pretrained(name: str, settings: Text) -> TextTower:
    folder = Path(name)
    if settings.weights != "hub":
        _check_folder(folder, settings.model)
    try:
        net = AutoModel.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, local_files_only=settings.weights != "hub"
        )
        tokenizer = _own_tokenizer(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"the language model {name} cannot be loaded ({_first_line(error)}). Give a local folder with config.json,"
            " tokenizer.json and model.safetensors, or check the network for `hub`."
        ) from None
    return _checked(TextTower(net.float(), tokenizer, settings.max_tokens), name)


def _check_folder(folder: Path, model: str) -> None:
    if not list(folder.glob("*.safetensors")):
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise ArtifactError(
            f"{folder} has no safetensors (found: {found or 'nothing'}). Give a local folder that holds the weights as"
            " safetensors; pickled .bin files are never loaded."
        )
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"{folder} has no config.json, which names the architecture of its weights. Add it.")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if model in CONFIG_MAPPING_NAMES and kind != model:
        raise ArtifactError(
            f"{folder} holds weights of a {kind!r} model, but encoders.text.model asks for {model!r}. Set it to"
            f" {kind!r}, or give weights of a {model!r} model."
        )


def _own_tokenizer(name: str) -> Tokenizer:
    file = Path(name) / "tokenizer.json"
    if file.is_file():
        return Tokenizer.from_file(str(file))
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, trust_remote_code=False).backend_tokenizer


def _checked(tower: TextTower, name: str) -> TextTower:
    """Refuse what would fail or mean something else later, in a sentence."""
    if tower.special.cls is None:
        raise ConfigError(
            f"encoders.text: {name} has no first ([CLS]) token to pool. Use a BERT-like model (bert, BGE, roberta)."
        )
    longest = getattr(tower.net.config, "max_position_embeddings", None)
    if longest is not None and tower.max_tokens > longest:
        raise ConfigError(
            f"encoders.text.max_tokens = {tower.max_tokens} is more than the {longest} positions of {name}."
            f" Set it to {longest} or less."
        )
    vocabulary, known = tower.tokenizer.get_vocab_size(), tower.net.config.vocab_size
    if vocabulary > known:
        raise ArtifactError(f"the tokenizer of {name} has {vocabulary} tokens, its weights only {known}.")
    return tower


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
