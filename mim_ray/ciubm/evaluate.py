"""Judge CTR models on the test rows: overall, by item age (paper Figure 6) and by category (Table 7).

Every test row gets a prediction: unknown users, items and missing content have defined embeddings. Beside the models
stand rows without a model: popularity in train, the mean cosine of the behaviors' MM vectors to the target's, and, on
the synthetic shop, the oracle.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mim_ray import artifacts
from mim_ray.ciubm.dataset import COLUMNS, Content, ImpressionEncoder, IndexedBatch
from mim_ray.ciubm.export import Ranker, load_ranker
from mim_ray.ciubm.interest import content_relevance
from mim_ray.config import Scenario
from mim_ray.data.batches import num_rows, ordered_batches
from mim_ray.data.catalogue import Catalogue
from mim_ray.data.ids import IdIndex
from mim_ray.data.schema import PREDICTIONS
from mim_ray.errors import DataError
from mim_ray.evaluation.compare import Comparison
from mim_ray.evaluation.metrics import auc
from mim_ray.evaluation.slices import NUM_BUCKETS, age_buckets, created_buckets
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.runtime.cluster import worker_threads
from mim_ray.runtime.progress import Progress
from mim_ray.runtime.summary import StageResult

_BATCH_ROWS = 4_096
_MAX_CATEGORIES = 30


def run(
    scenario: Scenario,
    *,
    samples: str,
    variants: Mapping[str, str],
    snapshots: Mapping[str, str | None],
    truth: str | None,
    output: str,
) -> StageResult:
    """Compare the models at `variants` (name -> URI); writes evaluation.json and predictions/<variant>.parquet.

    Args:
        snapshots: name -> URI of the embeddings that the model reads, None for a base model.
        truth: URI of the synthetic shop's true click probabilities by impression_id, None for real data.

    Raises:
        DataError: there are no test rows.
        VersionMismatchError: a model was trained on another encoder version than its snapshot holds.
    """
    torch.set_num_threads(worker_threads(scenario.ciubm))
    catalogue = Catalogue.open(f"{samples}/catalogue")
    every_row = _read_test(f"{samples}/impressions/test", catalogue)
    judged = every_row.label >= 0
    test = every_row.take(judged)
    scores: dict[str, np.ndarray] = {}
    seed_aucs: dict[str, list[float | None]] = {}
    cosine: np.ndarray | None = None
    for name, uri in variants.items():
        snapshot_uri = snapshots.get(name)
        snapshot = None if snapshot_uri is None else Snapshot.open(snapshot_uri)
        ranker = load_ranker(uri, encoder_version=None if snapshot is None else snapshot.encoder_version)
        by_seed, likeness = predict(ranker, snapshot, f"{samples}/impressions/test", name)
        write_predictions(f"{output}/predictions/{name}.parquet", every_row.impression_id, by_seed.mean(axis=0))
        scores[name] = by_seed.mean(axis=0)[judged]
        seed_aucs[name] = [auc(test.label, prob[judged]) for prob in by_seed]
        if likeness is not None and (cosine is None or name.endswith("-mim")):
            cosine = likeness[judged]

    first_positive_at, popularity = _train_positives(samples, catalogue, test)
    references = {"popularity": popularity}
    if cosine is not None:
        references["mean_cosine"] = cosine
    if truth is not None:
        references["oracle"] = _true_probs(truth, test.impression_id)
    pairs = {name: base for name in variants if (base := f"{name.partition('-')[0]}-base") in variants and base != name}
    comparison = Comparison(
        test.label,
        test.user,
        {**scores, **references},
        num_bootstrap=scenario.evaluation.num_bootstrap,
        min_label_rows=scenario.evaluation.min_bucket_rows,
        seed=scenario.run.seed,
    )
    models, differences = comparison.metrics(list(variants), pairs)
    everyone = np.ones(len(test.label), bool)
    ages = age_buckets(test.item, first_positive_at)
    created = created_buckets(test.item, _created_at(catalogue, test))
    result: dict[str, Any] = {
        "num_rows": len(test.label),
        "num_rows_without_label": int((~judged).sum()),
        "num_positives": int(test.label.sum()),
        "num_users": int(test.user.max(initial=-1)) + 1,
        "models": {name: {**models[name], "seed_aucs": seed_aucs[name]} for name in variants},
        "differences": differences,
        "references": comparison.slice(everyone, list(references), {})["auc"],
        "closed_ratio": {
            backbone: comparison.closed_ratio(f"{backbone}-base", f"{backbone}-mim", f"{backbone}-style")
            for backbone in {name.partition("-")[0] for name in variants}
            if all(f"{backbone}-{content}" in variants for content in ("base", "mim", "style"))
        },
        "age_buckets": [
            {"bucket": f"S{b}", **comparison.slice(ages == b, list(variants), pairs)} for b in range(1, NUM_BUCKETS + 1)
        ],
        "created_buckets": [
            {"bucket": f"C{b}", **comparison.slice(created == b, list(variants), pairs)}
            for b in range(1, NUM_BUCKETS + 1)
        ],
        "categories": _by_category(comparison, catalogue, test, list(variants), pairs),
    }
    artifacts.write_json(f"{output}/evaluation.json", result)
    return StageResult(metrics={k: v for k, v in result.items() if k != "created_buckets"}, rows=_summary(result))


def predict(
    ranker: Ranker, snapshot: Snapshot | None, rows: str, label: str = "predict"
) -> tuple[np.ndarray, np.ndarray | None]:
    """Probabilities (seeds, N) for every impression below the URI `rows`, in file order, and mean cosines (N,) or None.

    The mean cosine is that of the behaviors with content to the target; 0 without any.
    """
    content = None if snapshot is None else Content(snapshot, ranker.items)
    used = content if ranker.content_width is not None else None
    encoder = ImpressionEncoder(ranker.items, ranker.users, content, ranker.max_behaviors)
    probs: list[np.ndarray] = []
    cosines: list[np.ndarray] = []
    by_seed = [ranker.of_seed(index) for index in range(len(ranker.models))]
    with Progress(f"predict {label}", num_rows(rows), "rows", every_s=5.0) as progress:
        for table in ordered_batches(rows, COLUMNS, _BATCH_ROWS):
            batch = encoder.encode(table)
            probs.append(np.stack([one.predict(batch) for one in by_seed]))
            if used is not None:
                cosines.append(mean_cosine(batch).numpy())
            progress.add(len(batch))
    prob = np.concatenate(probs, axis=1) if probs else np.zeros((len(by_seed), 0))
    return prob, np.concatenate(cosines) if cosines else None


@torch.inference_mode()
def mean_cosine(batch: IndexedBatch) -> Tensor:
    """(B,) mean cosine between the target's MM embedding and those of the behaviors that have one; 0 without any."""
    assert batch.mm is not None
    behaviors = batch.mm[batch.behaviors]
    counted = batch.behavior_mask & (behaviors != 0).any(dim=-1)
    relevance = content_relevance(batch.mm[batch.target], behaviors, counted)
    return relevance.sum(dim=1) / counted.sum(dim=1).clamp_min(1)


