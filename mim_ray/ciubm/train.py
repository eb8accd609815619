"""Train one CTR model (paper Section 3.4): base or +MIM around one user behavior model, one network per seed.

P workers, each with its part of every epoch (data.batches.RowBatches); the network's gradients are averaged over
workers, the met table rows' by the tables. The epoch with the best validation AUC is kept; test rows are never read here. What a
finished seed left is not done again after a restart.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from mim_ray import artifacts
from mim_ray.ciubm.dataset import COLUMNS, Content, ImpressionEncoder, IndexedBatch, gather_batch
from mim_ray.ciubm.export import save_model
from mim_ray.ciubm.model import CtrNetwork, NetworkConfig
from mim_ray.ciubm.tables import IdTables
from mim_ray.ciubm.vocabulary import ItemIndex, Vocabulary
from mim_ray.config import Scenario
from mim_ray.config.scenario import Ciubm
from mim_ray.data.batches import RowBatches, ordered_batches, prefetch
from mim_ray.data.catalogue import Catalogue
from mim_ray.errors import ArtifactError
from mim_ray.evaluation.metrics import auc, log_loss
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.snapshot_line import keep_snapshot
from mim_ray.runtime.progress import Progress
from mim_ray.runtime.summary import StageResult
from mim_ray.training.optim import average_gradients, check_finite
from mim_ray.training.run import rank, report, run_workers, world_size

_CURVE_POINTS = 100


def run(scenario: Scenario, *, variant: str, samples: str, snapshot: str | None, output: str) -> StageResult:
    """Train `variant` (BACKBONE-base, -mim or -style) and leave it at `output`, as ciubm/export.py describes.

    Args:
        samples: URI of the samples. snapshot: URI of the embeddings behind Eqs. 7-9, None for base.

    Raises:
        ArtifactError: content is asked for and there is no snapshot.
        NonFiniteLossError: training diverged.
        DataError: there are no training rows.
    """
    backbone, _, content = variant.partition("-")
    settings = scenario.ciubm
    if content != "base" and snapshot is None:
        raise ArtifactError(f"{variant} needs embeddings. Run jobs/extract.py first, or train {backbone}-base.")
    opened = None if content == "base" or snapshot is None else Snapshot.open(snapshot)
    items, users, positive_ratio = build_vocabulary(samples, settings, f"{output}/vocabulary")
    if opened is not None and not (Content(opened, items).rows >= 0).any():
        raise ArtifactError(
            f"{snapshot} holds no embedding of any item of the catalogue. Run jobs/extract.py again on these samples."
        )
    network = network_config(settings, backbone, None if opened is None else opened.width)
    config = {
        "settings": settings.model_dump(mode="json"),
        "network": network.to_json(),
        "samples": samples,
        "snapshot": None if opened is None else opened.uri,
        "output": output,
        "label": variant,
        "positive_ratio": positive_ratio,
        "run_seed": scenario.run.seed,
    }
    with _kept(opened, owner=f"training-{artifacts.fingerprint(output)}"):
        run_workers(train_loop, config, workers=settings, name=variant, storage=f"{output}/train")
    results = [artifacts.read_json(f"{output}/seed-{seed}/metrics.json") for seed in settings.seeds]
    metrics = {
        "seeds": {str(seed): result for seed, result in zip(settings.seeds, results, strict=True)},
        "validation_auc": _mean([result["validation_auc"] for result in results]),
        "validation_log_loss": _mean([result["validation_log_loss"] for result in results]),
        "num_train_rows": results[0]["num_train_rows"],
        "rows_per_s": _mean([result["rows_per_s"] for result in results]),
    }
    info = {
        "variant": variant,
        "backbone": backbone,
        "content": content,
        "encoder_version": None if opened is None else opened.encoder_version,
        "snapshot": config["snapshot"],
        "network": config["network"],
        "max_behaviors": settings.max_behaviors,
        "id_dim": settings.id_dim,
        "seeds": list(settings.seeds),
        "metrics": metrics,
    }
    artifacts.write_json(f"{output}/ctr.json", info)
    validation = metrics["validation_auc"]
    rows = [
        ("train", f"{metrics['num_train_rows']:,} rows, {metrics['rows_per_s']:,.0f} rows/s"),
        ("tables", f"{items.num_table_rows:,} items, {items.num_category_rows:,} categories, {len(users) + 1:,} users"),
        ("content", "none" if opened is None else f"{opened.encoder_version}, width {opened.width}"),
        ("validation AUC", "no rows of both labels" if validation is None else f"{validation:.4f} (mean over seeds)"),
    ]
    return StageResult(metrics=metrics, rows=rows)


@contextlib.contextmanager
def _kept(snapshot: Snapshot | None, *, owner: str) -> Iterator[None]:
    """All workers, restarted ones too, read this one state; refreshes meanwhile neither change nor prune it."""
    if snapshot is None:
        yield
        return
    keep_snapshot(snapshot.line, snapshot.snapshot_id, owner=owner)
    yield  # a job that dies keeps it, for the attempt that goes on
    keep_snapshot(snapshot.line, None, owner=owner)


def network_config(settings: Ciubm, backbone: str, content_width: int | None) -> NetworkConfig:
    """Architecture for the scenario's settings; `content_width` None is the base model."""
    return NetworkConfig(
        backbone=backbone,
        id_width=2 * settings.id_dim,
        user_width=settings.id_dim if settings.use_user_id else 0,
        content_width=content_width,
        id_module=settings.id_module,
        content_module=settings.content_module,
        fusion_module=settings.fusion_module,
        num_histogram_bins=21 if settings.similarity_histogram else 0,
        target_content=settings.target_content,
        similarity_summary=settings.similarity_summary,
        content_norm=settings.content_norm,
        content_attention=settings.content_attention,
        missing_content=settings.missing_content,
        query_interest=settings.query_interest,
        hidden=settings.hidden,
        dropout=settings.dropout,
        num_searched=settings.num_searched,
        num_short=settings.num_short,
        sim_search=settings.sim_search,
        sim_short=settings.sim_short,
        auxiliary_weight=settings.auxiliary_weight,
    )


