"""Judge CTR models on the test rows: overall, by item age (paper Figure 6), category (Table 7) and exposure.

Beside the models stand rows without a model: popularity in train, the mean cosine of the behaviors' MM vectors to the
target's, and, on the synthetic shop, the oracle. Predictions stream to their tables and all metrics are counted while
rows pass by, so that memory does not grow with them; docs/evaluation.md says how.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mim_ray import artifacts
from mim_ray.ciubm.export import Ranker, load_ranker
from mim_ray.ciubm.judged_rows import TestRows
from mim_ray.ciubm.predict import PredictionsWriter, mean_cosines, predict
from mim_ray.config import Scenario
from mim_ray.data.catalogue import Catalogue
from mim_ray.errors import DataError
from mim_ray.evaluation.compare import Comparison, Pairs, as_json, streamed_auc
from mim_ray.evaluation.slices import EXPOSURES, NUM_BUCKETS, age_buckets, created_buckets, exposure_buckets
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.runtime.cluster import worker_threads
from mim_ray.runtime.summary import StageResult

_MAX_CATEGORIES = 30


def run(
    scenario: Scenario,
    *,
    samples: str,
    variants: Mapping[str, str],
    snapshots: Mapping[str, str | None],
    snapshot: str | None,
    truth: str | None,
    output: str,
) -> StageResult:
    """Compare the models at `variants` (name -> URI); writes evaluation.json and predictions/<variant>.parquet.

    Args:
        snapshots: name -> URI of the embeddings that the model reads, None for a base model.
        snapshot: URI of the embeddings behind the mean cosine, None where there are none.
        truth: URI of the synthetic shop's true click probabilities by impression_id, None for real data.

    Raises:
        DataError: there are no test rows.
        VersionMismatchError: a model was trained on another encoder version than its snapshot holds.
    """
    torch.set_num_threads(worker_threads(scenario.ciubm))
    with _scratch() as folder:
        rows = TestRows(f"{samples}/impressions/test", Catalogue.open(f"{samples}/catalogue"), folder)
        seed_aucs: dict[str, list[float | None]] = {}
        for name, uri in variants.items():
            content = snapshots.get(name)
            opened = None if content is None else Snapshot.open(content)
            ranker = load_ranker(uri, encoder_version=None if opened is None else opened.encoder_version)
            seed_aucs[name] = _predict(rows, name, ranker, opened, f"{output}/predictions/{name}.parquet")
        references = _references(scenario, rows, snapshot, truth)
        pairs = {name: (name, base) for name in variants if (base := _base(name)) in variants and base != name}
        result = _judge(scenario, rows, list(variants), references, pairs, samples, folder)
    for name in variants:
        result["models"][name]["seed_aucs"] = seed_aucs[name]
    artifacts.write_json(f"{output}/evaluation.json", result)
    return StageResult(metrics={k: v for k, v in result.items() if k != "created_buckets"}, rows=_summary(result))


def compare(
    scenario: Scenario,
    *,
    samples: str,
    predictions: Mapping[str, str],
    snapshot: str | None,
    truth: str | None,
    output: str,
) -> StageResult:
    """Judge tables of predictions (name -> URI), wherever they come from; writes `output`, a JSON file.

    Each is compared with all that were named before it. The other arguments are those of `run`.

    Raises:
        DataError: a table does not give every test impression one probability.
    """
    with _scratch() as folder:
        rows = TestRows(f"{samples}/impressions/test", Catalogue.open(f"{samples}/catalogue"), folder)
        for name, uri in predictions.items():
            rows.join(name, uri)
        references = _references(scenario, rows, snapshot, truth)
        names = list(predictions)
        pairs = {f"{a} over {b}": (a, b) for number, a in enumerate(names) for b in names[:number]}
        result = _judge(scenario, rows, names, references, pairs, samples, folder)
    result["predictions"] = dict(predictions)
    artifacts.write_json(output, result)
    return StageResult(metrics=result, rows=_summary(result))


def _references(scenario: Scenario, rows: TestRows, snapshot: str | None, truth: str | None) -> list[str]:
    """Add the scores that need no model; their names."""
    names = ["popularity"]  # added where it is known of the items
    if snapshot is not None:
        names.append("mean_cosine")
        for values in mean_cosines(Snapshot.open(snapshot), rows.uri, scenario.ciubm.max_behaviors):
            rows.columns.append("mean_cosine", values)
    if truth is not None:
        names.append("oracle")
        rows.join("oracle", truth)
    return names


def _predict(rows: TestRows, name: str, ranker: Ranker, snapshot: Snapshot | None, output: str) -> list[float | None]:
    """Write the model's predictions as a table and as a column; the AUC of each seed."""
    num_seeds = len(ranker.models)
    seeds = [f"{name}.seed{number}" for number in range(num_seeds)] if num_seeds > 1 else []
    with PredictionsWriter(output) as writer:
        for impression_id, prob in predict(ranker, snapshot, rows.uri, name):
            mean = prob.mean(axis=0)
            if not np.isfinite(mean).all():
                raise DataError(f"{name} predicts values that are no numbers. Train it again.")
            writer.add(impression_id, mean)
            rows.columns.append(name, mean)
            for column, values in zip(seeds, prob, strict=False):
                rows.columns.append(column, values)
    return [streamed_auc(rows.columns, column) for column in seeds or [name]]


