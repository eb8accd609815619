"""C-SFT (paper Section 3.3): fine-tune the encoder on interest pairs, on P Ray Train workers.

What it leaves: encoder/, and in its metrics the loss curves, temperatures, number of negatives, held-out retrieval before
and after, how far past embeddings had drifted, and the share of time that the steps waited for data.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import datetime
from typing import Any

import numpy as np
import torch
from torch import nn

from mim_ray import artifacts
from mim_ray.config import Scenario
from mim_ray.config.scenario import Csft
from mim_ray.csft.dataset import PAIR_COLUMNS, ItemLoader, PairBatch, PairBatches, PairSource, Position
from mim_ray.csft.negatives import HardNegativeSampler, PastBatches
from mim_ray.csft.objective import LEVELS, CsftLoss, CsftObjective, LocalBatch
from mim_ray.csft.purchases import Purchases
from mim_ray.csft.retrieval import ages, choose_gallery, embed_items, mean_drift, measure
from mim_ray.csft.supervision import pair_signal
from mim_ray.data.batches import RowBatches, num_rows
from mim_ray.data.catalogue import Catalogue
from mim_ray.data.ids import hash_ids
from mim_ray.encoders import ItemEncoder
from mim_ray.errors import DataError
from mim_ray.runtime.progress import Progress
from mim_ray.runtime.summary import StageResult
from mim_ray.training import checkpoint
from mim_ray.training.optim import average_gradients, check_finite, parameter_groups, warmup_cosine
from mim_ray.training.run import rank, report, run_workers, worker_device, world_size

_CURVE_POINTS = 200
_MAX_GRADIENT_NORM = 1.0
_DRIFT_ITEMS = 64


def run(scenario: Scenario, *, samples: str, encoder: str, output: str) -> StageResult:
    """Fine-tune the encoder at `encoder` on the pairs of `samples`; leaves output/encoder. Ray must be initialised.

    An interrupted run goes on from output/train when it is called again.

    Raises:
        DataError: there are no interest pairs. ArtifactError: the encoder is missing or of another architecture.
    """
    ItemEncoder.load(encoder, scenario.encoders)  # a wrong one is refused here, before workers start
    catalogue = Catalogue.open(f"{samples}/catalogue")
    pairs = f"{samples}/interest_pairs"
    num_pairs = num_rows(pairs) if artifacts.list_files(pairs, ".parquet") else 0
    if not num_pairs:
        raise DataError(
            f"There are no interest pairs in {pairs}. C-SFT learns from them: add image searches or consecutive positives "
            "to the interactions (samples.pair_events, samples.pair_window_days), or an own interest_pairs table."
        )
    Purchases.of_pairs(pairs, catalogue).save(f"{output}/train/purchases")
    config = {
        "scenario": scenario.model_dump(mode="json"),
        "samples": samples,
        "encoder": encoder,
        "output": output,
        "num_pairs": num_pairs,
    }
    metrics = run_workers(train_loop, config, workers=scenario.csft, name="csft", storage=f"{output}/train")
    artifacts.remove(f"{output}/train")
    return StageResult(metrics=metrics, rows=_summary(metrics), rejects=metrics["rejected"])


def train_loop(config: dict[str, Any]) -> None:
    """What each worker does; rank 0 saves the encoder and reports."""
    trainer = Trainer(config)
    trainer.resume()
    report(trainer.train())


class Trainer:
    """One worker's part of the training."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.scenario = Scenario.model_validate(config["scenario"])
        self.settings: Csft = self.scenario.csft
        self.output, samples = config["output"], config["samples"]
        torch.manual_seed(self.scenario.run.seed * 1_000 + rank())
        self.device = worker_device(self.settings.use_gpu)
        self.encoder = ItemEncoder.load(config["encoder"], self.scenario.encoders).to(self.device)
        self.objective = CsftObjective(
            temperature=self.settings.temperature,
            learn=self.settings.learn_temperature,
            text_loss_weight=self.settings.text_loss_weight,
            image_loss_weight=self.settings.image_loss_weight,
        ).to(self.device)
        self.optimizer = torch.optim.AdamW(_groups(self.encoder, self.objective, self.settings))
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.past = PastBatches(self.settings.num_past_batches)
        self.catalogue = Catalogue.open(f"{samples}/catalogue")
        self.loader = ItemLoader(self.catalogue, self.encoder, self.scenario.data)
        signal = pair_signal(self.settings.supervision)
        self.source = PairSource(self.loader, signal=signal, held_out_ratio=self.settings.held_out_ratio)
        pairs = f"{samples}/interest_pairs"
        self.held_out = self.source.held_out(pairs, self.settings.max_held_out)
        self.source.rejected.clear()
        self.eligible = _eligible(self.catalogue, samples)
        self.batch_size = max(2, min(self.settings.batch_size, config["num_pairs"] // (2 * world_size())))
        seed = self.scenario.run.seed
        self.batches = PairBatches(
            self.source,
            RowBatches(pairs, PAIR_COLUMNS, self.batch_size, seed, rank(), world_size()),
            Purchases.open(f"{self.output}/train/purchases"),
            self._hard_negatives() if self.settings.hard_negatives else None,
            batch_size=self.batch_size,
            modality_dropout=self.settings.modality_dropout,
            seed=seed,
            rank=rank(),
        )
        self.step, self.position = 0, Position()
        self.curve: list[list[float]] = []
        self.before: dict[str, Any] | None = None
        self.num_negatives = self.num_other_category = 0.0

    def train(self) -> dict[str, Any]:
        """All steps that are left; returns the metrics of the run."""
        settings = self.settings
        if self.before is None:
            self.before = self._measure()
        self.encoder.train()
        _freeze_batch_norm(self.encoder)
        progress = Progress("C-SFT", settings.steps - self.step, "steps") if rank() == 0 else None
        start, waited = time.perf_counter(), 0.0
        batches = self.batches.steps(settings.steps, self.step, self.position)
        while self.step < settings.steps:
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            losses = self._step(batch)
            if progress is not None:
                progress.add(1, f"loss {losses[0]:.3f}")
            if self.step % settings.checkpoint_every_steps == 0 and self.step < settings.steps:
                self._save_checkpoint()
        seconds = time.perf_counter() - start
        self.encoder.eval()
        metrics = self._metrics(seconds, waited)
        if rank() == 0:
            metrics["encoder_version"] = self.encoder.save(f"{self.output}/encoder", stage="csft")
        return metrics

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        found = checkpoint.load(self._checkpoints)
        if found is None:
            return
        self.encoder.load_state_dict(checkpoint.under_prefix("encoder", found.shared))
        self.objective.load_state_dict(checkpoint.under_prefix("objective", found.shared))
        checkpoint.load_optimizer_state(self.optimizer, checkpoint.under_prefix("optimizer", found.shared))
        self.past.load_state(checkpoint.under_prefix("past", found.shared))
        self.step, self.position = found.step, Position(**found.values["position"])
        self.curve, self.before = found.values["curve"], found.values["before"]
        self.num_other_category = found.values["num_other_category"]

    def _step(self, batch: PairBatch) -> list[float]:
        """One optimizer step; returns total and level losses over all workers."""
        settings = self.settings
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * warmup_cosine(self.step, settings.steps, settings.warmup_ratio)
        past = self.past if self.step >= settings.past_warmup_steps else None
        result = self.objective(embed_batch(self.encoder, batch, settings.mask_user_items), past)
        check_finite(result.loss, self.step, "C-SFT loss")
        self.optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        average_gradients(trained)
        nn.utils.clip_grad_norm_(trained, _MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.objective.clamp()
        if result.fresh is not None and self.step >= settings.past_warmup_steps - settings.num_past_batches:
            self.past.push(result.fresh)  # ready when they join
        losses = self._losses(result)
        if self.step % max(1, settings.steps // _CURVE_POINTS) == 0 or self.step == settings.steps - 1:
            self.curve.append([self.step, *losses])
        self.step, self.position = self.step + 1, batch.next
        self.num_negatives, self.num_other_category = (
            result.num_negatives,
            (self.num_other_category + batch.num_other_category),
        )
        return losses

    def _losses(self, result: CsftLoss) -> list[float]:
        levels = result.level_losses.tolist()
        weights = [self.objective.weights[level] for level in LEVELS]
        return [sum(w * loss for w, loss in zip(weights, levels, strict=True)), *levels]

    def _measure(self) -> dict[str, Any] | None:
        if self.held_out is None:
            return None
        gallery = choose_gallery(self.eligible, self.held_out.items, self.settings.max_gallery, self.scenario.run.seed)
        return {
            "num_queries": len(self.held_out),
            "num_items": len(gallery),
            "levels": measure(self.encoder, self.loader, self.held_out, gallery),
        }

    def _metrics(self, seconds: float, waited: float) -> dict[str, Any]:
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
            "num_other_category": int(self.num_other_category),
            "retrieval": {"before": self.before, "after": self._measure()},
            "past_cosine_by_age": self._drift(),
            "rejected": dict(self.source.rejected),
        }

    @torch.no_grad()
    def _drift(self) -> dict[str, float]:
        """Cosine of past MM embeddings to the encoder's present ones, by age in steps. Items seen whole both times."""
        drift = {}
        for age in ages(len(self.past)):
            batch = self.past.batch_of_age(age)
            assert batch is not None
            rows = batch.items[:_DRIFT_ITEMS].cpu().numpy()
            items = self.loader.items(rows)
            same = (items.has_image == batch.has_image[:_DRIFT_ITEMS].cpu()) & (
                items.has_text == batch.has_text[:_DRIFT_ITEMS].cpu()
            )
            now = embed_items(self.encoder, items)[same, 0]
            drift[str(age)] = round(mean_drift(batch.embeddings[:_DRIFT_ITEMS][same, 0], now), 5)
        return drift

    def _hard_negatives(self) -> HardNegativeSampler:
        contents = hash_ids(self.catalogue.take(np.arange(self.catalogue.num_items), ["content_hash"]).column(0))
        eligible = np.zeros(self.catalogue.num_items, bool)
        eligible[self.eligible] = True
        return HardNegativeSampler(self.catalogue.category_codes[0], contents.view(np.int64), eligible)

    @property
    def _checkpoints(self) -> str:
        return f"{self.output}/train/checkpoints"

    def _save_checkpoint(self) -> None:
        shared = (
            checkpoint.with_prefix("encoder", self.encoder.state_dict())
            | checkpoint.with_prefix("objective", self.objective.state_dict())
            | checkpoint.with_prefix("optimizer", checkpoint.optimizer_state(self.optimizer))
            | checkpoint.with_prefix("past", self.past.state())
        )
        values = {
            "position": asdict(self.position),
            "curve": self.curve,
            "before": self.before,
            "num_other_category": self.num_other_category,
        }
        checkpoint.save(self._checkpoints, self.step, shared if rank() == 0 else {}, {}, values)


def embed_batch(encoder: ItemEncoder, batch: PairBatch, mask_user_items: bool) -> LocalBatch:
    """Eqs. 2-4 for queries and items; their pictures pass F_V together."""
    device = encoder.image_projection.weight.device
    items = batch.items
    num_queries = len(batch.query_pixels)
    has_image, has_text = items.has_image.to(device), items.has_text.to(device)
    image = encoder.encode_image(torch.cat([batch.query_pixels, items.pixels]).to(device))
    queries, image = image[:num_queries], image[num_queries:]
    image = torch.where(has_image.unsqueeze(1), image, torch.zeros_like(image))
    text = encoder.encode_text({key: value.to(device) for key, value in items.tokens.items()})
    text = torch.where(has_text.unsqueeze(1), text, torch.zeros_like(text))
    bought = (batch.bought[0].to(device), batch.bought[1].to(device))
    return LocalBatch(
        queries=queries,
        items=torch.stack([encoder.fuse(image, text), text, image], dim=1),
        has_text=has_text,
        has_image=has_image,
        item_rows=items.rows.to(device),
        contents=items.contents.to(device),
        bought=bought if mask_user_items else None,
    )


def _groups(encoder: ItemEncoder, objective: CsftObjective, settings: Csft) -> list[dict[str, Any]]:
    return [
        *parameter_groups(encoder.tower_parameters(), settings.tower_learning_rate, settings.weight_decay),
        *parameter_groups(encoder.head_parameters(), settings.learning_rate, settings.weight_decay),
        *parameter_groups(objective, settings.learning_rate, 0.0),
    ]


def _eligible(catalogue: Catalogue, samples: str) -> np.ndarray:
    """Rows of items with content that existed before the validation of the CTR models starts."""
    start = artifacts.read_json(f"{samples}/samples.json")["validation_start"]
    before_us = start if isinstance(start, int) else int(datetime.fromisoformat(start).timestamp() * 1_000_000)
    has_content = catalogue.has_image | catalogue.has_title
    return np.flatnonzero(has_content & (catalogue.created_at < before_us))


def _freeze_batch_norm(module: nn.Module) -> None:
    """BatchNorm keeps the statistics of pre-training: a worker's own batch would make its loss differ from the joined one's."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()


def _summary(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("steps", f"{metrics['steps']:,} of {metrics['num_workers']} x {metrics['batch_size']} pairs"),
        ("loss", f"{metrics['curve'][0][1]:.3f} at first, {metrics['curve'][-1][1]:.3f} at last"),
        ("negatives per query", f"{metrics['num_negatives']:,.1f}"),
        ("hard negatives of another category", f"{metrics['num_other_category']:,}"),
        ("temperatures", ", ".join(f"{level} {value:.4f}" for level, value in metrics["temperatures"].items())),
        ("waited for data", f"{metrics['waiting_ratio']:.1%} of the time"),
        ("encoder", metrics["encoder_version"]),
    ]
    before, after = metrics["retrieval"]["before"], metrics["retrieval"]["after"]
    if after is None:
        return [*rows, ("held-out retrieval", "no held-out pairs")]
    for level in LEVELS:
        texts = [
            f"{old:.3f} -> {new:.3f}" if (old := before["levels"][level][key]) is not None
            and (new := after["levels"][level][key]) is not None else "-"
            for key in ("recall@10", "mrr")
        ]  # fmt: skip
        rows.append((f"query to {level}", f"recall@10 {texts[0]}, MRR {texts[1]} among {after['num_items']:,} items"))
    return rows
