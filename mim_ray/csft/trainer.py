"""One worker's part of C-SFT: batches, steps, checkpoints, measures. Plain PyTorch inside a process group, or alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

from mim_ray import artifacts
from mim_ray.config import Scenario
from mim_ray.config.scenario import Csft
from mim_ray.contrastive.gather import total
from mim_ray.csft.cached import cached_backward, joined
from mim_ray.csft.chunks import PairChunks, PairReader
from mim_ray.csft.dataset import PairBatch, PairBatches, Position
from mim_ray.csft.embedding import embed_batch
from mim_ray.csft.hard_negatives import hard_negative_weights
from mim_ray.csft.items import GalleryChunks, ItemLoader, Items, eligible
from mim_ray.csft.momentum import MomentumEncoder, with_embeddings
from mim_ray.csft.negatives import PastBatches
from mim_ray.csft.objective import LEVELS, CsftLoss, LocalBatch, collapsed, spread
from mim_ray.csft.retrieval import HeldOut, drift_by_age, measure
from mim_ray.csft.sampling import log_q, sampling_rates
from mim_ray.csft.supervision import Objective, make_objective
from mim_ray.csft.training_pairs import open_counts
from mim_ray.data.catalogue import Catalogue
from mim_ray.data.feeding import ordered_chunks
from mim_ray.encoders import ItemEncoder, batch_norm
from mim_ray.encoders.tuning import depth_groups, merge, prepare
from mim_ray.runtime.progress import Progress
from mim_ray.training import checkpoint
from mim_ray.training.optim import average_gradients, check_finite, parameter_groups, warmup_cosine
from mim_ray.training.run import rank, worker_device, world_size

_CURVE_POINTS = 200
_DRIFT_POINTS = 10
_MAX_GRADIENT_NORM = 1.0


class Trainer:
    """Trains the encoder of `config` (csft/train.py `prepare`); every worker of the group makes one."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.scenario = Scenario.model_validate(config["scenario"])
        self.settings: Csft = self.scenario.csft
        self.samples, self.output = config["samples"], config["output"]
        self._decoder_cpus, self._before_us = config["decoder_cpus"], config["before_us"]
        torch.manual_seed(self.scenario.run.seed * 1_000 + rank())
        self.device = worker_device(self.settings.use_gpu)
        self.encoder = ItemEncoder.load(config["encoder"], self.scenario.encoders).to(self.device)
        prepare(self.encoder, self.settings, self.scenario.run.seed)
        self.catalogue = Catalogue.open(f"{self.samples}/catalogue")
        self.loader = ItemLoader(self.catalogue, self.encoder.picture, self.scenario.data)
        self.objective = self._objective().to(self.device)
        self.optimizer = torch.optim.AdamW(_groups(self.encoder, self.objective, self.settings))
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.past = PastBatches(self.settings.num_past_batches)
        momentum = self.settings.past_momentum
        self.slow = MomentumEncoder(self.encoder, momentum) if momentum and self._uses_past else None
        self.batch_size = max(2, min(self.settings.batch_size, config["num_pairs"] // (2 * world_size())))
        self.chunks = PairChunks(
            self.samples,
            f"{self.output}/train/user_items",
            f"{self.output}/train/pair_counts",
            self.settings,
            self.scenario.data,
            self.encoder.picture,
            self._before_us,
            self.scenario.run.seed,
            rank(),
            world_size(),
        )
        self.chunks_per_epoch = self.chunks.rows().steps_per_epoch
        self.held_out = self._held_out()
        self.step, self.position = 0, Position()
        self.curve: list[list[float]] = []
        self.drift: list[tuple[int, dict[str, float]]] = []
        self.before: dict[str, Any] | None = None
        self.rejects: dict[str, str] = {}
        self.num_negatives, self.num_other_category = 0.0, 0
        self.level_losses, self.spread = torch.zeros(len(LEVELS)), 1.0

    def train(self) -> dict[str, Any]:
        """All steps that are left; returns the metrics of the run."""
        settings = self.settings
        if self.before is None:
            self.before = self.measure()
        self.encoder.train()
        batch_norm.freeze(self.encoder)  # statistics of a worker's own batch would differ from the joined one's
        progress = Progress("C-SFT", settings.steps - self.step, "steps") if rank() == 0 else None
        start, waited = time.perf_counter(), 0.0
        batches = self._batches()
        while self.step < settings.steps:
            asked = time.perf_counter()
            batch = batches.next()
            waited += time.perf_counter() - asked
            losses = self._step(batch)
            self.position, self.rejects = batches.position, batches.rejects
            if progress is not None:
                progress.add(1, f"loss {losses[0]:.3f}, waiting {waited / (time.perf_counter() - start):.0%}")
            if len(self.past) and self.step % max(1, settings.steps // _DRIFT_POINTS) == 0:
                self.drift.append((self.step, drift_by_age(self.encoder, self.loader, self.past)))
            if self.step % settings.checkpoint_every_steps == 0 and self.step < settings.steps:
                self.num_other_category, batches.num_other_category = (
                    self.num_other_category + batches.num_other_category, 0,
                )  # fmt: skip
                self._save_checkpoint()
        seconds = time.perf_counter() - start
        self.num_other_category += batches.num_other_category
        self.encoder.eval()
        merge(self.encoder)
        artifacts.write_json(f"{self.output}/train/rejects/rank-{rank()}.json", self.rejects)
        metrics = self._metrics(seconds, waited)
        if rank() == 0:
            metrics["encoder_version"] = self.encoder.save(f"{self.output}/encoder", stage="csft")
        return metrics

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one; with another number of workers as nearly as that allows."""
        found = checkpoint.load(self._checkpoints)
        if found is None:
            return
        self.encoder.load_state_dict(checkpoint.under_prefix("encoder", found.shared))
        self.objective.load_state_dict(checkpoint.under_prefix("objective", found.shared))
        checkpoint.load_optimizer_state(self.optimizer, checkpoint.under_prefix("optimizer", found.shared))
        if self.slow is not None:
            self.slow.load_state(checkpoint.under_prefix("slow", found.shared))
        values = found.values
        self.step, self.curve, self.before = found.step, values["curve"], values["before"]
        self.drift = [(step, by_age) for step, by_age in values["drift"]]
        if found.num_workers == world_size():
            self.past.load_state(checkpoint.under_prefix("past", found.shared))
            self.position, self.rejects = Position(**values["position"]), values["rejects"]
            self.num_other_category = values["num_other_category"]
            return
        done = values["position"]["chunk"] / values["chunks_per_epoch"]  # epochs
        self.position = Position(round(done * self.chunks_per_epoch))
        if rank() == 0:
            print(
                f"C-SFT goes on at step {self.step} with {world_size()} workers; the checkpoint is of {found.num_workers}. "
                f"Weights, optimizer and schedule are the checkpoint's. What differs: a step has {world_size()} x "
                f"{self.batch_size} pairs, the rows go on after {done:.2f} epochs in another order, random draws are new, "
                "and past batches start empty.",
                flush=True,
            )

    def _objective(self) -> Objective:
        settings, categories = self.settings, self.catalogue.category_codes
        rates = None
        if settings.log_q:
            allowed = np.zeros(self.catalogue.num_items, bool)
            allowed[eligible(self.catalogue, self._before_us)] = True
            counts = open_counts(f"{self.output}/train/pair_counts")
            hard = settings.draws_hard_negatives
            weights = hard_negative_weights(counts, settings.hard_negative_power) if hard else None
            rates = log_q(sampling_rates(counts, categories[0], allowed, weights)).to(self.device)
        return make_objective(
            settings.supervision,
            temperature=settings.temperature,
            learn_temperature=settings.learn_temperature,
            text_loss_weight=settings.text_loss_weight,
            image_loss_weight=settings.image_loss_weight,
            multi_level=settings.multi_level,
            space_time_negatives=settings.space_time_negatives,
            log_q=rates,
            width=self.encoder.width,
            num_categories=len(categories[1]),
        )

    @property
    def _uses_past(self) -> bool:
        return bool(self.settings.num_past_batches) and self.settings.space_time_negatives

    def _batches(self) -> PairBatches:
        stream = ordered_chunks(
            self.chunks,
            self.position.chunk,
            None,
            num_decoders=self.settings.num_decoders,
            cpus_per_decoder=self._decoder_cpus,
        )
        batches = PairBatches(stream, self.position, self.batch_size, self.chunks_per_epoch)
        batches.rejects |= self.rejects
        return batches

    def _step(self, batch: PairBatch) -> list[float]:
        """One optimizer step; returns total and level losses over all workers."""
        settings = self.settings
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * warmup_cosine(self.step, settings.steps, settings.warmup_ratio)
        joins = self._uses_past and self.step >= settings.past_warmup_steps
        past = self.past if joins else None
        self.optimizer.zero_grad(set_to_none=True)
        chunk = settings.chunk_size
        if chunk is not None and chunk < len(batch):
            result = cached_backward(
                lambda rows: self._embed(self.encoder, batch[rows]), len(batch), chunk, self.objective, past
            )
            losses = self._losses(result)
        else:
            result = self.objective(self._embed(self.encoder, batch), past)
            losses = self._losses(result)
            result.loss.backward()
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        average_gradients(trained)
        nn.utils.clip_grad_norm_(trained, _MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.objective.clamp()
        if self.slow is not None:
            self.slow.update(self.encoder)
        if self._uses_past and self.step >= settings.past_warmup_steps - settings.num_past_batches:
            self._push(result, batch)  # from so early on that they are full when they join
        if self.step % max(1, settings.steps // _CURVE_POINTS) == 0 or self.step == settings.steps - 1:
            self.curve.append([self.step, *losses])
            if result.fresh is not None:
                self.spread = spread(result.fresh)
        self.step += 1
        self.num_negatives, self.level_losses = result.num_negatives, result.level_losses
        return losses

    def _losses(self, result: CsftLoss) -> list[float]:
        """Total and level losses of all workers.

        Raises:
            NonFiniteLossError: on all workers at once, before the optimizer moves.
        """
        levels = result.level_losses.tolist()
        weights = [self.objective.weights[level] for level in LEVELS]
        loss = check_finite(sum(w * loss for w, loss in zip(weights, levels, strict=True)), self.step, "C-SFT loss")
        return [loss, *levels]

    @torch.no_grad()
    def _push(self, result: CsftLoss, batch: PairBatch) -> None:
        if result.fresh is None:
            return
        fresh = result.fresh
        if self.slow is not None:
            size = self.settings.chunk_size or len(batch)
            parts = [
                self._embed(self.slow.encoder, batch[start : start + size]) for start in range(0, len(batch), size)
            ]
            fresh = with_embeddings(fresh, joined(parts).items)
        self.past.push(fresh)

    def _embed(self, encoder: ItemEncoder, batch: PairBatch) -> LocalBatch:
        category = self.catalogue.category_codes[0] if self.settings.supervision == "category" else None
        return embed_batch(encoder, batch, self.settings.mask_user_items, category)

    def _held_out(self) -> HeldOut | None:
        reader = PairReader(self.loader, self.settings)
        pairs = reader.held_out(f"{self.samples}/interest_pairs", self.settings.max_held_out)
        return HeldOut(pairs, self.loader.items(pairs.items)) if pairs is not None else None

    def measure(self) -> dict[str, Any] | None:
        """Held-out retrieval of the encoder as it is now; None without held-out pairs. A collective."""
        if self.held_out is None:
            return None
        settings = self.settings
        chunks = GalleryChunks(
            self.samples, self.encoder.picture, self.scenario.data, self._before_us, settings.max_gallery,
            self.scenario.run.seed, rank(), world_size(),
        )  # fmt: skip
        num_chunks = chunks.num_chunks(self.catalogue)
        progress = Progress("C-SFT, held-out retrieval", num_chunks, "chunks") if rank() == 0 else None

        def gallery() -> Iterator[Items]:
            stream = ordered_chunks(
                chunks, 0, num_chunks, num_decoders=settings.num_decoders, cpus_per_decoder=self._decoder_cpus
            )
            for chunk in stream:
                yield Items.of_chunk(chunk)
                if progress is not None:
                    progress.add(1)

        levels, num_items = measure(self.encoder, self.held_out, gallery())
        return {"num_queries": len(self.held_out.pairs), "num_items": num_items, "levels": levels}

    def _metrics(self, seconds: float, waited: float) -> dict[str, Any]:
        guessing = collapsed(self.level_losses, self.num_negatives + 1)
        return {
            "steps": self.settings.steps,
            "num_workers": world_size(),
            "batch_size": self.batch_size,
            "seconds": round(seconds, 2),
            "waiting_ratio": round(waited / max(seconds, 1e-9), 4),
            "curve_columns": ["step", "loss", *LEVELS],
            "curve": self.curve,
            "temperatures": self.objective.temperatures(),
            "num_negatives": self.num_negatives,
            "num_other_category": int(total(torch.tensor(self.num_other_category, device=self.device))),
            "spread": round(self.spread, 5),
            "collapsed": list(guessing) if self.settings.supervision in ("any", "click", "purchase") else [],
            "retrieval": {"before": self.before, "after": self.measure()},
            "drift": self.drift,
        }

    @property
    def _checkpoints(self) -> str:
        return f"{self.output}/train/checkpoints"

    def _save_checkpoint(self) -> None:
        shared = (
            checkpoint.with_prefix("encoder", self.encoder.state_dict())
            | checkpoint.with_prefix("objective", self.objective.state_dict())
            | checkpoint.with_prefix("optimizer", checkpoint.optimizer_state(self.optimizer))
            | checkpoint.with_prefix("past", self.past.state())
            | checkpoint.with_prefix("slow", self.slow.state() if self.slow is not None else {})
        )
        values = {
            "position": asdict(self.position),
            "chunks_per_epoch": self.chunks_per_epoch,
            "curve": self.curve,
            "drift": self.drift,
            "before": self.before,
            "rejects": self.rejects,
            "num_other_category": self.num_other_category,
        }
        checkpoint.save(self._checkpoints, self.step, shared if rank() == 0 else {}, {}, values)


def _groups(encoder: ItemEncoder, objective: nn.Module, settings: Csft) -> list[dict[str, Any]]:
    return [
        *depth_groups(
            nn.ModuleList([encoder.vision, encoder.text]),
            settings.tower_learning_rate,
            settings.weight_decay,
            settings.layer_decay,
        ),
        *parameter_groups(encoder.head_parameters(), settings.learning_rate, settings.weight_decay),
        *parameter_groups(objective, settings.learning_rate, 0.0),
    ]