def write_predictions(uri: str, impression_id: pa.Array, prob: np.ndarray) -> None:
    """The predictions table of SPEC section 2."""
    table = pa.table([impression_id.cast(pa.string()), pa.array(prob, pa.float64())], schema=PREDICTIONS.schema)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    artifacts.write_bytes(uri, sink.getvalue())


@dataclass(frozen=True)
class _TestRows:
    """Test rows without their behaviors.

    Attributes:
        label: 0, 1, or -1 where the user's own table gives none: such rows are predicted, not judged.
        item: numbers the targets. row: their catalogue row, -1 unknown.
    """

    impression_id: pa.Array
    label: np.ndarray
    user: np.ndarray
    item: np.ndarray
    row: np.ndarray

    def take(self, mask: np.ndarray) -> _TestRows:
        return _TestRows(
            self.impression_id.filter(pa.array(mask)),
            self.label[mask],
            self.user[mask],
            self.item[mask],
            self.row[mask],
        )


def _read_test(uri: str, catalogue: Catalogue) -> _TestRows:
    tables = list(ordered_batches(uri, ["impression_id", "user_id", "item_id", "label"], 65_536))
    if not tables:
        raise DataError(
            f"{uri} has no rows to judge models on. Raise samples.test_ratio, or mark rows as test in the split column."
        )
    table = pa.concat_tables(tables)
    items = pa.concat_arrays(table["item_id"].chunks).dictionary_encode()
    users = pa.concat_arrays(table["user_id"].chunks).dictionary_encode()
    item = np.asarray(items.indices.fill_null(0)).astype(np.int64)
    return _TestRows(
        impression_id=pa.concat_arrays(table["impression_id"].chunks),
        label=np.asarray(pc.fill_null(table["label"], -1)).astype(np.int64),
        user=np.asarray(users.indices.fill_null(0)).astype(np.int64),
        item=item,
        row=catalogue.rows(items.dictionary)[item],
    )


