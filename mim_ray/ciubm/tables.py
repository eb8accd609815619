"""ID embedding tables, torch engine: a step touches only the rows that were met.

A table hands out the rows of a batch as a leaf tensor; after `backward` the optimizer moves exactly those rows with
lazy Adam (the semantics of torch.optim.SparseAdam), so that a step's cost does not depend on the vocabulary. With
several workers each holds the whole table; the met rows' gradients are exchanged and averaged. Row 0 is the unknown id.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


class EmbeddingTable:
    """One table of `num_rows` embeddings of width `width` with its lazy Adam state.

    Args:
        std: of the normal distribution that fills the table.
    """

    def __init__(
        self,
        num_rows: int,
        width: int,
        *,
        generator: torch.Generator | None = None,
        std: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.weight = torch.randn(num_rows, width, generator=generator) * std
        self.betas, self.eps = betas, eps
        self.num_steps = 0
        self._mean: Tensor | None = None
        self._square: Tensor | None = None
        self._met: list[tuple[Tensor, Tensor]] = []

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def embed(self, ids: Tensor, *, train: bool = False) -> Tensor:
        """(U,) int64 -> (U, width). With `train` the rows are a leaf whose gradient `step` uses."""
        rows = self.weight[ids]
        if train:
            rows.requires_grad_(True)
            self._met.append((ids, rows))
        return rows

    @torch.no_grad()
    def step(self, learning_rate: float, weight_decay: float = 0.0) -> None:
        """Move the rows met since the last step by Adam and forget them. Collective: all workers call it together."""
        ids, gradients = self._gradients()
        self._met.clear()
        self.num_steps += 1
        if not len(ids):
            return
        if self._mean is None or self._square is None:
            self._mean, self._square = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        first, second = self.betas
        mean = self._mean[ids].lerp_(gradients, 1 - first)
        square = self._square[ids].mul_(second).addcmul_(gradients, gradients, value=1 - second)
        self._mean[ids], self._square[ids] = mean, square
        correction = (1 - second**self.num_steps) ** 0.5 / (1 - first**self.num_steps)
        move = mean / square.sqrt_().add_(self.eps) * (learning_rate * correction)
        if weight_decay > 0:
            move += learning_rate * weight_decay * self.weight[ids]
        self.weight[ids] -= move

    def _gradients(self) -> tuple[Tensor, Tensor]:
        """The met rows, each once, and the mean over workers of their gradients."""
        met = [(ids, rows.grad) for ids, rows in self._met if rows.grad is not None]
        ids = torch.cat([i for i, _ in met]) if met else torch.zeros(0, dtype=torch.int64)
        gradients = torch.cat([g for _, g in met]) if met else self.weight.new_zeros(0, self.width)
        if dist.is_initialized() and dist.get_world_size() > 1:
            ids, gradients = _exchange(ids, gradients)
        unique, inverse = torch.unique(ids, return_inverse=True)
        if len(unique) == len(ids):
            total = torch.empty_like(gradients).index_copy_(0, inverse, gradients)
        else:
            total = gradients.new_zeros(len(unique), gradients.shape[1]).index_add_(0, inverse, gradients)
        return unique, total


class IdTables:
    """The tables of a CTR model by name: item, category and, by choice, user."""

    def __init__(self, tables: Mapping[str, EmbeddingTable]) -> None:
        self.tables = dict(tables)

    @classmethod
    def create(cls, num_rows: Mapping[str, int], width: int, *, seed: int) -> IdTables:
        """Seeded tables of `num_rows[name]` rows each, the unknown row 0 included."""
        generator = torch.Generator().manual_seed(seed)
        return cls({name: EmbeddingTable(rows, width, generator=generator) for name, rows in num_rows.items()})

    def __getitem__(self, name: str) -> EmbeddingTable:
        return self.tables[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tables

    def step(self, learning_rate: float, weight_decay: float = 0.0) -> None:
        """Move all tables' met rows."""
        for name in sorted(self.tables):
            self.tables[name].step(learning_rate, weight_decay)

    def state(self) -> dict[str, Tensor]:
        """Weights by table name: what serving needs, as flat safetensors."""
        return {name: table.weight for name, table in self.tables.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> IdTables:
        """Tables with the weights of `state`."""
        tables = {}
        for name, weight in state.items():
            tables[name] = EmbeddingTable(0, weight.shape[1])
            tables[name].weight = weight
        return cls(tables)


def _exchange(ids: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """All workers' ids and gradients, the latter divided by P (as DDP averages)."""
    world = dist.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64, device=ids.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(ids)], device=ids.device))
    longest = max(int(size) for size in sizes)
    all_ids = [torch.zeros(longest, dtype=torch.int64, device=ids.device) for _ in range(world)]
    all_gradients = [gradients.new_zeros(longest, gradients.shape[1]) for _ in range(world)]
    padding = longest - len(ids)
    dist.all_gather(all_ids, torch.nn.functional.pad(ids, (0, padding)))
    dist.all_gather(all_gradients, torch.nn.functional.pad(gradients, (0, 0, 0, padding)))
    kept = [(i[: int(n)], g[: int(n)]) for i, g, n in zip(all_ids, all_gradients, sizes, strict=True)]
    return torch.cat([i for i, _ in kept]), torch.cat([g for _, g in kept]) / world
