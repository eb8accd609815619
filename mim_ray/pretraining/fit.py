"""The loop that all three phases share: steps over all workers, held-out measures around them, checkpoints inside.

Every random choice of a step (masks, dropout) is a function of (seed, phase, rank, step), so a resumed phase needs no random
state: it takes the same rows, masks and losses as an undisturbed one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mim_ray import artifacts
from mim_ray.config.scenario import Pretraining
from mim_ray.contrastive.gather import place, total
from mim_ray.data.feeding import ordered_chunks
from mim_ray.encoders import batch_norm
from mim_ray.pretraining.dataset import PHASES, Batch, BatchSource, PhaseName
from mim_ray.runtime.progress import Progress
from mim_ray.training import checkpoint
from mim_ray.training.optim import average_gradients, check_finite, warmup_cosine

_CURVE_POINTS = 100
_LAST_PART = 0.1  # of the steps: their mean is the loss at the end
_MAX_GRADIENT_NORM = 1.0


class Phase(Protocol):
    """What `fit` needs to know of a phase.

    Attributes:
        broken: rows whose pictures could not be decoded, met so far by this worker.
        frozen_statistics: BatchNorm keeps the statistics it has.
    """

    name: PhaseName
    num_steps: int
    source: BatchSource
    broken: set[int]
    frozen_statistics: bool

    @property
    def module(self) -> nn.Module:
        """Towers and what the phase adds to them, equal on all workers."""

    def groups(self) -> list[dict[str, Any]]:
        """Parameters with their learning rates, for the optimizer."""

    def loss(self, batch: Batch) -> tuple[Tensor, float]:
        """This worker's loss (scalar), and the loss of a model that knows nothing, 0 where that has no meaning."""

    def after_step(self) -> None:
        """Called when the optimizer has moved."""

    def measure(self) -> dict[str, Any]:
        """Held-out measures; a collective."""


@dataclass
class Course:
    """How far a phase has come: the JSON part of its checkpoints.

    Attributes:
        losses: [step, mean loss of all workers]. before: held-out measures before the first step.
        end: sums over the last steps: loss, loss by chance, steps.
    """

    step: int = 0
    losses: list[list[float]] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)
    end: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    broken: list[int] = field(default_factory=list)


def fit(
    phase: Phase, settings: Pretraining, *, seed: int, checkpoints: str | None = None, decoder_cpus: float = 0.0
) -> dict[str, Any]:
    """Train a phase to its end on every worker of the group.

    Args:
        decoder_cpus: reserved for each of `settings.num_decoders`.
        checkpoints: folder of the phase's checkpoints; an interrupted phase goes on from the newest one that as many
            workers wrote. None: keep none.

    Returns:
        losses [step, loss], before and after (held-out measures), last_loss and chance_loss (mean of the last tenth),
        waiting_ratio (share of the time that steps waited for data).
    """
    optimizer = torch.optim.AdamW(phase.groups())
    rates = [group["lr"] for group in optimizer.param_groups]
    course = _resume(phase, optimizer, checkpoints) or Course(before=_measured(phase))
    phase.module.train()
    if phase.frozen_statistics:
        batch_norm.freeze(phase.module)
    label = f"pre-training, {phase.name}"
    progress = Progress(label, phase.num_steps - course.step, "steps") if place()[0] == 0 else None
    start, waited = time.perf_counter(), 0.0
    batches = ordered_chunks(
        phase.source,
        course.step,
        phase.num_steps,
        num_decoders=0 if phase.name == "text" else settings.num_decoders,  # titles cost nothing
        cpus_per_decoder=decoder_cpus,
    )
    while course.step < phase.num_steps:
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        phase.broken.update(batch["broken"].tolist() if "broken" in batch else [])
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * warmup_cosine(course.step, phase.num_steps, settings.warmup_ratio)
        _seed_step(seed, phase.name, course.step)
        loss = _step(phase, optimizer, batch, course, label)
        if progress is not None:
            progress.add(1, f"loss {loss:.3f}")
        if checkpoints and course.step % settings.checkpoint_every_steps == 0 and course.step < phase.num_steps:
            _save(phase, optimizer, course, checkpoints)
    seconds = time.perf_counter() - start
    if not phase.frozen_statistics:
        batch_norm.average(phase.module)
    last = max(1.0, course.end[2])
    return {
        "losses": course.losses,
        "before": course.before,
        "after": _measured(phase),
        "last_loss": round(course.end[0] / last, 5),
        "chance_loss": round(course.end[1] / last, 5) or None,
        "waiting_ratio": round(waited / max(seconds, 1e-9), 4),
    }


def _step(phase: Phase, optimizer: torch.optim.Optimizer, batch: Batch, course: Course, label: str) -> float:
    """One optimizer step; returns the mean loss of all workers."""
    loss, chance = phase.loss(batch)
    mean, chance = (
        total(torch.stack([loss.detach().double(), loss.new_tensor(chance).double()])) / place()[1]
    ).tolist()
    check_finite(mean, course.step, f"loss of {label}")  # the same on all workers: they stop together
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    average_gradients(trained)
    nn.utils.clip_grad_norm_(trained, _MAX_GRADIENT_NORM)
    optimizer.step()
    phase.after_step()
    if course.step % max(1, phase.num_steps // _CURVE_POINTS) == 0 or course.step == phase.num_steps - 1:
        course.losses.append([course.step, round(mean, 5)])
    if course.step >= int((1 - _LAST_PART) * phase.num_steps):
        course.end = [a + b for a, b in zip(course.end, (mean, chance, 1.0), strict=True)]
    course.step += 1
    return mean


def _measured(phase: Phase) -> dict[str, Any]:
    phase.module.eval()
    with torch.no_grad():
        return phase.measure()


def _seed_step(seed: int, phase: PhaseName, step: int) -> None:
    """Masks and dropout of a step: other ones for each rank."""
    state = np.random.SeedSequence([seed, PHASES.index(phase), place()[0], step]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state >> np.uint64(1)))


def _save(phase: Phase, optimizer: torch.optim.Optimizer, course: Course, folder: str) -> None:
    shared: Mapping[str, Tensor] = {}
    if place()[0] == 0:
        shared = checkpoint.with_prefix("module", phase.module.state_dict()) | checkpoint.with_prefix(
            "optimizer", checkpoint.optimizer_state(optimizer)
        )
    course.broken = sorted(phase.broken)
    checkpoint.save(folder, course.step, shared, batch_norm.statistics(phase.module), asdict(course))


def _resume(phase: Phase, optimizer: torch.optim.Optimizer, folder: str | None) -> Course | None:
    if folder is None:
        return None
    found = checkpoint.load(folder)
    if found is None:
        return None
    if found.num_workers != place()[1]:
        if place()[0] == 0:
            print(
                f"pre-training, {phase.name}: its checkpoint is of {found.num_workers} workers, now there are"
                f" {place()[1]}; goes on from the end of the phase before",
                flush=True,
            )
        if place()[1] > 1:
            dist.barrier()  # everybody has read it
        if place()[0] == 0:
            artifacts.remove(folder)
        return None
    phase.module.load_state_dict(checkpoint.under_prefix("module", found.shared))
    phase.module.load_state_dict(found.own, strict=False)  # this worker's own BatchNorm statistics
    checkpoint.load_optimizer_state(optimizer, checkpoint.under_prefix("optimizer", found.shared))
    course = Course(**found.values)
    phase.broken.update(course.broken)
    if place()[0] == 0:
        print(f"pre-training, {phase.name}: goes on from step {course.step} of {phase.num_steps}", flush=True)
    return course
