"""The item encoder: F_V, F_L, their projections to one width D, and fusion (paper Eqs. 2-4).

What a missing modality means: an item without an image (or title) takes a zero vector in place of that projected
embedding. Tensor fusion (Eq. 3) then keeps the other modality's own terms through its appended 1, so that the item still
gets an embedding. An item with neither has none; the caller rejects it.

Embeddings from `forward` are as the network gives them; those that go into tables are divided by their length (`unit`),
because every use is a cosine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_safetensors
from tokenizers import Tokenizer
from torch import Tensor, nn

from mim_ray.artifacts import read_bytes, read_json, read_tensors, write_bytes, write_json
from mim_ray.config.scenario import Encoders
from mim_ray.data.transforms import PictureFormat
from mim_ray.encoders.fusion import build_fusion
from mim_ray.encoders.text import TextTower, Tokens, build_from_config, build_text
from mim_ray.encoders.vision import VisionTower, build_untrained, build_vision
from mim_ray.errors import ArtifactError, ConfigError


@dataclass(frozen=True)
class ItemEmbeddings:
    """h^img, h^txt and h^MM of a batch, each (B, D). A missing modality's rows are zeros."""

    image: Tensor
    text: Tensor
    mm: Tensor


class ItemEncoder(nn.Module):
    """F_V, F_L and fusion as one module.

    Attributes:
        settings: what it was built from. width: D. picture, image_size: what pictures it takes, and their side S.
        encoder_version: "<stage>-<hash of weights, architecture and tokenizer>" once saved or loaded, else None.
    """

    def __init__(self, settings: Encoders, vision: VisionTower, text: TextTower) -> None:
        super().__init__()
        self.settings = settings
        self.width = settings.width
        self.picture = vision.picture
        self.image_size = vision.picture.size
        self.encoder_version: str | None = None
        self.vision = vision
        self.text = text
        self.image_projection = nn.Linear(vision.width, settings.width)
        self.text_projection = nn.Linear(text.width, settings.width)
        self.fusion = build_fusion(settings.fusion, settings.width, settings.fusion_hidden, settings.fusion_rank)

    @classmethod
    def build(cls, settings: Encoders, tokenizer: Tokenizer | None, seed: int) -> ItemEncoder:
        """A new encoder: public weights where the settings name them, else random ones that depend on `seed` alone.

        Args:
            tokenizer: trained on the catalogue's titles; ignored when the language weights bring one.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(settings, build_vision(settings.vision), build_text(settings.text, tokenizer))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> h^img (B, D) (Eq. 2). Used for queries and items alike."""
        return self.image_projection(self.vision(pixels))

    def encode_text(self, tokens: Tokens) -> Tensor:
        """Tokens (B, T) from `text.tokenize` -> h^txt (B, D) (Eq. 2)."""
        return self.text_projection(self.text(tokens))

    def fuse(self, image_emb: Tensor, text_emb: Tensor) -> Tensor:
        """h^img (B, D) and h^txt (B, D), zeros where missing -> h^MM (B, D) (Eqs. 3 and 4)."""
        return self.fusion(image_emb, text_emb)

    def forward(self, pixels: Tensor, has_image: Tensor, tokens: Tokens, has_text: Tensor) -> ItemEmbeddings:
        """Embed items that may lack a modality.

        Args:
            pixels: uint8 (B, 3, S, S); rows without an image may hold anything.
            has_image, has_text: (B,) bool.
            tokens: (B, T); rows without a title may hold anything.
        """
        image = self.encode_image(pixels)
        image = torch.where(has_image.unsqueeze(1), image, torch.zeros_like(image))  # (B, D)
        text = self.encode_text(tokens)
        text = torch.where(has_text.unsqueeze(1), text, torch.zeros_like(text))  # (B, D)
        return ItemEmbeddings(image, text, self.fuse(image, text))

    def tower_parameters(self) -> Iterator[nn.Parameter]:
        """Weights of F_V and F_L."""
        yield from self.vision.parameters()
        yield from self.text.parameters()

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Weights of projections and fusion."""
        for module in (self.image_projection, self.text_projection, self.fusion):
            yield from module.parameters()

    def save(self, uri: str, *, stage: str) -> str:
        """Write encoder.json, model.safetensors and tokenizer.json below `uri`; returns the new encoder version."""
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in self.state_dict().items()}
        weights = save_safetensors(tensors)
        tokenizer = self.text.tokenizer.to_str().encode()
        architecture = {
            "settings": self.settings.model_dump(mode="json"),
            "picture": asdict(self.picture),
            "text_config": self.text.described(),
        }
        digest = hashlib.sha256(weights + tokenizer + json.dumps(architecture, sort_keys=True).encode()).hexdigest()
        self.encoder_version = f"{stage}-{digest[:12]}"
        write_bytes(f"{uri}/model.safetensors", weights)
        write_bytes(f"{uri}/tokenizer.json", tokenizer)
        write_json(f"{uri}/encoder.json", {"encoder_version": self.encoder_version, "stage": stage} | architecture)
        return self.encoder_version

    @classmethod
    def load(cls, uri: str, settings: Encoders | None = None) -> ItemEncoder:
        """The encoder saved at `uri`, in evaluation mode; needs no network.

        Args:
            settings: refuse an encoder of another architecture than these ask for.

        Raises:
            ArtifactError: missing, damaged, or another architecture; names both.
        """
        described = read_json(f"{uri}/encoder.json")
        try:
            own = Encoders.model_validate(described["settings"])
            config, version = described["text_config"], described["encoder_version"]
            picture = PictureFormat.from_json(described["picture"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{uri}/encoder.json does not describe an encoder ({str(error)[:200]}). Run the stage again."
            ) from None
        if settings is not None:
            _refuse_other(uri, own, settings)
        try:
            tokenizer = Tokenizer.from_str(read_bytes(f"{uri}/tokenizer.json").decode())
            vision = build_untrained(own.vision, picture=picture)
            encoder = cls(own, vision, build_from_config(config, tokenizer, own.text.max_tokens))
        except ConfigError as error:
            raise ArtifactError(f"{uri}/encoder.json names an encoder that cannot be built here: {error}") from None
        try:
            encoder.load_state_dict(read_tensors(f"{uri}/model.safetensors"))
        except RuntimeError as error:
            raise ArtifactError(
                f"{uri}/model.safetensors holds other weights than {_describe(own)}, which encoder.json names"
                f" ({' '.join(str(error).split())[:300]}). Run the stage that made it again."
            ) from None
        encoder.encoder_version = version
        return encoder.eval()


def unit(vectors: Tensor) -> Tensor:
    """Rows divided by their length; a row of zeros stays zeros. (B, D) -> (B, D)."""
    return torch.nn.functional.normalize(vectors, dim=-1)


def encode_batch(
    encoder: ItemEncoder, titles: Sequence[str | None], images: np.ndarray, has_image: np.ndarray
) -> np.ndarray:
    """Embeddings for tables: h^MM of items, of length 1.

    Args:
        titles: B titles, None or blank where missing.
        images: uint8 (B, 3, S, S); rows without an image may hold anything.
        has_image: (B,) bool.

    Returns:
        float32 (B, D). Items with neither image nor title are rows of zeros: reject them.
    """
    if images.shape != (len(titles), 3, encoder.image_size, encoder.image_size):
        raise ValueError(
            f"images have the shape {images.shape}; the encoder takes {len(titles)} RGB pictures of"
            f" {encoder.image_size} x {encoder.image_size} pixels for {len(titles)} titles."
        )
    if not titles:
        return np.zeros((0, encoder.width), np.float32)
    device = encoder.image_projection.weight.device
    has_text = np.array([title is not None and bool(title.strip()) for title in titles])
    training = encoder.training
    encoder.eval()
    with torch.inference_mode():
        tokens = {key: value.to(device) for key, value in encoder.text.tokenize(titles).items()}
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device)
        embedded = encoder(
            pixels, torch.from_numpy(has_image).to(device), tokens, torch.from_numpy(has_text).to(device)
        )
        vectors = unit(embedded.mm.float()).cpu().numpy()
    encoder.train(training)
    vectors[~(has_image | has_text)] = 0.0
    return vectors


def load_for_tables(uri: str, device: str = "cpu") -> ItemEncoder:
    """The encoder saved at `uri`, laid out for `encode_batch`: one way for extraction and serving, so that an item's embedding
    does not depend on which of them made it.

    On CPUs pictures are held pixel by pixel (channels last): convolutions are a quarter faster and differ by rounding only
    (1e-6 of a vector of length 1).

    Raises:
        ArtifactError: as ItemEncoder.load.
    """
    encoder = ItemEncoder.load(uri).to(device)
    if device == "cpu":
        encoder.vision.net.to(memory_format=torch.channels_last)
    return encoder


def encode_queries(
    encoder: ItemEncoder, titles: Sequence[str | None], images: np.ndarray, has_image: np.ndarray
) -> np.ndarray:
    """Queries in the space of h^MM: h^img of a picture, as C-SFT trains q (Eq. 5), else h^txt of a text. Of length 1.

    Args, Returns: as encode_batch. Each tower sees only what it is for.
    """
    device = encoder.image_projection.weight.device
    has_text = np.array([title is not None and bool(title.strip()) for title in titles], bool) & ~has_image
    vectors = np.zeros((len(titles), encoder.width), np.float32)
    training = encoder.training
    encoder.eval()
    with torch.inference_mode():
        if has_image.any():
            pixels = torch.from_numpy(np.ascontiguousarray(images[has_image])).to(device)
            vectors[has_image] = unit(encoder.encode_image(pixels).float()).cpu().numpy()
        if has_text.any():
            texts = [title for title, is_text in zip(titles, has_text, strict=True) if is_text]
            tokens = {key: value.to(device) for key, value in encoder.text.tokenize(texts).items()}
            vectors[has_text] = unit(encoder.encode_text(tokens).float()).cpu().numpy()
    encoder.train(training)
    return vectors


def _refuse_other(uri: str, own: Encoders, wanted: Encoders) -> None:
    ignored: dict[str, Any] = {"vision": {"weights"}, "text": {"weights", "vocabulary_size"}}  # where a start came from
    if wanted.fusion != "low_rank_tfn":
        ignored["fusion_rank"] = True
    if own.model_dump(exclude=ignored) != wanted.model_dump(exclude=ignored):
        raise ArtifactError(
            f"{uri} holds {_describe(own)}, but the scenario asks for {_describe(wanted)}. Run pre-training again with"
            " this scenario, or use the scenario that made it."
        )


def _describe(settings: Encoders) -> str:
    vision, text = settings.vision, settings.text
    args = [f"{model.model}{model.model_args or ''}" for model in (vision, text)]
    return (
        f"{args[0]} at {vision.image_size or 'its own'} px ({vision.resize or 'its own'} resize) + {args[1]} with {text.max_tokens} tokens,"
        f" width {settings.width}, {settings.fusion} {settings.fusion_hidden}"
        f"{f' of rank {settings.fusion_rank}' if settings.fusion == 'low_rank_tfn' else ''}"
    )
