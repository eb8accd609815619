"""C-SFT (paper Section 3.3): fine-tune the encoder on interest pairs, on P Ray Train workers.

What it leaves: encoder/, and in its metrics the loss curves, temperatures, number of negatives, held-out retrieval before
and after, how far past embeddings had drifted, and the share of time that the steps waited for data. The worker's part is
in trainer.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

from mim_ray import artifacts
from mim_ray.config import Scenario
from mim_ray.config.scenario import Csft
from mim_ray.csft.objective import LEVELS
from mim_ray.csft.trainer import Trainer
from mim_ray.csft.training_pairs import pair_counts, save_counts
from mim_ray.csft.user_items import UserItems
from mim_ray.data.batches import num_rows
from mim_ray.data.catalogue import Catalogue
from mim_ray.data.feeding import decoder_cpus
from mim_ray.data.rejects import reject_rows, write_rejects
from mim_ray.data.splits import validation_start_us
from mim_ray.encoders import ItemEncoder
from mim_ray.errors import DataError
from mim_ray.runtime.summary import StageResult
from mim_ray.training.run import report, run_workers

STAGE = "csft"
_LEAST_SPREAD = 0.05


def run(scenario: Scenario, *, samples: str, encoder: str, output: str, rejects: str) -> StageResult:
    """Fine-tune the encoder at `encoder` on the pairs of `samples`; leaves output/encoder. Ray must be initialised.

    An interrupted run goes on from output/train when it is called again.

    Args:
        rejects: URI of the Delta table of rejects: pairs and pictures that could not be used.

    Raises:
        DataError: there are no interest pairs, or no categories for the hard negatives.
        ArtifactError: the encoder is missing or of another architecture.
    """
    ItemEncoder.load(encoder, scenario.encoders)  # a wrong one is refused here, before workers start
    config = prepare(scenario, samples=samples, encoder=encoder, output=output)
    settings = scenario.csft
    config["decoder_cpus"] = decoder_cpus(settings.num_workers, settings.cpus_per_worker, settings.num_decoders)
    metrics = run_workers(train_loop, config, workers=settings, name="csft", storage=f"{output}/train")
    rejected = _write_rejects(rejects, output)
    artifacts.remove(f"{output}/train")
    return StageResult(metrics=metrics, rows=_summary(metrics), rejects=rejected)


def prepare(scenario: Scenario, *, samples: str, encoder: str, output: str) -> dict[str, Any]:
    """What the workers need beside their settings; leaves output/train/user_items and output/train/pair_counts.

    Raises:
        DataError: as run.
    """
    settings = scenario.csft
    catalogue = Catalogue.open(f"{samples}/catalogue")
    pairs = f"{samples}/interest_pairs"
    num_pairs = num_rows(pairs) if artifacts.list_files(pairs, ".parquet") else 0
    if not num_pairs:
        raise DataError(
            f"There are no interest pairs in {pairs}. C-SFT learns from them: add image searches or consecutive positives "
            "to the interactions (samples.pair_events, samples.pair_window_days), or an own interest_pairs table."
        )
    _check_categories(settings, catalogue, samples)
    UserItems.bought(pairs, catalogue).save(f"{output}/train/user_items/bought")
    save_counts(f"{output}/train/pair_counts", pair_counts(pairs, catalogue, settings))
    if settings.supervision.endswith("-binary"):
        impressions = f"{samples}/impressions/train"
        UserItems.shown_not_clicked(impressions, catalogue).save(f"{output}/train/user_items/shown")
    return {
        "scenario": scenario.model_dump(mode="json"),
        "samples": samples,
        "encoder": encoder,
        "output": output,
        "num_pairs": num_pairs,
        "before_us": validation_start_us(samples),
        "decoder_cpus": 1.0,
    }


def measure_encoder(scenario: Scenario, *, samples: str, encoder: str) -> dict[str, Any]:
    """Held-out retrieval of any saved encoder, in this process: num_queries, num_items, and recall and MRR by level.

    Raises:
        DataError: there are no held-out pairs, or as run.
    """
    with tempfile.TemporaryDirectory() as folder:
        measured = Trainer(prepare(scenario, samples=samples, encoder=encoder, output=folder)).measure()
    if measured is None:
        raise DataError(f"No pair of {samples}/interest_pairs is held out. Raise csft.held_out_ratio.")
    return measured


def train_loop(config: dict[str, Any]) -> None:
    """What each worker does; rank 0 saves the encoder and reports."""
    trainer = Trainer(config)
    trainer.resume()
    report(trainer.train())


def _check_categories(settings: Csft, catalogue: Catalogue, samples: str) -> None:
    if settings.draws_hard_negatives and not catalogue.category_codes[1]:
        raise DataError(
            f"No item of {samples}/catalogue has a category, but csft.hard_negatives draws another item of the positive's "
            "category. Give the items table a category column, or set csft.hard_negatives=false."
        )


def _write_rejects(rejects: str, output: str) -> dict[str, int]:
    """What the workers could not use, as rows of the rejects table; number by reason."""
    found: dict[str, str] = {}
    for uri in artifacts.list_files(f"{output}/train/rejects", ".json"):
        found |= artifacts.read_json(uri)
    detail = "met in C-SFT"
    rows = reject_rows(STAGE, "interest_pairs, items", [(key, reason, detail) for key, reason in found.items()])
    return write_rejects(rejects, STAGE, rows)


def _summary(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("steps", f"{metrics['steps']:,} of {metrics['num_workers']} x {metrics['batch_size']} pairs"),
        ("loss", f"{metrics['curve'][0][1]:.3f} at first, {metrics['curve'][-1][1]:.3f} at last"),
        ("negatives per query", f"{metrics['num_negatives']:,.1f}"),
        ("hard negatives of another category", f"{metrics['num_other_category']:,}"),
        ("waited for data", f"{metrics['waiting_ratio']:.1%} of the time"),
        ("encoder", metrics["encoder_version"]),
    ]
    if metrics["temperatures"]:
        texts = ", ".join(f"{level} {value:.4f}" for level, value in metrics["temperatures"].items())
        rows.insert(4, ("temperatures", texts))
    if metrics["drift"]:
        last = metrics["drift"][-1][1]
        rows.append(
            ("past embeddings, cosine to now", ", ".join(f"age {age} {value:.3f}" for age, value in last.items()))
        )
    if metrics["collapsed"] or metrics["spread"] < _LEAST_SPREAD:
        what = f"at the {', '.join(metrics['collapsed'])} level the encoder only guesses (the loss is ln K)"
        if not metrics["collapsed"]:
            what = f"all items look alike to the encoder (1 - mean cosine {metrics['spread']:.4f})"
        rows.append(
            (
                "warning",
                f"{what}: lower csft.learning_rate and csft.tower_learning_rate, raise csft.temperature, let past batches "
                "join later (csft.past_warmup_steps), or keep them by a slow encoder (csft.past_momentum=0.99)",
            )
        )
    before, after = metrics["retrieval"]["before"], metrics["retrieval"]["after"]
    if after is None:
        return [*rows, ("held-out retrieval", "no held-out pairs")]
    for level in LEVELS:
        texts_of = [
            f"{old:.3f} -> {new:.3f}" if (old := before["levels"][level][key]) is not None
            and (new := after["levels"][level][key]) is not None else "-"
            for key in ("recall@10", "mrr")
        ]  # fmt: skip
        rows.append(
            (f"query to {level}", f"recall@10 {texts_of[0]}, MRR {texts_of[1]} among {after['num_items']:,} items")
        )
    return rows
