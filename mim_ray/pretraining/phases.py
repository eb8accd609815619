"""The three phases of pre-training: DDA on images, DDA on titles, DMA on pairs. Each measures itself on held-out items
before and after. They run inside a process group or without one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mim_ray.config.scenario import Pretraining
from mim_ray.contrastive.gather import gather
from mim_ray.contrastive.symmetric import symmetric_info_nce
from mim_ray.encoders import ItemEncoder, tuning
from mim_ray.encoders.text import Tokens
from mim_ray.pretraining.dataset import (
    PHASES,
    Batch,
    BatchSource,
    Content,
    PhaseName,
    Share,
    content_keys,
    titles_in,
    titles_of,
)
from mim_ray.pretraining.equal_content import chance_loss, equal_content_pairs
from mim_ray.pretraining.fit import fit
from mim_ray.pretraining.measures import SharedMean, alignment_recalls, own_batches, shared_rows
from mim_ray.pretraining.objective import (
    NOT_ASKED,
    ImageTextAligner,
    MaskedImageModel,
    MaskedLanguageModel,
    NextTokenModel,
    draw_image_mask,
    mask_tokens,
    next_tokens,
)
from mim_ray.training.optim import parameter_groups

_EVALUATION_DRAWS = 4  # masks per held-out item


class Context:
    """What every phase needs: the encoder, trained in place; this worker's share of the data; the settings."""

    def __init__(
        self,
        encoder: ItemEncoder,
        content: Content,
        settings: Pretraining,
        share: Share,
        device: torch.device,
        decoder_cpus: float = 0.0,
    ) -> None:
        self.encoder, self.content, self.settings, self.share, self.device = encoder, content, settings, share, device
        self.decoder_cpus = decoder_cpus
        self.pictures = content.pictures()
        self.catalogue, self.items = self.pictures.catalogue, content.items()

    def source(self, phase: PhaseName) -> BatchSource:
        return BatchSource(self.content, phase, self.share)

    def tokens(self, titles: list[str]) -> dict[str, Tensor]:
        return self.on_device(self.encoder.text.tokenize(titles))

    def on_device(self, tensors: Tokens) -> dict[str, Tensor]:
        return {key: value.to(self.device) for key, value in tensors.items()}


@dataclass(frozen=True)
class Finished:
    """What `pretrain` tells after each phase.

    Attributes:
        metrics: by phase, of all that are finished. broken: rows that this worker could not decode in the last one.
    """

    phase: PhaseName
    metrics: dict[str, dict[str, Any]]
    broken: list[int]


