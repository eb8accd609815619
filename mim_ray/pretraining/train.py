"""Pre-training of the encoders (paper Section 3.2): DDA for both towers, then DMA, on P Ray Train workers.

What it leaves: untrained/ (the encoder as it started), dda/ (after DDA), encoder/ (as it ended), and the held-out measures
before and after each phase. After each phase the encoder is kept below progress/, and inside a phase a checkpoint every
few hundred steps below train/: a crashed group or a killed job goes on from there. With another number of workers it goes
on from the last finished phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from mim_ray import artifacts
from mim_ray.config import Scenario
from mim_ray.config.scenario import Data
from mim_ray.data.catalogue import Catalogue
from mim_ray.data.feeding import decoder_cpus
from mim_ray.data.rejects import reject_rows, write_rejects
from mim_ray.data.splits import validation_start_us
from mim_ray.data.transforms import BadImage, PictureFormat, decode_image
from mim_ray.encoders import ItemEncoder
from mim_ray.encoders.text import brings_tokenizer
from mim_ray.encoders.tokenizer import train_tokenizer
from mim_ray.errors import DataError
from mim_ray.pretraining.dataset import PHASES, Content, Items, Share, choose_items, titles_of
from mim_ray.pretraining.phases import Context, Finished, pretrain
from mim_ray.runtime.progress import format_seconds
from mim_ray.runtime.summary import StageResult
from mim_ray.training.run import rank, report, run_workers, worker_device, world_size

STAGE = "pretraining"
_MOST_TITLES = 1_000_000  # that the tokenizer is trained on
_LEARNT_RATIO = 0.02  # of the loss by chance; less below it counts as nothing learnt


def run(scenario: Scenario, *, samples: str, output: str, rejects: str) -> StageResult:
    """Pre-train the encoders on the catalogue of `samples` and leave them below `output`. Ray must be initialised.

    Args:
        rejects: the table in which pictures that could not be decoded are listed.

    Raises:
        DataError: no item has an image or a title and existed before the validation start.
    """
    catalogue = Catalogue.open(f"{samples}/catalogue")
    items = choose_items(catalogue, validation_start_us(samples))
    if not len(items.with_image) and not len(items.with_title):
        raise DataError(
            f"None of the {catalogue.num_items} items of {samples}/catalogue has an image or a title and existed before"
            " the validation start. See the summary of the samples stage, and samples.validation_start."
        )
    untrained = ItemEncoder.build(scenario.encoders, _tokenizer(scenario, catalogue, items), scenario.run.seed)
    untrained.save(f"{output}/untrained", stage="untrained")
    workers = scenario.pretraining
    config = {
        "scenario": scenario.model_dump(mode="json"),
        "samples": samples,
        "output": output,
        "decoder_cpus": decoder_cpus(workers.num_workers, workers.cpus_per_worker, workers.num_decoders),
    }
    phases = run_workers(train_loop, config, workers=workers, name=STAGE, storage=f"{output}/train")
    dda = ItemEncoder.load(_start(output, [name for name in phases if name != "alignment"]))
    encoder = ItemEncoder.load(_start(output, phases))
    counts = write_rejects(
        rejects, STAGE, reject_rows(STAGE, "items", _rejected(scenario.data, encoder.picture, catalogue, output))
    )
    metrics = {
        "untrained_version": untrained.encoder_version,
        "dda_version": dda.save(f"{output}/dda", stage="dda"),
        "encoder_version": encoder.save(f"{output}/encoder", stage=STAGE),
        "num_images": len(items.with_image),
        "num_titles": len(items.with_title),
        "num_pairs": len(items.with_both),
        "num_held_out": len(items.held_out_both),
        "num_parameters": sum(parameter.numel() for parameter in untrained.parameters()),
        "phases": phases,
    }
    for leftover in ("train", "progress"):
        artifacts.remove(f"{output}/{leftover}")
    return StageResult(metrics=metrics, rows=_summary(metrics), rejects=counts)


def train_loop(config: dict[str, Any]) -> None:
    """What each worker does; the last report holds the metrics by phase."""
    scenario = Scenario.model_validate(config["scenario"])
    output = config["output"]
    done: dict[str, Any] = {}
    if artifacts.exists(f"{output}/progress/progress.json"):
        done = artifacts.read_json(f"{output}/progress/progress.json")
    device = worker_device(scenario.pretraining.use_gpu)
    encoder = ItemEncoder.load(_start(output, done)).to(device)
    limits = scenario.data
    content = Content(
        f"{config['samples']}/catalogue",
        encoder.picture,
        limits.max_image_bytes,
        limits.max_image_pixels,
        validation_start_us(config["samples"]),
    )
    share = Share(scenario.pretraining.batch_size, scenario.run.seed, rank(), world_size())
    context = Context(encoder, content, scenario.pretraining, share, device, config["decoder_cpus"])

    checkpoints = f"{output}/train/checkpoints"

    def keep(finished: Finished) -> None:
        artifacts.write_json(f"{output}/progress/broken/{finished.phase}-{rank()}.json", finished.broken)
        if world_size() > 1:
            torch.distributed.barrier()  # every worker's file is there before the phase counts as finished
        if rank() == 0:
            encoder.save(f"{output}/progress/{finished.phase}", stage=STAGE)
            artifacts.write_json(f"{output}/progress/progress.json", finished.metrics)
            artifacts.remove(f"{checkpoints}/{finished.phase}")

    report(pretrain(context, done, keep, checkpoints))


def _start(output: str, phases: Mapping[str, Any] | list[str]) -> str:
    """The encoder as the last of the finished phases left it."""
    finished = [name for name in PHASES if name in phases]
    return f"{output}/progress/{finished[-1]}" if finished else f"{output}/untrained"


def _tokenizer(scenario: Scenario, catalogue: Catalogue, items: Items) -> Tokenizer | None:
    if brings_tokenizer(scenario.encoders.text):
        return None
    return train_tokenizer(
        titles_of(catalogue, items.with_title[:_MOST_TITLES]), scenario.encoders.text.vocabulary_size
    )


def _rejected(limits: Data, picture: PictureFormat, catalogue: Catalogue, output: str) -> list[tuple[str, str, str]]:
    """(item id, reason, detail) of every picture that a worker could not decode."""
    files = artifacts.list_files(f"{output}/progress/broken", ".json")
    rows = np.unique([row for file in files for row in artifacts.read_json(file)]).astype(np.int64)
    found = []
    for row in rows:
        item = catalogue.take(np.array([row]), ["item_id", "image"]).to_pylist()[0]
        try:
            decode_image(item["image"], picture, limits.max_image_bytes, limits.max_image_pixels)
        except BadImage as error:
            found.append((item["item_id"], error.reason, error.detail))
    return found


def _summary(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    phases = metrics["phases"]
    rows = [
        (
            "items",
            f"{metrics['num_images']:,} images, {metrics['num_titles']:,} titles, {metrics['num_pairs']:,} with both",
        ),
        ("encoder", f"{metrics['num_parameters']:,} parameters, {metrics['encoder_version']}"),
    ]
    for name, label in zip(PHASES, ("DDA, images", "DDA, titles", "DMA"), strict=True):
        if name not in phases:
            rows.append((label, "left out: no steps, nothing to train on, or a frozen tower"))
            continue
        rows += [(label, f"{text}, {format_seconds(phases[name]['seconds'])}") for text in _measures(phases[name])]
    return rows + _warnings(phases.get("alignment"))


def _measures(phase: Mapping[str, Any]) -> list[str]:
    texts = {
        "reconstruction": "error of hidden pixels",
        "perplexity": f"perplexity of {phase.get('asked')}",
        "image_to_text_recall@10": "image to title recall@10",
        "text_to_image_recall@10": "title to image recall@10",
    }
    before, after = phase["before"], phase["after"]
    found = [f"held-out {text} {before[key]:.3f} → {after[key]:.3f}" for key, text in texts.items() if key in after]
    if "chance@10" in after:
        found = [f"{text} (chance {after['chance@10']:.3f} of {after['num_items']} items)" for text in found]
    return found or ["nothing held out"]


def _warnings(alignment: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """A line when DMA ends where it would be without having learnt anything."""
    if alignment is None or alignment["last_loss"] < (1 - _LEARNT_RATIO) * alignment["chance_loss"]:
        return []
    text = (
        f"learnt nothing: its loss ends at {alignment['last_loss']:.3f}, guessing gives {alignment['chance_loss']:.3f}."
        " Raise pretraining.temperature (0.3 for random towers), change pretraining.dma_learning_rate, or train longer"
    )
    return [("DMA, warning", text)]