def build_vocabulary(samples: str, settings: Ciubm, output: str) -> tuple[ItemIndex, Vocabulary, float]:
    """Items of the catalogue, users of train, and train's share of positives; written below `output`.

    An item gets an embedding of its own when it was a target in train `min_item_count` times.
    """
    catalogue = Catalogue.open(f"{samples}/catalogue")
    counts = np.zeros(catalogue.num_items + 1, np.int64)
    users: list[pa.Array] = []
    num_rows = num_positives = 0
    for table in ordered_batches(f"{samples}/impressions/train", ["user_id", "item_id", "label"], 65_536):
        met = table["item_id"].value_counts()
        np.add.at(counts, catalogue.rows(met.field("values")), met.field("counts").to_numpy())
        users.append(table["user_id"].unique())
        if len(users) == 64:
            users = [pa.chunked_array(users).unique()]
        num_rows += len(table)
        num_positives += int(np.asarray(table["label"]).sum())
    codes, names = catalogue.category_codes
    items = ItemIndex.build(catalogue.ids, codes, names, counts[:-1], settings.min_item_count)
    distinct = pa.chunked_array(users or [pa.array([], pa.string())]).unique().drop_null()
    user_index = Vocabulary(distinct.take(pc.sort_indices(distinct)))
    items.save(output)
    user_index.save(f"{output}/users.arrow")
    return items, user_index, num_positives / max(1, num_rows)


def train_loop(config: dict[str, Any]) -> None:
    """What each worker does: one model after the other, one per seed."""
    settings = Ciubm.model_validate(config["settings"])
    items = ItemIndex.load(f"{config['output']}/vocabulary")
    users = Vocabulary.load(f"{config['output']}/vocabulary/users.arrow")
    content = None if config["snapshot"] is None else Content(Snapshot.open(config["snapshot"], verify=False), items)
    encoder = ImpressionEncoder(items, users, content, settings.max_behaviors)
    for seed in settings.seeds:
        folder = f"{config['output']}/seed-{seed}"
        if artifacts.exists(f"{folder}/metrics.json"):
            continue
        trainer = _Trainer(config, settings, encoder, config["run_seed"] * 1_000 + seed)
        metrics = trainer.fit()
        if rank() == 0:
            save_model(folder, trainer.network, trainer.tables)
            artifacts.write_json(f"{folder}/metrics.json", metrics)
    report({"finished": True})


