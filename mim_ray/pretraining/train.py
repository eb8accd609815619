"""Pre-training of the encoders (paper Section 3.2): DDA for both towers, then DMA, on P Ray Train workers.

What it leaves: untrained/ (the encoder as it started), encoder/ (as it ended), and the held-out measures before and after.
After each phase the encoder is kept below progress/, so that a crashed group or a killed job repeats one phase at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from tokenizers import Tokenizer

from mim_ray import artifacts
from mim_ray.config import Scenario
from mim_ray.data.catalogue import Catalogue
from mim_ray.encoders import ItemEncoder
from mim_ray.encoders.text import brings_tokenizer
from mim_ray.encoders.tokenizer import train_tokenizer
from mim_ray.errors import DataError
from mim_ray.pretraining.dataset import Items, Pictures, PretrainingData, Share, choose_items, titles_of
from mim_ray.pretraining.phases import PHASES, Context, pretrain
from mim_ray.runtime.progress import format_seconds
from mim_ray.runtime.summary import StageResult
from mim_ray.training.run import rank, report, run_workers, worker_device, world_size

_MOST_TITLES = 1_000_000  # that the tokenizer is trained on


def run(scenario: Scenario, *, samples: str, output: str) -> StageResult:
    """Pre-train the encoders on the catalogue of `samples` and leave them below `output`. Ray must be initialised.

    Raises:
        DataError: no item has an image or a title and existed before the validation start.
    """
    catalogue = Catalogue.open(f"{samples}/catalogue")
    items = choose_items(catalogue, _validation_start(samples))
    if not len(items.with_image) and not len(items.with_title):
        raise DataError(
            f"None of the {catalogue.num_items} items of {samples}/catalogue has an image or a title and existed before"
            " the validation start. See the summary of the samples stage, and samples.validation_start."
        )
    untrained = ItemEncoder.build(scenario.encoders, _tokenizer(scenario, catalogue, items), scenario.run.seed)
    versions = {"untrained_version": untrained.save(f"{output}/untrained", stage="untrained")}
    config = {"scenario": scenario.model_dump(mode="json"), "samples": samples, "output": output}
    phases = run_workers(_worker, config, workers=scenario.pretraining, name="pretraining", storage=f"{output}/train")
    for leftover in ("train", "progress"):
        artifacts.remove(f"{output}/{leftover}")
    versions["encoder_version"] = artifacts.read_json(f"{output}/encoder/encoder.json")["encoder_version"]
    counts = {
        "num_images": len(items.with_image),
        "num_titles": len(items.with_title),
        "num_pairs": len(items.with_both),
        "num_held_out": len(items.held_out_both),
        "num_parameters": sum(parameter.numel() for parameter in untrained.parameters()),
    }
    metrics = {**versions, **counts, "phases": phases}
    return StageResult(metrics=metrics, rows=_summary(metrics))


def _worker(config: dict[str, Any]) -> None:
    """What each worker does; the last report holds the metrics by phase."""
    scenario = Scenario.model_validate(config["scenario"])
    samples, output = config["samples"], config["output"]
    done: dict[str, Any] = {}
    start = f"{output}/untrained"
    if artifacts.exists(f"{output}/progress/progress.json"):
        done = artifacts.read_json(f"{output}/progress/progress.json")
        start = f"{output}/progress/{_last(done)}"
    device = worker_device(scenario.pretraining.use_gpu)
    encoder = ItemEncoder.load(start).to(device)
    catalogue = Catalogue.open(f"{samples}/catalogue")
    limits = scenario.data
    pictures = Pictures(catalogue, encoder.picture, limits.max_image_bytes, limits.max_image_pixels)
    share = Share(scenario.pretraining.batch_size, scenario.run.seed, rank(), world_size())
    context = Context(
        encoder,
        PretrainingData(catalogue, pictures, share),
        choose_items(catalogue, _validation_start(samples)),
        scenario.pretraining,
        scenario.run.seed,
        rank(),
        device,
    )

    def keep(metrics: Mapping[str, Any]) -> None:
        if rank() == 0:
            encoder.save(f"{output}/progress/{_last(metrics)}", stage="pretraining")
            artifacts.write_json(f"{output}/progress/progress.json", metrics)

    metrics = pretrain(context, done, keep)
    if rank() == 0:
        encoder.save(f"{output}/encoder", stage="pretraining")
    report(metrics)


def _last(phases: Mapping[str, Any]) -> str:
    return [name for name in PHASES if name in phases][-1]


def _validation_start(samples: str) -> int:
    """Microseconds UTC from which nothing may be known to the encoders."""
    value = artifacts.read_json(f"{samples}/samples.json")["validation_start"]
    return int(datetime.fromisoformat(value).timestamp() * 1_000_000)


def _tokenizer(scenario: Scenario, catalogue: Catalogue, items: Items) -> Tokenizer | None:
    if brings_tokenizer(scenario.encoders.text):
        return None
    return train_tokenizer(
        titles_of(catalogue, items.with_title[:_MOST_TITLES]), scenario.encoders.text.vocabulary_size
    )


def _summary(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    phases = metrics["phases"]
    rows = [
        (
            "items",
            f"{metrics['num_images']:,} images, {metrics['num_titles']:,} titles, {metrics['num_pairs']:,} with both",
        ),
        ("encoder", f"{metrics['num_parameters']:,} parameters, {metrics['encoder_version']}"),
    ]
    texts = {
        "image": ("DDA, images", "error of hidden pixels", "reconstruction"),
        "text": ("DDA, titles", "perplexity of hidden words", "perplexity"),
        "alignment": ("DMA", "image to title recall@10", "recall_at_10"),
    }
    for name in PHASES:
        label, what, key = texts[name]
        if name not in phases:
            rows.append((label, "left out: no steps, or nothing to train on"))
            continue
        before, after = phases[name]["before"].get(key), phases[name]["after"].get(key)
        measure = "nothing held out" if before is None else f"held-out {what} {before:.3f} → {after:.3f}"
        chance = phases[name]["after"].get("chance")
        chance_text = "" if chance is None else f" (chance {chance:.3f} of {metrics['num_held_out']} items)"
        rows.append((label, f"{measure}{chance_text}, {format_seconds(phases[name]['seconds'])}"))
    return rows
