"""A trained CTR model on the parameter machines (paper Section 3.5, CMD): ID tables as their tables, networks as dense parameters.

id_tables, dense = write_for_machines(ctr, f"{ctr}/machines")
release = MachineRelease.of(center, read_release(center), id_tables=id_tables, dense=dense)
machines = ParameterMachines.start(state, release, settings)
ranker = load_ranker(ctr, machines=OfRelease(machines.client(), serial))        # holds vocabularies, no table

A table is called TABLE-SEED and its keys are row numbers, so that explicit and hashed vocabularies are served alike; a network
is called network-SEED. Beside them lies one table of numbers, NEWER_TABLE: the category of each item that came between the model
and the release's snapshot (what comes later brings its category with its embedding).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load
from torch import Tensor

from mim_ray import artifacts
from mim_ray.data.ids import Ids
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.snapshot_from_rows import write_snapshot
from mim_ray.representation_center.snapshot_line import current_snapshot

MM_TABLE = "mm"
NEWER_TABLE = "newer_category"


class Answer(Protocol):
    """Rows of one table, as a ParameterClient answers.

    Attributes:
        degraded: some are not found because their shard is away.
    """

    @property
    def matrix(self) -> np.ndarray: ...
    @property
    def found(self) -> np.ndarray: ...
    @property
    def category(self) -> pa.Array: ...
    @property
    def degraded(self) -> bool: ...


class Client(Protocol):
    """A ParameterClient."""

    def get_many(self, asked: Mapping[str, Ids], *, of_serial: int | None = None) -> Mapping[str, Answer]: ...

    def dense(self, name: str, *, of_serial: int | None = None) -> bytes: ...


class Machines(Protocol):
    """What is asked of the parameter machines; a ParameterClient can do it."""

    def get_many(self, asked: Mapping[str, Ids]) -> Mapping[str, Answer]: ...

    def dense(self, name: str) -> bytes: ...


class OfRelease:
    """The machines, asked for one release only: rows and network of a replica never are of two.

    Where they no longer hold it, calls raise ReleaseGoneError.
    """

    def __init__(self, client: Client, serial: int) -> None:
        self.client, self.serial = client, serial

    def get_many(self, asked: Mapping[str, Ids]) -> Mapping[str, Answer]:
        """As `ParameterClient.get_many`."""
        return self.client.get_many(asked, of_serial=self.serial)

    def dense(self, name: str) -> bytes:
        """As `ParameterClient.dense`."""
        return self.client.dense(name, of_serial=self.serial)


def write_for_machines(ctr: str, output: str) -> tuple[dict[str, str], dict[str, str]]:
    """Write the ID tables of the CTR model at `ctr` as snapshots below `output`, those that are not there yet.

    Returns:
        URIs of the tables and of the dense parameters by name, as MachineRelease takes them.
    """
    tables: dict[str, str] = {}
    for seed in artifacts.read_json(f"{ctr}/ctr.json")["seeds"]:
        for name, weight in artifacts.read_tensors(f"{ctr}/seed-{seed}/tables.safetensors").items():
            line = f"{output}/{name}-{seed}"
            state = current_snapshot(line)
            if state is None:
                rows = [str(row) for row in range(len(weight))]
                tables[f"{name}-{seed}"] = write_snapshot(line, rows, weight.numpy(), encoder_version="none")
            else:
                tables[f"{name}-{seed}"] = f"{line}/{state}"
    return tables, networks_of(ctr)


def networks_of(ctr: str) -> dict[str, str]:
    """URIs of the networks of the CTR model at `ctr`, by the names that they have on the machines."""
    seeds = artifacts.read_json(f"{ctr}/ctr.json")["seeds"]
    return {f"network-{seed}": f"{ctr}/seed-{seed}/network.safetensors" for seed in seeds}


def write_newer_categories(line: str, named: Mapping[str, str], categories: Sequence[str]) -> str:
    """Write NEWER_TABLE as a new state of a line: item id -> (1,) row in the category table; the state's URI.

    Args:
        named: item id -> category. One that the model does not know is left out.
        categories: the model's, the first has row 1.
    """
    row_of = {name: row for row, name in enumerate(categories, start=1)}
    rows = {item: row_of[name] for item, name in named.items() if name in row_of}
    values = np.fromiter(rows.values(), np.float32, len(rows)).reshape(-1, 1)
    return write_snapshot(line, list(rows), values, encoder_version="none")


class MachineTables:
    """The ID tables of one seed where the machines hold them: reads only."""

    def __init__(self, machines: Machines, seed: int, names: Collection[str]) -> None:
        self._machines, self._seed, self._names = machines, seed, frozenset(names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def embed(self, rows: Mapping[str, Tensor], *, train: bool = False) -> dict[str, Tensor]:
        """(U,) int64 rows by table name -> (U, width), in one call of the machines.

        Raises:
            ArtifactError: the machines hold the tables of another model.
        """
        assert not train, "the parameter machines serve"
        asked = {f"{name}-{self._seed}": [str(row) for row in of_table.tolist()] for name, of_table in rows.items()}
        answers = self._machines.get_many(asked)
        embedded = {}
        for name in rows:
            answer = answers[f"{name}-{self._seed}"]
            if not answer.found.all():
                row = asked[f"{name}-{self._seed}"][int(np.argmin(answer.found))]
                raise ArtifactError(
                    f"The parameter machines have no row {row} of table {name}-{self._seed}: they hold another model's tables. "
                    "Load the release that names this model's."
                )
            embedded[name] = torch.from_numpy(np.ascontiguousarray(answer.matrix, np.float32))
        return embedded


def network_of(machines: Machines, seed: int) -> dict[str, Tensor]:
    """Weights of one seed's network.

    Raises:
        ArtifactError: the release has none.
    """
    return load(machines.dense(f"network-{seed}"))