def _judge(
    scenario: Scenario,
    rows: TestRows,
    models: list[str],
    references: list[str],
    pairs: Pairs,
    samples: str,
    folder: Path,
) -> dict[str, Any]:
    first_positive_at, num_positives = rows.train_positives(samples)
    rows.by_item("popularity", num_positives)
    category, categories = _categories(rows)
    kinds = {
        "age_buckets": (age_buckets(rows.item_rows, first_positive_at), [f"S{b}" for b in range(1, NUM_BUCKETS + 1)]),
        "created_buckets": (
            created_buckets(rows.item_rows, rows.created_at()),
            [f"C{b}" for b in range(1, NUM_BUCKETS + 1)],
        ),
        "exposure": (exposure_buckets(num_positives), list(EXPOSURES)),
        "categories": (category, categories),
    }
    starts = dict(zip(kinds, np.cumsum([1] + [len(names) for _, names in kinds.values()]).tolist(), strict=False))
    comparison = Comparison(
        rows.columns,
        models=models,
        references=references,
        slices=[np.where(of_item < 0, -1, of_item + starts[kind]) for kind, (of_item, _) in kinds.items()],
        num_slices=sum(len(names) for _, names in kinds.values()),
        folder=folder,
        num_bootstrap=scenario.evaluation.num_bootstrap,
        min_label_rows=scenario.evaluation.min_bucket_rows,
        seed=scenario.run.seed,
    )
    metrics, differences = comparison.metrics(pairs)
    result: dict[str, Any] = {
        "num_rows": rows.num_rows,
        "num_rows_without_label": rows.num_unjudged,
        "num_positives": rows.num_positives,
        "num_users": comparison.num_users,
        "models": metrics,
        "differences": differences,
        "references": {name: as_json(comparison.auc(name)) for name in references},
        "closed_ratio": {
            backbone: comparison.closed_ratio(f"{backbone}-base", f"{backbone}-mim", f"{backbone}-style")
            for backbone in {name.partition("-")[0] for name in models}
            if all(f"{backbone}-{content}" in models for content in ("base", "mim", "style"))
        },
    }
    for kind, (_, names) in kinds.items():
        word = "category" if kind == "categories" else "bucket"
        result[kind] = [
            {word: name, **comparison.slice(starts[kind] + place, pairs)} for place, name in enumerate(names)
        ]
    result["warnings"] = _warnings(result)
    return result


def _categories(rows: TestRows) -> tuple[np.ndarray, list[str]]:
    """(items + 1,) number of each target's category among those with most test rows, -1 for others; their names."""
    codes, names = rows.catalogue.category_codes
    of_item = np.append(codes, -1)
    known = of_item >= 0
    counts = np.bincount(of_item[known], rows.item_rows[known], len(names))
    largest = [code for code in np.argsort(-counts, kind="stable")[:_MAX_CATEGORIES].tolist() if counts[code]]
    number = np.full(len(names) + 1, -1, np.int64)  # the last is for items without a category
    number[largest] = np.arange(len(largest))
    return number[of_item], [names[code] for code in largest]


def _base(name: str) -> str:
    return f"{name.partition('-')[0]}-base"


def _warnings(result: Mapping[str, Any]) -> list[str]:
    cosine = result["references"].get("mean_cosine", {}).get("value")
    return [
        f"{name} (AUC {metrics['auc']['value']:.4f}) is below the mean cosine of the vectors that it reads ({cosine:.4f}): "
        "the network does not use what they know, a defect to be understood, not a result."
        for name, metrics in result["models"].items()
        if name.endswith("-mim") and cosine is not None and (metrics["auc"]["value"] or 1.0) < cosine
    ]


def _summary(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("test", f"{result['num_rows']:,} rows, {result['num_positives']:,} clicked, {result['num_users']:,} users")
    ]
    for name, metrics in result["models"].items():
        text = f"AUC {_text(metrics['auc'])}  GAUC {_text(metrics['gauc'])}  log loss {_text(metrics['log_loss'])}"
        rows.append((name, text))
    rows += [(name.replace("_", " "), f"AUC {_text(value)}") for name, value in result["references"].items()]
    for metrics in result["differences"].values():
        text = f"AUC {_text(metrics['auc'], sign=True)}  GAUC {_text(metrics['gauc'], sign=True)}"
        rows.append((f"{metrics['model']} over {metrics['over']}", text))
    rows += [(f"closed ratio {name}", _text(value)) for name, value in result["closed_ratio"].items()]
    for bucket in (result["age_buckets"][0], result["age_buckets"][-1]):
        gains = ", ".join(f"{name} {_text(value, sign=True)}" for name, value in bucket["difference"].items())
        rows.append((f"gain on {bucket['bucket']}", f"{gains or 'too few rows'} ({bucket['num_rows']:,} rows)"))
    rows += [("warning", text) for text in result["warnings"]]
    return rows


def _text(estimate: Mapping[str, float | None], sign: bool = False) -> str:
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None:
        return "none"
    form = "+.4f" if sign else ".4f"
    return f"{value:{form}}" if low is None or high is None else f"{value:{form}} [{low:{form}}, {high:{form}}]"


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mim_ray-evaluation-") as folder:
        yield Path(folder)
