"""What pre-training minimises (paper Section 3.2): masked images, masked or next words, and aligned pairs.

DDA hides a part of an image or a title and asks the tower for it; a tower that reads from left to right (GPT-2) is asked
for the next word instead. DMA asks which title belongs to which image. The paper names the stages, not their losses;
ours are SimMIM's (pixels, L1), BERT's (80/10/10), GPT's and CLIP's (symmetric).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from mim_ray.contrastive.info_nce import MAX_LOGIT_SCALE
from mim_ray.encoders import ItemEncoder
from mim_ray.encoders.text import TextTower, Tokens
from mim_ray.encoders.tokenizer import SpecialTokens
from mim_ray.encoders.vision import VisionTower

NOT_ASKED = -100
"""Label of a token that was not hidden."""
_MAX_LOG_SCALE = math.log(MAX_LOGIT_SCALE)


def mask_cell(image_size: int, stride: int) -> int:
    """Side in pixels of the squares that are hidden: the tower's stride, or less where fewer than four would fit a side.

    So a ViT hides its patches and a network of stride 32 at 224 pixels hides 7 x 7 squares (as SimMIM does); at small
    sizes a convolutional tower still has something left to see.
    """
    largest = max(1, min(stride, image_size // 4))
    return next(cell for cell in range(largest, 0, -1) if image_size % cell == 0)


def draw_image_mask(num_images: int, side: int, mask_ratio: float, generator: torch.Generator | None) -> Tensor:
    """Which cells are hidden: (B, side, side) bool, the same number in every image, at least one, never all.

    Without a generator torch's own random numbers are used.
    """
    cells = side * side
    num_hidden = min(max(1, round(mask_ratio * cells)), max(1, cells - 1))
    order = torch.rand(num_images, cells, generator=generator).argsort(dim=1)  # (B, cells)
    return (order < num_hidden).view(num_images, side, side)


def masked_l1(reconstruction: Tensor, image: Tensor, hidden: Tensor) -> Tensor:
    """Mean absolute error over the hidden pixels.

    Args:
        reconstruction, image: (B, 3, S, S). hidden: (B, S, S) bool, True where hidden.
    """
    error = (reconstruction - image).abs().mean(dim=1)  # (B, S, S)
    return (error * hidden).sum() / hidden.sum().clamp(min=1)


class MaskedImageModel(nn.Module):
    """Masked image modelling in pixel space, for transformers and convolutional towers alike.

    Hidden cells are replaced by a learned square of pixels before the tower sees the image, so that nothing depends on
    how a tower cuts it; a linear layer on each cell of the tower's feature map draws its square of the image.
    """

    def __init__(self, vision: VisionTower) -> None:
        super().__init__()
        self.vision = vision
        self.cell = mask_cell(vision.image_size, vision.stride)
        self.side = vision.image_size // self.cell
        self.mask_token = nn.Parameter(torch.zeros(3, self.cell, self.cell))
        self.head = nn.Conv2d(vision.map_channels, 3 * vision.stride**2, kernel_size=1)

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        """Loss of uint8 pixels (B, 3, S, S) with the cells of mask (B, side, side) hidden."""
        image = self.vision.normalise(pixels)
        return masked_l1(self.reconstruct(image, mask), image, self.hidden_pixels(mask))

    def reconstruct(self, image: Tensor, mask: Tensor) -> Tensor:
        """Normalised (B, 3, S, S) and mask (B, side, side) -> the whole image as drawn from what is left, (B, 3, S, S)."""
        token = self.mask_token.repeat(1, self.side, self.side)  # (3, S, S)
        seen = torch.where(self.hidden_pixels(mask).unsqueeze(1), token, image)  # (B, 3, S, S)
        drawn = functional.pixel_shuffle(self.head(self.vision.feature_map(seen)), self.vision.stride)
        if drawn.shape[-1] != image.shape[-1]:  # image_size is no multiple of the stride
            drawn = functional.interpolate(drawn, size=image.shape[-2:], mode="bilinear")
        return drawn

    def hidden_pixels(self, mask: Tensor) -> Tensor:
        """(B, side, side) -> (B, S, S)."""
        return mask.repeat_interleave(self.cell, dim=1).repeat_interleave(self.cell, dim=2)


def mask_tokens(
    tokens: Tokens, special: SpecialTokens, vocabulary_size: int, mask_ratio: float, generator: torch.Generator | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Hide words as BERT does: of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay.

    Args:
        tokens: of B titles, (B, T). Special tokens and padding are never chosen.

    Returns:
        The changed tokens and labels (B, T): the original id where chosen, NOT_ASKED elsewhere.
    """
    ids = tokens["input_ids"]
    mask_id = special.mask
    assert mask_id is not None
    ordinary = tokens["attention_mask"].bool() & ~torch.isin(ids, torch.tensor(special.all, device=ids.device))

    def draw() -> Tensor:
        return torch.rand(ids.shape, generator=generator).to(ids.device)

    chosen = ordinary & (draw() < mask_ratio)
    labels = torch.where(chosen, ids, NOT_ASKED)
    kind = draw()
    random_ids = torch.randint(vocabulary_size, ids.shape, generator=generator).to(ids.device)
    changed = torch.where(chosen & (kind < 0.8), mask_id, ids)
    changed = torch.where(chosen & (kind >= 0.8) & (kind < 0.9), random_ids, changed)
    return {**tokens, "input_ids": changed}, labels


