"""Checkpoints inside a run: what a restarted group of workers goes on from. Safetensors and JSON, never pickle.

    step-00000200/shared.safetensors   model, optimizer, whatever is equal on all workers (written by rank 0)
    step-00000200/rank-0.safetensors   random state and more of each worker
    step-00000200/state.json           JSON values of all workers; written last, it makes the checkpoint complete

The last two complete ones are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mim_ray import artifacts
from mim_ray.training.collect import collective_device

_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """What `load` found: step, how many workers wrote it, tensors shared by all, this worker's tensors and JSON values."""

    step: int
    num_workers: int
    shared: dict[str, Tensor]
    own: dict[str, Tensor]
    values: dict[str, Any]


def save(
    folder: str, step: int, shared: Mapping[str, Tensor], own: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Keep the state before `step`. A collective: every worker calls it with its `own` tensors and JSON `values`."""
    rank, world = _place()
    uri = f"{folder}/step-{step:08d}"
    artifacts.write_tensors(f"{uri}/rank-{rank}.safetensors", {**own, **_random_states()})
    if rank == 0:
        artifacts.write_tensors(f"{uri}/shared.safetensors", shared)
    all_values: list[Any] = [json.dumps(dict(values))]
    if world > 1:
        all_values = _gather_text(all_values[0], world)
    if rank == 0:  # the gathering above is also the sign that every worker's file is there
        artifacts.write_json(f"{uri}/state.json", {"step": step, "values": [json.loads(text) for text in all_values]})
        for old in _complete(folder)[:-_KEPT]:
            artifacts.remove(old)


def load(folder: str) -> Checkpoint | None:
    """The newest complete checkpoint, None without.

    Written by this many workers, torch's random states are set back. Written by another number, `own` is empty, `values` are
    those of the first worker, and random states stay as they are.
    """
    rank, world = _place()
    complete = _complete(folder)
    if not complete:
        return None
    uri = complete[-1]
    state = artifacts.read_json(f"{uri}/state.json")
    step, values, shared = state["step"], state["values"], artifacts.read_tensors(f"{uri}/shared.safetensors")
    if len(values) != world:
        return Checkpoint(step, len(values), shared, {}, values[0])
    own = artifacts.read_tensors(f"{uri}/rank-{rank}.safetensors")
    torch.set_rng_state(own.pop("random"))
    on_gpu = own.pop("random_cuda", None)
    if on_gpu is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(on_gpu)
    return Checkpoint(step, world, shared, own, values[rank])


def _random_states() -> dict[str, Tensor]:
    states = {"random": torch.get_rng_state()}
    return states | ({"random_cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors, flat: "3.exp_avg" is of its fourth parameter."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": torch.as_tensor(value) for index, part in state.items() for name, value in part.items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys put under `prefix`, to join several states in one file."""
    return {f"{prefix}/{key}": value for key, value in tensors.items()}


def under_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `with_prefix`."""
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{prefix}/")}


def _complete(folder: str) -> list[str]:
    suffix = "/state.json"
    return sorted(uri[: -len(suffix)] for uri in artifacts.list_files(folder, suffix[1:]) if uri.endswith(suffix))


def _place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _gather_text(text: str, world: int) -> list[str]:
    """The workers' texts, as byte tensors of one length (no pickle)."""
    device = collective_device()
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device))
    longest = int(max(sizes))
    padded = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in range(world)]
    dist.all_gather(padded, torch.nn.functional.pad(data, (0, longest - len(data))))
    return [bytes(part[: int(size)].tolist()).decode() for part, size in zip(padded, sizes, strict=True)]
