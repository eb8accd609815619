"""Releases that must not be served: each function damages a copy of the run's and gives what `promote` should name."""

from __future__ import annotations

import shutil
from pathlib import Path

from mim_ray import artifacts


def without_network(root: str) -> dict[str, str]:
    ctr = f"{root}/ctr/no-network"
    shutil.copytree(f"{root}/ctr/sim-mim", ctr, ignore=shutil.ignore_patterns("network.safetensors", "machines"))
    return {"ctr_model": ctr}


def with_nan(root: str) -> dict[str, str]:
    ctr = f"{root}/ctr/nan"
    shutil.copytree(f"{root}/ctr/sim-mim", ctr, ignore=shutil.ignore_patterns("machines"))
    path = f"{ctr}/seed-0/tables.safetensors"
    tables = {name: table.clone() for name, table in artifacts.read_tensors(path).items()}
    next(iter(tables.values())).view(-1)[-1] = float("nan")
    artifacts.write_tensors(path, tables)
    return {"ctr_model": ctr}


def with_damaged_snapshot(root: str) -> dict[str, str]:
    snapshot = str(artifacts.read_manifest(f"{root}/extraction").metrics["snapshot"])  # type: ignore[union-attr]
    shutil.copytree(snapshot, f"{root}/damaged", symlinks=True)
    largest = max(Path(f"{root}/damaged").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    largest.write_bytes(content)
    return {"snapshot": f"{root}/damaged"}