class MaskedLanguageModel(nn.Module):
    """Masked language modelling: a BERT head whose output weights are the tower's own word embeddings."""

    def __init__(self, text: TextTower) -> None:
        super().__init__()
        self.text = text
        self.words: nn.Embedding = text.net.get_input_embeddings()
        words_width = self.words.embedding_dim
        self.head = nn.Sequential(nn.Linear(text.states_width, words_width), nn.GELU(), nn.LayerNorm(words_width))
        self.bias = nn.Parameter(torch.zeros(self.words.num_embeddings))

    def forward(self, tokens: Tokens, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the asked tokens; 0 when none is asked."""
        asked = labels != NOT_ASKED
        states = self.text.token_states(tokens)[asked]  # (num_asked, width)
        logits = self.head(states) @ self.words.weight.T + self.bias  # (num_asked, vocabulary)
        loss = functional.cross_entropy(logits, labels[asked], reduction="sum")
        return loss / asked.sum().clamp(min=1)


def next_tokens(tokens: Tokens) -> Tensor:
    """Labels (B, T) of next-token prediction: at each place the id that follows, NOT_ASKED where only padding does."""
    ids, real = tokens["input_ids"], tokens["attention_mask"].bool()
    labels = torch.full_like(ids, NOT_ASKED)
    labels[:, :-1] = torch.where(real[:, :-1] & real[:, 1:], ids[:, 1:], NOT_ASKED)
    return labels


class NextTokenModel(nn.Module):
    """Next-token prediction for towers that read from left to right: the output weights are the word embeddings."""

    def __init__(self, text: TextTower) -> None:
        super().__init__()
        self.text = text
        self.words: nn.Embedding = text.net.get_input_embeddings()
        width = self.words.embedding_dim
        self.head = nn.Identity() if text.states_width == width else nn.Linear(text.states_width, width, bias=False)

    def forward(self, tokens: Tokens, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the tokens that follow (`next_tokens`); 0 when none does."""
        asked = labels != NOT_ASKED
        logits = self.head(self.text.token_states(tokens)[asked]) @ self.words.weight.T  # (num_asked, vocabulary)
        loss = functional.cross_entropy(logits, labels[asked], reduction="sum")
        return loss / asked.sum().clamp(min=1)


class ImageTextAligner(nn.Module):
    """DMA: h^img and h^txt of pairs, and the learned 1/temperature between them. Fusion takes no part."""

    def __init__(self, encoder: ItemEncoder, temperature: float) -> None:
        super().__init__()
        self.vision, self.image_projection = encoder.vision, encoder.image_projection
        self.text, self.text_projection = encoder.text, encoder.text_projection
        self.log_scale = nn.Parameter(torch.tensor(min(-math.log(temperature), _MAX_LOG_SCALE)))

    def forward(self, pixels: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 (B, 3, S, S) and tokens (B, T) -> h^img (B, D), h^txt (B, D), 1/temperature (scalar)."""
        image = self.image_projection(self.vision(pixels))
        text = self.text_projection(self.text(tokens))
        return image, text, self.log_scale.exp()

    def clamp(self) -> None:
        """Keep 1/temperature at most 100. Call after each step: clamped in `forward` it would lose its gradient there."""
        with torch.no_grad():
            self.log_scale.clamp_(max=_MAX_LOG_SCALE)