def _train_positives(samples: str, catalogue: Catalogue, test: _TestRows) -> tuple[np.ndarray, np.ndarray]:
    """Time (microseconds) of the target's first positive in train, -1 without one, and the number of its positives."""
    table = pq.read_table(artifacts.local_copy(f"{samples}/first_positive.parquet"))
    rows = catalogue.rows(table["item_id"])
    time, count = np.full(catalogue.num_items + 1, -1, np.int64), np.zeros(catalogue.num_items + 1)
    time[rows] = np.asarray(table["first_positive_at"].cast(pa.int64()))
    count[rows] = np.asarray(table["num_train_positives"])
    time[-1], count[-1] = -1, 0  # an item that is not in the catalogue
    return time[test.row], count[test.row]


def _created_at(catalogue: Catalogue, test: _TestRows) -> np.ndarray:
    """Microseconds; -1 where unknown."""
    unknown = np.iinfo(np.int64).max
    created = np.append(catalogue.created_at, unknown)[test.row]
    return np.where(created == unknown, -1, np.maximum(created, 0))


def _true_probs(truth: str, impression_id: pa.Array) -> np.ndarray:
    table = pq.read_table(artifacts.local_copy(truth))
    rows = IdIndex(pa.concat_arrays(table["impression_id"].chunks)).rows(impression_id)
    if (rows < 0).any():
        raise DataError(f"{truth} lacks {int((rows < 0).sum())} of the test impressions. Run the samples stage again.")
    return np.asarray(table["prob"])[rows]


def _by_category(
    comparison: Comparison, catalogue: Catalogue, test: _TestRows, models: list[str], pairs: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The categories with most test rows, largest first."""
    codes, names = catalogue.category_codes
    of_row = np.append(codes, -1)[test.row]
    counts = np.bincount(of_row[of_row >= 0], minlength=len(names))
    largest = np.argsort(-counts, kind="stable")[:_MAX_CATEGORIES]
    return [
        {"category": names[code], **comparison.slice(of_row == code, models, pairs)}
        for code in largest.tolist()
        if counts[code]
    ]


def _summary(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("test", f"{result['num_rows']:,} rows, {result['num_positives']:,} clicked, {result['num_users']:,} users")
    ]
    for name, metrics in result["models"].items():
        text = f"AUC {_text(metrics['auc'])}  GAUC {_text(metrics['gauc'])}  log loss {_text(metrics['log_loss'])}"
        rows.append((name, text))
    for name, metrics in result["differences"].items():
        text = f"AUC {_text(metrics['auc'], sign=True)}  GAUC {_text(metrics['gauc'], sign=True)}"
        rows.append((f"{name} over {metrics['over']}", text))
    rows += [(name.replace("_", " "), f"AUC {_text(value)}") for name, value in result["references"].items()]
    rows += [(f"closed ratio {name}", _text(value)) for name, value in result["closed_ratio"].items()]
    for bucket in (result["age_buckets"][0], result["age_buckets"][-1]):
        gains = ", ".join(f"{name} {_text(value, sign=True)}" for name, value in bucket["difference"].items())
        rows.append((f"gain on {bucket['bucket']}", f"{gains or 'too few rows'} ({bucket['num_rows']:,} rows)"))
    return rows


def _text(estimate: Mapping[str, float | None], sign: bool = False) -> str:
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None:
        return "none"
    form = "+.4f" if sign else ".4f"
    return f"{value:{form}}" if low is None or high is None else f"{value:{form}} [{low:{form}}, {high:{form}}]"
