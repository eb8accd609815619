"""One worker's part of a CTR training: batches, steps, evaluations, checkpoints. Plain PyTorch inside a process group, or alone.

Batch s of a run is a function of (seed, s, rank, P) and every few hundred steps all state is kept, so that a run whose workers
were killed ends with the numbers of an undisturbed one. The best state on validation is kept beside the checkpoints, on disk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from mim_ray import artifacts
from mim_ray.ciubm.continuing import grown_state
from mim_ray.ciubm.dataset import ImpressionEncoder, IndexedBatch, count_input, gather_batch
from mim_ray.ciubm.model import CtrNetwork, NetworkConfig
from mim_ray.ciubm.tables import create_tables
from mim_ray.config.scenario import Ciubm
from mim_ray.data.batches import RowBatches, ordered_batches, prefetch
from mim_ray.evaluation.metrics import auc, log_loss
from mim_ray.runtime.progress import Progress
from mim_ray.training import checkpoint
from mim_ray.training.collect import joined, summed
from mim_ray.training.optim import average_gradients, check_finite, parameter_groups
from mim_ray.training.run import rank, worker_device, world_size

_CURVE_POINTS = 100


@dataclass
class Course:
    """How far a training has come; JSON-able, a part of each checkpoint.

    Attributes:
        loss: sum since the last point of the curve. curve: [step, mean loss of rank 0].
        evaluations: on validation, in order. best: place of the best one among them, None before the first.
        best_state: name of the file with its weights, None where they were not written.
        input: what this worker's rows of the first epoch hold (dataset.count_input).
    """

    step: int = 0
    loss: float = 0.0
    curve: list[list[float]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best: int | None = None
    best_state: str | None = None
    input: dict[str, int] = field(default_factory=dict)
    steps_per_epoch: int = 0


class Trainer:
    """Trains the network of `config` (ciubm/train.py) from one seed; every worker of the group makes one.

    Attributes:
        network, tables: as they are now; after `fit` the best ones.
    """

    def __init__(self, config: dict[str, Any], encoder: ImpressionEncoder, seed: int) -> None:
        self.settings = settings = Ciubm.model_validate(config["settings"])
        self.encoder, self.label = encoder, config["label"]
        self.device = worker_device(settings.use_gpu)
        self.seed = config["run_seed"] * 1_000 + seed
        self.folder = f"{config['output']}/train/seed-{seed}"
        self.validation = f"{config['samples']}/impressions/validation"
        self.batches = RowBatches(
            config["rows"],
            [*encoder.columns, "label"],
            settings.batch_size,
            self.seed,
            rank(),
            world_size(),
            prepare=encoder.coded,
        )
        self.total = self.batches.steps_per_epoch * settings.num_epochs
        torch.manual_seed(self.seed)
        self.network = CtrNetwork(NetworkConfig.from_json(config["network"])).to(self.device)
        self.network.start_at(config["positive_ratio"])
        self.num_rows = encoder.num_table_rows(with_user=settings.use_user_id)
        self.tables = create_tables(settings, self.num_rows, self.seed, self.device)
        groups = parameter_groups(self.network, settings.learning_rate, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.course = Course(steps_per_epoch=self.batches.steps_per_epoch)

    def fit(self) -> dict[str, Any]:
        """Train from here to the end; leaves the best state in `network` and `tables`. Collective.

        Returns:
            loss (curve), evaluations, validation_auc and validation_log_loss of the best, best_step, num_train_rows,
            input (counts of the first epoch), steps, planned_steps, and of this attempt rows_per_s and data_wait_ratio.
        """
        settings, course, first = self.settings, self.course, self.course.step
        batches = prefetch(self._encoded(self.batches.steps(self.total, first), first))
        start, waited = time.monotonic(), 0.0
        every = max(1, self.total // _CURVE_POINTS)
        progress = Progress(f"train {self.label}", self._rows(self.total - first)) if rank() == 0 else None
        while course.step < self.total and not self._out_of_patience():
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            if course.step < self.batches.steps_per_epoch:
                course.input = {name: course.input.get(name, 0) + more for name, more in count_input(batch).items()}
            course.loss += self._step(batch)
            course.step += 1
            if course.step % every == 0:
                course.curve.append([course.step, course.loss / every])
                course.loss = 0.0
            if progress is not None:
                progress.add(len(batch) * world_size())
            if self._is_evaluated():
                self._evaluate()
            if course.step % settings.checkpoint_every_steps == 0 and course.step < self.total:
                self._save()
        seconds = max(time.monotonic() - start, 1e-9)
        self._take_best()
        last = course.evaluations[-1 if course.best is None else course.best]
        return {
            "loss": course.curve,
            "evaluations": course.evaluations,
            "validation_auc": last["auc"],
            "validation_log_loss": last["log_loss"],
            "num_train_rows": self.batches.num_rows,
            "input": summed(course.input),
            "steps": course.step,
            "planned_steps": self.total,
            "best_step": None if course.best is None else last["step"],
            "rows_per_s": round(self._rows(course.step - first) / seconds),
            "data_wait_ratio": round(waited / seconds, 4),
        }

    def go_on(self, state: dict[str, Tensor]) -> None:
        """Begin with what `state` gave of an earlier training; the tables grow to this one's vocabularies."""
        self._load(grown_state(state, self.num_rows))

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one; with another number of workers as nearly as that allows."""
        found = checkpoint.load(f"{self.folder}/checkpoints")
        if found is None:
            return
        self._load(found.shared)
        self.course = course = Course(**found.values)
        if found.num_workers != world_size():
            epochs = course.step / course.steps_per_epoch
            course.step, course.steps_per_epoch = (
                round(epochs * self.batches.steps_per_epoch),
                self.batches.steps_per_epoch,
            )
        if rank() == 0:
            text = f"train {self.label}: goes on from step {course.step:,} of {self.total:,}"
            if found.num_workers != world_size():
                text += (
                    f" with {world_size()} workers; the checkpoint is of {found.num_workers}. A step has "
                    f"{world_size()} x {self.batches.batch_size} rows now, in another order"
                )
            print(text, flush=True)

    def state(self) -> dict[str, Tensor]:
        """Weights and optimizers. Collective: sharded tables come together."""
        return (
            checkpoint.with_prefix("network", self.network.state_dict())
            | checkpoint.with_prefix("optimizer", checkpoint.optimizer_state(self.optimizer))
            | checkpoint.with_prefix("tables", self.tables.state())
            | checkpoint.with_prefix("table_optimizer", self.tables.optimizer_state())
        )

    def _save(self) -> None:
        """A checkpoint. Best states that it does not name are deleted."""
        checkpoint.save(f"{self.folder}/checkpoints", self.course.step, self.state(), {}, asdict(self.course))
        if rank() == 0:
            for uri in artifacts.list_files(f"{self.folder}/best", ".safetensors"):
                if uri.rpartition("/")[2] != self.course.best_state:
                    artifacts.remove(uri)

    def _load(self, state: dict[str, Tensor]) -> None:
        self.network.load_state_dict(checkpoint.under_prefix("network", state))
        checkpoint.load_optimizer_state(self.optimizer, checkpoint.under_prefix("optimizer", state))
        self.tables.load_state(checkpoint.under_prefix("tables", state))
        self.tables.load_optimizer_state(checkpoint.under_prefix("table_optimizer", state))

    def _rows(self, steps: int) -> int:
        return steps * self.batches.batch_size * world_size()

    def _encoded(self, tables: Iterator[pa.Table], step: int) -> Iterator[IndexedBatch]:
        for number, table in enumerate(tables, start=step):
            generator = np.random.default_rng([self.seed, rank(), number])
            yield self.encoder.encode(table, id_dropout=self.settings.id_dropout, generator=generator)

    def _step(self, batch: IndexedBatch) -> float:
        settings, step, batch = self.settings, self.course.step, batch.to(self.device)
        assert batch.label is not None
        self.network.train()
        embedded = gather_batch(batch, self.tables, train=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            loss, _ = self.network.loss(embedded, batch.label)
        value = check_finite(loss.detach(), step, f"loss of {self.label}")
        self.optimizer.zero_grad()
        loss.backward()
        average_gradients(self.network.parameters())
        factor = learning_rate_factor(step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        self.optimizer.step()
        self.tables.step((settings.table_learning_rate or settings.learning_rate) * factor, settings.table_weight_decay)
        return value

    def _is_evaluated(self) -> bool:
        every, step = self.settings.validate_every_steps, self.course.step
        return step % self.batches.steps_per_epoch == 0 or (every > 0 and step % every == 0)

    def _out_of_patience(self) -> bool:
        course, patience = self.course, self.settings.patience
        return patience > 0 and course.best is not None and len(course.evaluations) - 1 - course.best >= patience

    def _evaluate(self) -> None:
        """Judge the present state on validation; a better one than all before is written, unless it is the last."""
        course = self.course
        course.evaluations.append(
            {"epoch": course.step / self.batches.steps_per_epoch, "step": course.step, **self._judge()}
        )
        value, best = course.evaluations[-1]["auc"], course.best
        if value is None or (best is not None and value <= course.evaluations[best]["auc"]):
            return
        course.best, course.best_state = len(course.evaluations) - 1, None
        if course.step < self.total:
            course.best_state = f"{course.step:08d}-of-{world_size()}.safetensors"
            state = self.state()
            if rank() == 0:
                artifacts.write_tensors(f"{self.folder}/best/{course.best_state}", state)

    def _take_best(self) -> None:
        if self.course.best_state is None:
            return
        if world_size() > 1:
            dist.barrier()  # the first worker has written it
        self._load(artifacts.read_tensors(f"{self.folder}/best/{self.course.best_state}"))

    @torch.inference_mode()
    def _judge(self) -> dict[str, Any]:
        """AUC and log loss on validation rows with a label of 0 or 1; each worker scores its share of the batches."""
        self.network.eval()
        logits, labels = [torch.zeros(0, device=self.device)], [torch.zeros(0, device=self.device)]
        for table in self._share_of_validation():
            batch = self.encoder.encode(table).to(self.device)
            embedded = gather_batch(batch, self.tables)
            if len(batch) and batch.label is not None:
                judged = (batch.label == 0) | (batch.label == 1)
                logits.append(self.network(embedded)[judged])
                labels.append(batch.label[judged])
        logit, label = joined(torch.cat(logits)).numpy(), joined(torch.cat(labels)).numpy()
        prob = 1.0 / (1.0 + np.exp(-logit.astype(np.float64)))
        return {"auc": auc(label, logit), "log_loss": log_loss(label, prob), "rows": len(label)}

    def _share_of_validation(self) -> Iterator[pa.Table]:
        """This worker's batches: as many as every other worker's (lookups may be collective), so the last may be empty."""
        if not artifacts.list_files(self.validation, ".parquet"):
            return
        mine, place = None, 0
        for number, table in enumerate(ordered_batches(self.validation, [*self.encoder.columns, "label"], 4_096)):
            place = number % world_size()
            if place == 0:
                mine = table.slice(0, 0)
            if place == rank():
                mine = table
            if place == world_size() - 1:
                yield mine
        if mine is not None and place < world_size() - 1:
            yield mine


def learning_rate_factor(step: int, total: int) -> float:
    """Constant for the first half, then linear to a tenth."""
    progress = step / max(1, total)
    return 1.0 if progress < 0.5 else 1.0 - 0.9 * (progress - 0.5) / 0.5
