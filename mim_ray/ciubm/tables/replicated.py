"""Engine `torch`: every worker holds the whole tables, and a step touches only the rows that were met.

A table hands out the rows of a batch as a leaf tensor; after `backward` its optimizer moves exactly those rows, so that
a step's cost does not depend on the vocabulary. With several workers the met rows' gradients are exchanged and averaged;
tables that start equal stay equal to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mim_ray.ciubm.tables.gradients import averaged_over_workers, summed_by_row
from mim_ray.ciubm.tables.optimizers import OptimizerName, row_optimizer


class EmbeddingTable:
    """One table of `num_rows` embeddings of width `width` with its optimizer.

    Args:
        std: of the normal distribution that fills the table.
        device: where weights and optimizer are; they start equal on every device.
    """

    def __init__(
        self,
        num_rows: int,
        width: int,
        *,
        optimizer: OptimizerName = "adam",
        generator: torch.Generator | None = None,
        std: float = 0.05,
        device: torch.device | str = "cpu",
    ) -> None:
        self.weight = torch.randn(num_rows, width, generator=generator).mul_(std).to(device)
        self.optimizer = row_optimizer(optimizer)
        self._met: list[tuple[Tensor, Tensor]] = []

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def embed(self, rows: Tensor, *, train: bool = False) -> Tensor:
        """(U,) int64 -> (U, width). With `train` the answer is a leaf whose gradient `step` uses."""
        embedded = self.weight.index_select(0, rows)
        if train:
            self._met.append((rows, embedded.requires_grad_(True)))
        return embedded

    @torch.no_grad()
    def step(self, learning_rate: float, weight_decay: float = 0.0) -> None:
        """Move the rows met since the last step and forget them. Collective: all workers call it together."""
        met = [(rows, embedded.grad) for rows, embedded in self._met if embedded.grad is not None]
        self._met.clear()
        if met:
            rows, gradients = summed_by_row(torch.cat([r for r, _ in met]), torch.cat([g for _, g in met]))
        else:
            rows = torch.zeros(0, dtype=torch.int64, device=self.weight.device)
            gradients = self.weight.new_zeros(0, self.width)
        rows, gradients = averaged_over_workers(rows, gradients)
        self.optimizer.move(self.weight, rows, gradients, learning_rate, weight_decay)


class IdTables:
    """The tables of a CTR model by name; a Tables (face.py)."""

    def __init__(
        self,
        tables: Mapping[str, EmbeddingTable],
        optimizer: OptimizerName = "adam",
        device: torch.device | str = "cpu",
    ) -> None:
        self.tables, self._optimizer, self._device = dict(tables), optimizer, device

    @classmethod
    def create(
        cls,
        num_rows: Mapping[str, int],
        width: int,
        *,
        seed: int,
        optimizer: OptimizerName = "adam",
        device: torch.device | str = "cpu",
    ) -> IdTables:
        """Seeded tables of `num_rows[name]` rows each, the unknown row 0 included."""
        tables = cls({}, optimizer, device)
        generator = torch.Generator().manual_seed(seed)
        for name, rows in num_rows.items():
            tables.tables[name] = EmbeddingTable(rows, width, optimizer=optimizer, generator=generator, device=device)
        return tables

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], *, optimizer: OptimizerName = "adam") -> IdTables:
        """Tables with the weights of `state`."""
        tables = cls({}, optimizer)
        tables.load_state(state)
        return tables

    def __getitem__(self, name: str) -> EmbeddingTable:
        return self.tables[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tables

    def embed(self, rows: Mapping[str, Tensor], *, train: bool = False) -> dict[str, Tensor]:
        """As Tables.embed."""
        return {name: self.tables[name].embed(of_table, train=train) for name, of_table in rows.items()}

    def step(self, learning_rate: float, weight_decay: float = 0.0) -> None:
        """Move all tables' met rows."""
        for name in sorted(self.tables):
            self.tables[name].step(learning_rate, weight_decay)

    def state(self) -> dict[str, Tensor]:
        """Weights by table name (not copies): what serving needs, as flat safetensors."""
        return {name: table.weight for name, table in self.tables.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of `state` (no copies where they are on this device) with fresh optimizers."""
        self.tables = {}
        for name, weight in state.items():
            self.tables[name] = EmbeddingTable(0, weight.shape[1], optimizer=self._optimizer)
            self.tables[name].weight = weight.to(self._device)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Flat tensors TABLE.SLOT and TABLE.num_steps (slots are not copies)."""
        return {
            f"{name}.{slot}": value
            for name, table in self.tables.items()
            for slot, value in table.optimizer.state().items()
        }

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what `optimizer_state` gave (not copies); the tables must have the same names and sizes."""
        slots: dict[str, dict[str, Tensor]] = {name: {} for name in self.tables}
        for key, value in state.items():
            name, _, slot = key.rpartition(".")
            slots[name][slot] = value if slot == "num_steps" else value.to(self._device)
        for name, table in self.tables.items():
            table.optimizer.load_state(slots[name])
