"""DMA's symmetric loss against open_clip's `ClipLoss` on gloo workers that take the steps together.

Started by contrastive.py; each worker is this file, run as a process of its own that talks over 127.0.0.1 only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # workers that wait must not take the others' cores

import torch
import torch.distributed as dist
from contrastive_cases import TEMPERATURE, relative_error
from measuring import MEGABYTE, peak_bytes, ratio
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mim_ray.contrastive.symmetric import symmetric_info_nce

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """Of one comparison. Attributes: threads: of each worker."""

    num_workers: int
    batch_size: int
    width: int
    threads: int
    budget_s: float
    with_open_clip: bool = True


def against_open_clip(size: Size) -> dict[str, dict[str, Any]]:
    """`time_vs_open_clip`, `memory_vs_open_clip` (without it: only our side's gradient error).

    Raises:
        RuntimeError: a worker failed; its last lines are the message.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        environment = {**os.environ, "OMP_NUM_THREADS": str(size.threads), "GLOO_SOCKET_IFNAME": "lo"}
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(port), str(result), json.dumps(asdict(size))],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(size.num_workers)
        ]
        errors = []
        try:
            errors = [process.communicate(timeout=300 + 2 * size.budget_s)[1] for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
        failed = [error for process, error in zip(processes, errors, strict=True) if process.returncode]
        if failed:
            raise RuntimeError(f"A gloo worker of the benchmark failed: {failed[0][-2_000:]}")
        found: dict[str, dict[str, Any]] = json.loads(result.read_text())
        return found


def worker(rank: int, port: int, result: Path, size: Size) -> None:
    """All of one worker's steps; rank 0 writes what was measured."""
    torch.set_num_threads(size.threads)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size.num_workers)
    image, text = (_embeddings(size, rank, side).requires_grad_() for side in (0, 1))
    scale = torch.tensor(1 / TEMPERATURE).requires_grad_()
    leaves = (image, text, scale)
    ours = _step(symmetric_info_nce, *leaves)
    found: dict[str, dict[str, Any]] = {"grad": {"value": _gradient_error(size, rank, ours, leaves)}}
    if size.with_open_clip:
        shape = {
            "workers": size.num_workers,
            "threads_per_worker": size.threads,
            "queries": size.batch_size,
            "negatives": size.num_workers * size.batch_size - 1,
            "width": size.width,
        }
        theirs = _step(_open_clip_loss(rank, size.num_workers), *leaves)
        seconds = _paired_seconds(ours, theirs, size.budget_s)
        peaks = [_most(peak_bytes(step, leaves)) for step in (ours, theirs)]
        found["time_vs_open_clip"] = ratio(*seconds) | shape
        found["memory_vs_open_clip"] = {
            "value": round(peaks[0] / peaks[1], 4),
            "mim_ray_mb": round(peaks[0] / MEGABYTE, 2),
            "other_mb": round(peaks[1] / MEGABYTE, 2),
        } | shape
    if rank == 0:
        result.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _open_clip_loss(rank: int, num_workers: int) -> Loss:
    """open_clip's loss at its settings for many workers; its models hand it normalised features, so that is included."""
    loss = _open_clip().ClipLoss(
        local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=num_workers
    )
    return lambda image, text, scale: loss(normalize(image, dim=-1), normalize(text, dim=-1), scale)


def _open_clip() -> Any:
    """open_clip's file of losses alone: the whole package takes ten seconds to import, on every worker."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None
    assert package.submodule_search_locations is not None
    spec = importlib.util.spec_from_file_location("open_clip_loss", f"{package.submodule_search_locations[0]}/loss.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _step(loss: Loss, image: Tensor, text: Tensor, scale: Tensor) -> Callable[[], None]:
    def run() -> None:
        image.grad = text.grad = scale.grad = None
        loss(image, text, scale).backward()

    return run


def _paired_seconds(
    first: Callable[[], None], second: Callable[[], None], budget_s: float, least: int = 3, most: int = 60
) -> tuple[list[float], list[float]]:
    """As `seconds_in_turn`, but a step begins on all workers together and lasts as long as on the slowest."""
    seconds: tuple[list[float], list[float]] = ([], [])
    steps = (first, second)
    for step in steps:
        step()
    end = time.perf_counter() + budget_s
    while True:
        for side in (0, 1) if len(seconds[0]) % 2 == 0 else (1, 0):
            dist.barrier()
            start = time.perf_counter()
            steps[side]()
            seconds[side].append(_most(time.perf_counter() - start))
        pairs = len(seconds[0])
        late = _most(float(time.perf_counter() > end)) > 0  # all stop together
        if pairs >= least and (late or pairs >= most):
            return seconds


def _most(value: float) -> float:
    found = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def _embeddings(size: Size, rank: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * rank + side)
    return torch.randn(size.batch_size, size.width, generator=generator)


def _gradient_error(size: Size, rank: int, step: Callable[[], None], leaves: tuple[Tensor, Tensor, Tensor]) -> float:
    """Against plain logits of the joined batch in float64. Averaged over the workers, gradients are the joined batch's."""
    joined = [
        torch.cat([_embeddings(size, other, side) for other in range(size.num_workers)]).double().requires_grad_()
        for side in (0, 1)
    ]
    scale = leaves[2].detach().double().requires_grad_()
    logits = scale * normalize(joined[0], dim=-1) @ normalize(joined[1], dim=-1).T
    labels = torch.arange(len(logits))
    ((cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2).backward()
    step()
    own = slice(rank * size.batch_size, (rank + 1) * size.batch_size)
    errors = []
    for leaf, reference in zip(leaves, (*joined, scale), strict=True):
        assert leaf.grad is not None
        assert reference.grad is not None
        grad = leaf.grad.double() / size.num_workers
        if leaf.ndim == 0:
            dist.all_reduce(grad)
        errors.append(relative_error(grad, reference.grad[own] if leaf.ndim else reference.grad))
    return _most(max(errors))


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Size(**json.loads(sys.argv[4])))
