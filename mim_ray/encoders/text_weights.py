"""A language model and its tokenizer from a folder in the layout of transformers; safetensors only, no remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from mim_ray.encoders.pooling import read_pooling
from mim_ray.encoders.weights import read_config
from mim_ray.errors import ArtifactError

FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "1_Pooling/config.json", "vocab.txt", "merges.txt")
"""What is copied from a hub repository."""


def load_text(folder: Path, model: str) -> tuple[Any, Tokenizer, str | None]:
    """The network in a folder, its tokenizer, and the pooling that the folder names.

    Args:
        model: what the scenario calls it; a type such as `bert` must be the folder's.

    Raises:
        ArtifactError: the weights are missing, pickled, incomplete, or of another model type.
    """
    _check_folder(folder, model)
    pooling = read_pooling(folder)
    try:
        net, found = AutoModel.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, local_files_only=True, output_loading_info=True
        )
        tokenizer = own_tokenizer(folder)
    except Exception as error:  # noqa: BLE001  safetensors, tokenizers and transformers raise many kinds
        raise ArtifactError(
            f"the language model {folder} cannot be loaded ({first_line(error)}). Give a local folder with config.json,"
            " tokenizer.json and model.safetensors."
        ) from None
    missing = sorted(key for key in found["missing_keys"] if "pooler" not in key)
    if missing:
        raise ArtifactError(
            f"the weights in {folder} lack {len(missing)} of the {net.config.model_type} model that its config.json names,"
            f" first {missing[0]}: they belong to another architecture. Copy the folder again."
        )
    return net.float(), tokenizer, pooling


def own_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder. One that adds nothing to a title (GPT-2's) is made to end each with its end token."""
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        from transformers import AutoTokenizer

        own: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer = own.backend_tokenizer
    said = read_config(folder / "special_tokens_map.json") | read_config(folder / "tokenizer_config.json")
    names = {key: said.get(key) for key in ("pad_token", "eos_token")}
    pad, end = (name.get("content") if isinstance(name, dict) else name for name in names.values())
    if pad is not None and (pad_id := tokenizer.token_to_id(pad)) is not None:
        tokenizer.enable_padding(pad_id=pad_id, pad_token=pad)
    end = end or "<|endoftext|>"
    if not tokenizer.encode("").ids and (end_id := tokenizer.token_to_id(end)) is not None:
        tokenizer.post_processor = processors.Sequence(
            [
                *([] if tokenizer.post_processor is None else [tokenizer.post_processor]),
                processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, end_id)]),
            ]
        )
    return tokenizer


def first_line(error: BaseException) -> str:
    """Of an error's text, for a sentence."""
    return str(error).strip().split("\n")[0][:200]


def _check_folder(folder: Path, model: str) -> None:
    if not list(folder.glob("*.safetensors")):
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise ArtifactError(
            f"{folder} has no safetensors (found: {found or 'nothing'}). Give a local folder that holds the weights as"
            " safetensors; pickled .bin files are never loaded."
        )
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"{folder} has no config.json, which names the architecture of its weights. Add it.")
    if (folder / "adapter_config.json").is_file():
        raise ArtifactError(
            f"{folder} holds an adapter for another model's weights. Merge it into them and give those."
        )
    kind = read_config(folder / "config.json").get("model_type")
    if model in CONFIG_MAPPING_NAMES and kind != model:
        raise ArtifactError(
            f"{folder} holds weights of a {kind!r} model, but encoders.text.model asks for {model!r}. Set it to"
            f" {kind!r}, or give weights of a {model!r} model."
        )