class _Trainer:
    """One network and its tables on one worker."""

    def __init__(self, config: dict[str, Any], settings: Ciubm, encoder: ImpressionEncoder, seed: int) -> None:
        self.settings, self.encoder, self.seed, self.label = settings, encoder, seed, config["label"]
        self.validation = f"{config['samples']}/impressions/validation"
        self.batches = RowBatches(
            f"{config['samples']}/impressions/train",
            [*COLUMNS, "label"],
            settings.batch_size,
            seed,
            rank(),
            world_size(),
        )
        torch.manual_seed(seed)
        self.network = CtrNetwork(NetworkConfig.from_json(config["network"]))
        self.network.start_at(config["positive_ratio"])
        num_rows = {"item": encoder.items.num_table_rows, "category": encoder.items.num_category_rows}
        if settings.use_user_id:
            num_rows["user"] = len(encoder.users) + 1
        self.tables = IdTables.create(num_rows, settings.id_dim, seed=seed)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.learning_rate)

    def fit(self) -> dict[str, Any]:
        """All epochs; leaves the best one's weights in `network` and `tables`."""
        epochs = self.settings.num_epochs
        total = self.batches.steps_per_epoch * epochs
        curve: list[tuple[int, float]] = []
        history: list[dict[str, Any]] = []
        best: tuple[float, dict[str, Tensor], dict[str, Tensor]] | None = None
        start, waited, losses = time.monotonic(), 0.0, 0.0
        batches = prefetch(self._encoded(self.batches.steps(total)))
        every = max(1, total // _CURVE_POINTS)
        with Progress(
            f"train {self.label}", self._rows(total), "rows", every_s=5.0 if rank() == 0 else 1e9
        ) as progress:
            for step in range(total):
                asked = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - asked
                losses += self._step(batch, step, total)
                if (step + 1) % every == 0:
                    curve.append((step + 1, losses / every))
                    losses = 0.0
                if rank() == 0:
                    progress.add(len(batch) * world_size())
                if (step + 1) % self.batches.steps_per_epoch == 0:
                    history.append(self._validate((step + 1) // self.batches.steps_per_epoch))
                    value = history[-1]["auc"]
                    if value is not None and epochs > 1 and (best is None or value > best[0]):
                        weights = {name: weight.clone() for name, weight in self.network.state_dict().items()}
                        best = (value, weights, {name: weight.clone() for name, weight in self.tables.state().items()})
        seconds = time.monotonic() - start
        if best is not None:
            self.network.load_state_dict(best[1])
            self.tables = IdTables.from_state(best[2])
        kept = max(history, key=lambda entry: entry["auc"] or 0.0)
        return {
            "loss": curve,
            "epochs": history,
            "validation_auc": kept["auc"],
            "validation_log_loss": kept["log_loss"],
            "num_train_rows": self.batches.num_rows,
            "rows_per_s": round(self._rows(total) / max(seconds, 1e-9)),
            "data_wait_ratio": round(waited / max(seconds, 1e-9), 4),
        }

    def _rows(self, steps: int) -> int:
        return steps * self.batches.batch_size * world_size()

    def _encoded(self, tables: Iterator[pa.Table]) -> Iterator[IndexedBatch]:
        for step, table in enumerate(tables):
            generator = np.random.default_rng([self.seed, rank(), step])
            yield self.encoder.encode(table, id_dropout=self.settings.id_dropout, generator=generator)

    def _step(self, batch: IndexedBatch, step: int, total: int) -> float:
        assert batch.label is not None
        self.network.train()
        learning_rate = self.settings.learning_rate * learning_rate_factor(step, total)
        logits = self.network(gather_batch(batch, self.tables, train=True))
        loss = binary_cross_entropy_with_logits(logits, batch.label)
        value = check_finite(loss.detach(), step, f"loss of {self.label}")
        self.optimizer.zero_grad()
        loss.backward()
        average_gradients(self.network.parameters())
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.tables.step(learning_rate)
        return value

    @torch.inference_mode()
    def _validate(self, epoch: int) -> dict[str, Any]:
        """AUC and log loss on validation; each worker scores its share of the batches."""
        self.network.eval()
        logits, labels = [torch.zeros(0)], [torch.zeros(0)]
        if artifacts.list_files(self.validation, ".parquet"):
            for number, table in enumerate(ordered_batches(self.validation, [*COLUMNS, "label"], 4_096)):
                if number % world_size() == rank():
                    batch = self.encoder.encode(table)
                    assert batch.label is not None
                    logits.append(self.network(gather_batch(batch, self.tables)))
                    labels.append(batch.label)
        logit, label = _joined(torch.cat(logits)).numpy(), _joined(torch.cat(labels)).numpy()
        prob = 1.0 / (1.0 + np.exp(-logit.astype(np.float64)))
        return {"epoch": epoch, "auc": auc(label, logit), "log_loss": log_loss(label, prob), "rows": len(label)}


def learning_rate_factor(step: int, total: int) -> float:
    """Constant for the first half, then linear to a tenth."""
    progress = step / max(1, total)
    return 1.0 if progress < 0.5 else 1.0 - 0.9 * (progress - 0.5) / 0.5


def _joined(values: Tensor) -> Tensor:
    """The 1-D tensors of all workers, one after the other."""
    if world_size() == 1:
        return values
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(values)]))
    longest = max(int(size) for size in sizes)
    padded = [torch.zeros(longest, dtype=values.dtype) for _ in sizes]
    dist.all_gather(padded, torch.nn.functional.pad(values, (0, longest - len(values))))
    return torch.cat([part[: int(size)] for part, size in zip(padded, sizes, strict=True)])


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
