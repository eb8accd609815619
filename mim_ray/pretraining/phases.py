"""The three phases of pre-training as plain loops: DDA on images, DDA on titles, DMA on pairs. Each measures itself on
held-out items before and after. They run inside a process group or without one; no Ray here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mim_ray.config.scenario import Pretraining
from mim_ray.contrastive.info_nce import symmetric_info_nce
from mim_ray.encoders import ItemEncoder
from mim_ray.pretraining.dataset import Items, PretrainingData
from mim_ray.pretraining.objective import (
    NOT_ASKED,
    ImageTextAligner,
    MaskedImageModel,
    MaskedLanguageModel,
    alignment_recall,
    draw_image_mask,
    mask_tokens,
)
from mim_ray.runtime.progress import Progress
from mim_ray.training.optim import average_gradients, check_finite, parameter_groups, warmup_cosine

PHASES = ("image", "text", "alignment")
RECALL_AT = 10
_EVALUATION_BATCH = 256
_EVALUATION_DRAWS = 4  # masks per held-out item
_CURVE_POINTS = 100


@dataclass(frozen=True)
class Context:
    """What every phase needs.

    Attributes:
        encoder: trained in place. device: where it is.
        rank: this worker's place; masks and dropout differ between ranks.
    """

    encoder: ItemEncoder
    data: PretrainingData
    items: Items
    settings: Pretraining
    seed: int
    rank: int
    device: torch.device


def pretrain(
    context: Context,
    done: dict[str, Any] | None = None,
    after_phase: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> dict[str, dict[str, Any]]:
    """Run the phases; a phase without steps or without items is left out.

    Args:
        done: metrics by phase of those that an interrupted attempt finished, with the encoder as they left it.
        after_phase: called on every rank with the metrics by phase so far.

    Returns:
        Metrics by phase: the loss curve as [step, loss] of this rank, the held-out measures before and after, seconds.
    """
    metrics: dict[str, dict[str, Any]] = dict(done or {})
    phases = {"image": mask_images, "text": mask_titles, "alignment": align}
    for number, name in enumerate(PHASES):
        if name in metrics:
            continue
        start = time.monotonic()
        torch.manual_seed(context.seed * 1_000 + number)  # equal heads on all ranks
        result = phases[name](context)
        if result is not None:
            metrics[name] = result | {"seconds": round(time.monotonic() - start, 2)}
            after_phase(metrics)
    context.encoder.eval()
    return metrics


def mask_images(context: Context) -> dict[str, Any] | None:
    """DDA of F_V: masked image modelling. Held-out measure: mean absolute error of hidden pixels, in units of the model's
    normalisation.
    """
    rows, num_steps = context.items.with_image, context.settings.vision_dda_steps
    if not num_steps or not len(rows):
        return None
    module = MaskedImageModel(context.encoder.vision).to(context.device)
    ratio = context.settings.image_mask_ratio

    def losses() -> Iterator[Tensor]:
        generator = _generator(context, "image")
        for pixels in context.data.images(rows, num_steps):
            mask = draw_image_mask(len(pixels), module.side, ratio, generator)
            yield module(pixels.to(context.device), mask.to(context.device))

    def measure() -> dict[str, float]:
        generator = torch.Generator().manual_seed(context.seed)
        total = _Mean()
        for batch in _evaluation_batches(context.items.held_out_image):
            pixels = torch.from_numpy(context.data.pictures.take(batch)[0]).to(context.device)
            for _ in range(_EVALUATION_DRAWS):
                mask = draw_image_mask(len(pixels), module.side, ratio, generator).to(context.device)
                total.add(float(module(pixels, mask)), len(pixels))
        return {"reconstruction": total.value()}

    return _phase(context, "image", module, losses(), measure, num_steps)


def mask_titles(context: Context) -> dict[str, Any] | None:
    """DDA of F_L: masked language modelling. Held-out measure: cross-entropy per asked token, and its perplexity."""
    rows, num_steps = context.items.with_title, context.settings.text_dda_steps
    text = context.encoder.text
    if not num_steps or not len(rows) or text.special.mask is None:
        return None
    module = MaskedLanguageModel(text).to(context.device)
    vocabulary, ratio = text.tokenizer.get_vocab_size(), context.settings.text_mask_ratio

    def asked(titles: list[str], generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        tokens, labels = mask_tokens(text.tokenize(titles), text.special, vocabulary, ratio, generator)
        return {key: value.to(context.device) for key, value in tokens.items()}, labels.to(context.device)

    def losses() -> Iterator[Tensor]:
        generator = _generator(context, "text")
        for titles in context.data.titles(rows, num_steps):
            yield module(*asked(titles, generator))

    def measure() -> dict[str, float]:
        generator = torch.Generator().manual_seed(context.seed)
        total = _Mean()
        for batch in _evaluation_batches(context.items.held_out_title):
            titles = context.data.titles_of(batch)
            for _ in range(_EVALUATION_DRAWS):
                tokens, labels = asked(titles, generator)
                total.add(float(module(tokens, labels)), int((labels != NOT_ASKED).sum()))
        loss = total.value()
        return {"loss": loss, "perplexity": round(math.exp(min(loss, 50.0)), 3)}

    return _phase(context, "text", module, losses(), measure, num_steps)


def align(context: Context) -> dict[str, Any] | None:
    """DMA: symmetric contrast of images and titles over all workers. Held-out measure: image to title recall@10."""
    rows, num_steps = context.items.with_both, context.settings.dma_steps
    if not num_steps or not len(rows):
        return None
    encoder = context.encoder
    module = ImageTextAligner(encoder, context.settings.temperature).to(context.device)

    def embed(pixels: Tensor, titles: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        tokens = {key: value.to(context.device) for key, value in encoder.text.tokenize(titles).items()}
        return module(pixels.to(context.device), tokens)

    def losses() -> Iterator[Tensor]:
        for pixels, titles in context.data.pairs(rows, num_steps):
            yield symmetric_info_nce(*embed(pixels, titles))

    def measure() -> dict[str, float]:
        pairs = [embed(*context.data.pair(batch))[:2] for batch in _evaluation_batches(context.items.held_out_both)]
        if not pairs:
            return {}
        image, text = (torch.cat(side) for side in zip(*pairs, strict=True))
        recall = alignment_recall(image, text, RECALL_AT)
        return {f"recall_at_{RECALL_AT}": round(recall, 5), "chance": round(min(1.0, RECALL_AT / len(image)), 5)}

    result = _phase(context, "alignment", module, losses(), measure, num_steps)
    return result | {"temperature": round(float(torch.exp(-module.log_scale.detach())), 5)}


def _phase(
    context: Context,
    name: str,
    module: nn.Module,
    losses: Iterable[Tensor],
    measure: Callable[[], dict[str, float]],
    num_steps: int,
) -> dict[str, Any]:
    def measured() -> dict[str, float]:
        module.eval()
        with torch.no_grad():
            return measure()

    before = measured()
    module.train()
    torch.manual_seed(context.seed * 1_000 + PHASES.index(name) * 100 + context.rank)  # dropout differs between ranks
    curve = _fit(module, losses, num_steps, context.settings, f"pre-training, {name}", show=context.rank == 0)
    return {"losses": curve, "before": before, "after": measured()}


def _fit(
    module: nn.Module,
    losses: Iterable[Tensor],
    num_steps: int,
    settings: Pretraining,
    label: str,
    show: bool,
) -> list[list[float]]:
    """Minimise what `losses` yields, one loss per step, over all workers; returns the curve as [step, loss]."""
    optimizer = torch.optim.AdamW(parameter_groups(module, settings.learning_rate, settings.weight_decay))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, num_steps, settings.warmup_ratio)
    )
    curve: list[list[float]] = []
    every = max(1, num_steps // _CURVE_POINTS)
    progress = Progress(label, num_steps, "steps") if show else None
    for step, loss in enumerate(losses):
        check_finite(loss.detach(), step, f"loss of {label}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(module.parameters())
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == num_steps - 1:
            curve.append([step, round(float(loss.detach()), 5)])
        if progress is not None:
            progress.add(1, f"loss {curve[-1][1]:.3f}")
    return curve


class _Mean:
    """A weighted mean of batch means."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, mean: float, weight: int) -> None:
        self._sum += mean * weight
        self._weight += weight

    def value(self) -> float:
        return round(self._sum / max(self._weight, 1.0), 5)


def _generator(context: Context, phase: str) -> torch.Generator:
    """Random numbers for the masks of one phase and rank."""
    return torch.Generator().manual_seed(context.seed * 1_000 + PHASES.index(phase) * 100 + context.rank)


def _evaluation_batches(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + _EVALUATION_BATCH] for start in range(0, len(rows), _EVALUATION_BATCH)]