def pretrain(
    context: Context,
    done: dict[str, Any] | None = None,
    after_phase: Callable[[Finished], None] = lambda finished: None,
    checkpoints: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Run the phases; a phase without steps or without items is left out.

    Args:
        done: metrics by phase of those that an interrupted attempt finished, with the encoder as they left it.
        after_phase: called on every worker.
        checkpoints: folder for what an interrupted phase goes on from.

    Returns:
        Metrics by phase: what `fit` returns, seconds, and the phase's own.
    """
    metrics: dict[str, dict[str, Any]] = dict(done or {})
    for number, name in enumerate(PHASES):
        if name in metrics:
            continue
        start = time.monotonic()
        torch.manual_seed(context.share.seed * 1_000 + number)  # equal heads on all ranks
        tuning.prepare(context.encoder, context.settings, context.share.seed)
        phase = _phase(name, context)
        if phase is None:
            tuning.merge(context.encoder)
            continue
        folder = None if checkpoints is None else f"{checkpoints}/{name}"
        result = fit(
            phase,
            context.settings,
            seed=context.share.seed,
            checkpoints=folder,
            decoder_cpus=context.decoder_cpus,
        )
        tuning.merge(context.encoder)
        metrics[name] = result | phase.extra() | {"seconds": round(time.monotonic() - start, 2)}
        after_phase(Finished(name, metrics, sorted(phase.broken)))
    context.encoder.eval()
    return metrics


def _phase(name: PhaseName, context: Context) -> MaskedImages | Titles | Alignment | None:
    """The phase, or None where there is nothing to do: no steps, no items, a frozen tower, no [MASK] to hide words behind."""
    settings, items, text = context.settings, context.items, context.encoder.text
    if not len(items.trained(name)):
        return None
    if name == "image":
        return MaskedImages(context) if settings.vision_dda_steps and not context.encoder.vision.frozen else None
    if name == "text":
        possible = text.causal or text.special.mask is not None
        return Titles(context) if settings.text_dda_steps and possible and not text.frozen else None
    return Alignment(context) if settings.dma_steps else None


class MaskedImages:
    """DDA of F_V: masked image modelling. Held-out measure: mean absolute error of hidden pixels (`reconstruction`), in
    units of the model's normalisation.
    """

    name: PhaseName = "image"
    frozen_statistics = False

    def __init__(self, context: Context) -> None:
        self.context, self.num_steps = context, context.settings.vision_dda_steps
        self.module = MaskedImageModel(context.encoder.vision).to(context.device)
        self.source, self.broken = context.source("image"), set[int]()

    def groups(self) -> list[dict[str, Any]]:
        settings = self.context.settings
        return tuning.depth_groups(
            self.module, settings.vision_dda_learning_rate, settings.weight_decay, settings.layer_decay
        )

    def loss(self, batch: Batch) -> tuple[Tensor, float]:
        return self._masked(torch.tensor(batch["pixels"]), None), 0.0

    def after_step(self) -> None:
        pass

    def measure(self) -> dict[str, Any]:
        mean = SharedMean(self.context.device)
        for number, rows in own_batches(self.context.items.held_out_image):
            pixels, fine = self.context.pictures.take(rows)
            self.broken.update(rows[~fine].tolist())
            if not fine.any():
                continue
            generator = torch.Generator().manual_seed(self.context.share.seed * 1_000 + number)
            for _ in range(_EVALUATION_DRAWS):
                mean.add(self._masked(torch.from_numpy(pixels[fine]), generator), int(fine.sum()))
        value = mean.value()
        return {} if value is None else {"reconstruction": value}

    def extra(self) -> dict[str, Any]:
        return {}

    def _masked(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        mask = draw_image_mask(len(pixels), self.module.side, self.context.settings.image_mask_ratio, generator)
        loss: Tensor = self.module(pixels.to(self.context.device), mask.to(self.context.device))
        return loss


class Titles:
    """DDA of F_L: masked words for towers that read both ways, the next word for those that read from left to right.
    Held-out measure: cross-entropy per asked token (`loss`) and its exponential (`perplexity`).
    """

    name: PhaseName = "text"
    frozen_statistics = False

    def __init__(self, context: Context) -> None:
        self.context, self.num_steps = context, context.settings.text_dda_steps
        text = context.encoder.text
        self.module = (NextTokenModel(text) if text.causal else MaskedLanguageModel(text)).to(context.device)
        self.source, self.broken = context.source("text"), set[int]()
        self._vocabulary = text.tokenizer.get_vocab_size()

    def groups(self) -> list[dict[str, Any]]:
        settings = self.context.settings
        return tuning.depth_groups(
            self.module, settings.text_dda_learning_rate, settings.weight_decay, settings.layer_decay
        )

    def loss(self, batch: Batch) -> tuple[Tensor, float]:
        return self.module(*self._asked(titles_in(batch), None)), 0.0

    def after_step(self) -> None:
        pass

    def measure(self) -> dict[str, Any]:
        mean = SharedMean(self.context.device)
        for number, rows in own_batches(self.context.items.held_out_title):
            titles = titles_of(self.context.catalogue, rows)
            generator = torch.Generator().manual_seed(self.context.share.seed * 1_000 + number)
            for _ in range(1 if self.context.encoder.text.causal else _EVALUATION_DRAWS):
                tokens, labels = self._asked(titles, generator)
                mean.add(self.module(tokens, labels), int((labels != NOT_ASKED).sum()))
        loss = mean.value()
        return {} if loss is None else {"loss": loss, "perplexity": round(math.exp(min(loss, 50.0)), 3)}

    def extra(self) -> dict[str, Any]:
        return {"asked": "next words" if self.context.encoder.text.causal else "hidden words"}

    def _asked(self, titles: list[str], generator: torch.Generator | None) -> tuple[dict[str, Tensor], Tensor]:
        text = self.context.encoder.text
        tokens = text.tokenize(titles)
        if text.causal:
            return self.context.on_device(tokens), next_tokens(tokens).to(self.context.device)
        ratio = self.context.settings.text_mask_ratio
        tokens, labels = mask_tokens(tokens, text.special, self._vocabulary, ratio, generator)
        return self.context.on_device(tokens), labels.to(self.context.device)


class Alignment:
    """DMA: symmetric contrast of images and titles over all workers; items of equal title or picture are no negatives of
    each other. Held-out measure: recall@{1, 10} from images to titles and back.
    """

    name: PhaseName = "alignment"
    frozen_statistics = True

    def __init__(self, context: Context) -> None:
        self.context, self.num_steps = context, context.settings.dma_steps
        self.module = ImageTextAligner(context.encoder, context.settings.temperature).to(context.device)
        self.source, self.broken = context.source("alignment"), set[int]()

    def groups(self) -> list[dict[str, Any]]:
        settings, encoder = self.context.settings, self.context.encoder
        towers = nn.ModuleList([encoder.vision, encoder.text])
        heads = [*encoder.image_projection.parameters(), *encoder.text_projection.parameters(), self.module.log_scale]
        return [
            *tuning.depth_groups(towers, settings.dma_tower_learning_rate, settings.weight_decay, settings.layer_decay),
            *parameter_groups(heads, settings.dma_learning_rate, settings.weight_decay),
        ]

    def loss(self, batch: Batch) -> tuple[Tensor, float]:
        tokens = self.context.tokens(titles_in(batch))
        image, text, scale = self.module(torch.tensor(batch["pixels"]).to(self.context.device), tokens)
        keys = torch.tensor(batch["keys"]).to(self.context.device)
        all_keys = gather(keys)
        pairs = equal_content_pairs(keys, all_keys)
        return symmetric_info_nce(image, text, scale, mask=pairs), chance_loss(pairs, len(keys), len(all_keys))

    def after_step(self) -> None:
        self.module.clamp()

    def measure(self) -> dict[str, Any]:
        """Broken pictures take no part."""
        held_out = self.context.items.held_out_both
        if not len(held_out):
            return {}
        rows = shared_rows(len(held_out), lambda numbers: self._embedded(held_out[numbers]))
        fine = rows[:, -1] == 1
        image, text = rows[fine, :-1].chunk(2, dim=1)
        keys = torch.from_numpy(content_keys(self.context.catalogue, held_out)).to(fine.device)[fine]
        return alignment_recalls(image, text, keys) if len(image) else {}

    def extra(self) -> dict[str, Any]:
        return {"temperature": round(float(torch.exp(-self.module.log_scale.detach())), 5)}

    def _embedded(self, rows: np.ndarray) -> Tensor:
        """(n, 2 D + 1): h^img, h^txt, and 1 where the picture could be decoded."""
        pixels, fine = self.context.pictures.take(rows)
        self.broken.update(rows[~fine].tolist())
        tokens = self.context.tokens(titles_of(self.context.catalogue, rows))
        image, text, _ = self.module(torch.from_numpy(pixels).to(self.context.device), tokens)
        return torch.cat([image.float(), text.float(), torch.from_numpy(fine).to(image)[:, None]], dim=1)
