"""From a training loop and its settings to a result: the thin shell of Ray Train around plain PyTorch.

A loop runs on every worker inside a process group (gloo on CPUs, NCCL on GPUs) and calls `report` as often on each rank
as on the others, because a report is a barrier. What a loop raises on purpose (a MimRayError) ends the run at once;
anything else, a killed worker above all, restarts the group up to `workers.max_failures` times.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayActorError
from ray.train import ControllerError, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from mim_ray.artifacts import local_path
from mim_ray.config.scenario import Workers
from mim_ray.errors import TrainingError
from mim_ray.runtime.cluster import user_error, worker_threads

COLLECTIVE_TIMEOUT_S = 120

# Ray Train's controller asks its workers how they are every 2 s and sees their end no sooner; a short run would wait
# for that. A working folder per run (our URIs are absolute) and Train's own gauges cost start-up time.
_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # shows each printed line twice
}


def run_workers(
    loop: Callable[[dict[str, Any]], None],
    config: Mapping[str, Any],
    *,
    workers: Workers,
    name: str,
    storage: str,
) -> dict[str, Any]:
    """Run `loop(config)` on every worker of a new group and wait for its end. Ray must be initialised.

    Args:
        loop: what a worker does; sees its place through `rank()` and `world_size()`, ends with `report(metrics)`.
        config: JSON-able values for the loop.
        name: of the run, for logs and the folder below `storage`.
        storage: absolute URI of a folder for Ray Train's own files (every node must reach it).

    Returns:
        The metrics that rank 0 reported last.

    Raises:
        MimRayError: what a worker raised on purpose.
        TrainingError: the group crashed more than `workers.max_failures` times.
    """
    for variable, value in _TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if _is_one_machine():
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away
    threads = worker_threads(workers)
    if workers.in_driver and workers.num_workers == 1 and not workers.use_gpu:
        before = torch.get_num_threads()
        try:
            return _fit(_trainer(loop, config, workers, name, storage, threads, num_workers=0))
        finally:
            torch.set_num_threads(before)
    for attempt in range(workers.max_failures + 1):
        try:
            return _fit(_trainer(loop, config, workers, name, storage, threads, workers.num_workers))
        except Exception as error:
            known = user_error(error.controller_failure if isinstance(error, ControllerError) else error)
            if known is not None:
                raise known from None
            if attempt == workers.max_failures or not _died_at_start(error):
                raise TrainingError(
                    f"{name}: the workers failed more than {workers.max_failures} times. The last error was: {error}"
                ) from error
    raise AssertionError("unreachable")


def report(metrics: Mapping[str, Any]) -> None:
    """Tell the driver (rank 0's metrics count). A barrier: every rank must call it equally often."""
    ray.train.report(dict(metrics))
    _LAST_REPORT.clear()
    _LAST_REPORT.update(metrics)


def rank() -> int:
    """This worker's place among all, 0 outside a process group."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """P, 1 outside a process group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def worker_device(use_gpu: bool) -> torch.device:
    """Where this worker computes: the GPU that Ray gave it, else (none asked for, or none that CUDA knows) the CPU."""
    if not use_gpu or not torch.cuda.is_available():
        return torch.device("cpu")
    given = ray.train.torch.get_device()
    return given if isinstance(given, torch.device) else given[0]


def _fit(trainer: TorchTrainer) -> dict[str, Any]:
    result: Any = trainer.fit()
    return dict(result.return_value)


def _trainer(
    loop: Callable[[dict[str, Any]], None],
    config: Mapping[str, Any],
    workers: Workers,
    name: str,
    storage: str,
    threads: int,
    num_workers: int,
) -> TorchTrainer:
    resources: dict[str, float] = {"CPU": workers.cpus_per_worker}
    if workers.use_gpu:
        resources["GPU"] = 1
    run_config: Any = RunConfig  # ray.train gives Train v2's class; its annotations still name the old one
    nccl = workers.use_gpu and bool(ray.get(_has_cuda.remote()))
    return _Trainer(
        _on_worker(loop, threads),  # type: ignore[arg-type]
        train_loop_config=dict(config),
        torch_config=TorchConfig(backend="nccl" if nccl else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=workers.use_gpu, resources_per_worker=resources),
        run_config=run_config(
            name=name,
            storage_path=str(local_path(storage) or storage),
            failure_config=FailureConfig(max_failures=workers.max_failures),
            callbacks=[_StopOnUserError()],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


@ray.remote(num_gpus=1, num_cpus=0)
def _has_cuda() -> bool:
    """Whether what Ray counts as a GPU is one for torch; a Ray that was only told that it has one trains with gloo."""
    return torch.cuda.is_available()


class _Trainer(TorchTrainer):
    """Without the actor that frees the placement group of a lost driver: on one machine Ray ends with its driver, and
    the actor complains once a second about the missing dashboard. Should this method of Ray go away, so does the change."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        if _is_one_machine():
            callbacks = [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]
        return callbacks


class _StopOnUserError(UserCallback):
    """An error raised on purpose would only come again: raised in the controller, it ends the run."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            known = user_error(error)
            if known is not None:
                raise known


_LAST_REPORT: dict[str, Any] = {}  # of this worker process; Ray Train hands back metrics only beside its checkpoints


def _on_worker(loop: Callable[[dict[str, Any]], None], num_threads: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def worker(config: dict[str, Any]) -> dict[str, Any]:
        from mim_ray.training import run  # this function travels by value; the module's state must not

        torch.set_num_threads(num_threads)
        run._quiet()
        run._LAST_REPORT.clear()
        loop(config)
        return dict(run._LAST_REPORT)

    return worker


def _quiet() -> None:
    """Ray Train prints every report in full, from a logger named after its file."""
    folder = str(Path(ray.train.__file__).parent)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(folder):
            logging.getLogger(name).setLevel(logging.WARNING)


def _died_at_start(error: BaseException) -> bool:
    """A worker lost while its group was starting, which Ray Train counts as its controller's failure: no restart."""
    return isinstance(error, ControllerError) and isinstance(error.controller_failure, RayActorError)


def _is_one_machine() -> bool:
    return sum(bool(node["Alive"]) for node in ray.nodes()) == 1
