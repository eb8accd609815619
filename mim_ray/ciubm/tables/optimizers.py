"""Optimizers of embedding tables that read and write only the rows a step met.

Rows come distinct, with the gradient of each. State is kept per table row and made when the first row moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

OptimizerName = Literal["adam", "rowwise_adagrad"]
_CHUNK_ROWS = 8_192  # what a chunk needs stays in the processor's cache


class RowOptimizer:
    """The state of one table and the number of steps; `move` is the rule."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.slots: dict[str, Tensor] = {}

    def move(
        self, weight: Tensor, rows: Tensor, gradients: Tensor, learning_rate: float, weight_decay: float = 0.0
    ) -> None:
        """Move `weight[rows]` ((U,) distinct) by `gradients` (U, width) in place."""
        self.num_steps += 1
        if len(rows):
            self._move(weight, rows, gradients, learning_rate, weight_decay)

    def state(self) -> dict[str, Tensor]:
        """Number of steps and slots by name (not copies); without slots before a row moved."""
        return {"num_steps": torch.tensor(self.num_steps), **self.slots}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""
        self.num_steps = int(state["num_steps"])
        self.slots = {name: slot for name, slot in state.items() if name != "num_steps"}

    def _slot(self, name: str, *shape: int, like: Tensor) -> Tensor:
        if name not in self.slots:
            self.slots[name] = like.new_zeros(*shape)
        return self.slots[name]

    def _move(self, weight: Tensor, rows: Tensor, gradients: Tensor, learning_rate: float, weight_decay: float) -> None:
        raise NotImplementedError


class LazyAdam(RowOptimizer):
    """Adam on the rows met (the semantics of torch.optim.SparseAdam): other rows' moments do not decay, and the step
    number of the bias correction counts all steps. Weight decay is decoupled, as in AdamW.
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__()
        self.betas, self.eps = betas, eps

    def _move(self, weight: Tensor, rows: Tensor, gradients: Tensor, learning_rate: float, weight_decay: float) -> None:
        first, second = self.betas
        means, squares = (
            self._slot("mean", *weight.shape, like=weight),
            self._slot("square", *weight.shape, like=weight),
        )
        correction = (1 - second**self.num_steps) ** 0.5 / (1 - first**self.num_steps)
        for some, gradient in zip(rows.split(_CHUNK_ROWS), gradients.split(_CHUNK_ROWS), strict=True):
            mean = means.index_select(0, some).lerp_(gradient, 1 - first)
            square = squares.index_select(0, some).mul_(second).addcmul_(gradient, gradient, value=1 - second)
            means.index_copy_(0, some, mean)
            squares.index_copy_(0, some, square)
            current = weight.index_select(0, some)
            if weight_decay > 0:
                current.mul_(1 - learning_rate * weight_decay)
            current.addcdiv_(mean, square.sqrt_().add_(self.eps), value=-learning_rate * correction)
            weight.index_copy_(0, some, current)


class RowwiseAdagrad(RowOptimizer):
    """Adagrad with one accumulator per row (FBGEMM's EXACT_ROWWISE_ADAGRAD):

        s_r <- s_r + mean_k g_rk^2        w_r <- w_r - learning_rate g_r / (sqrt(s_r) + eps)

    Weight decay is added to the gradient (L2), before its square.
    """

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps

    def _move(self, weight: Tensor, rows: Tensor, gradients: Tensor, learning_rate: float, weight_decay: float) -> None:
        squares = self._slot("square", len(weight), like=weight)
        current = weight.index_select(0, rows)
        if weight_decay > 0:
            gradients = gradients.add(current, alpha=weight_decay)
        mean_square = torch.linalg.vector_norm(gradients, dim=1).square_().div_(weight.shape[1])
        square = squares.index_select(0, rows).add_(mean_square)
        squares.index_copy_(0, rows, square)
        step = square.sqrt_().add_(self.eps).reciprocal_().unsqueeze(1)  # (U, 1)
        weight.index_copy_(0, rows, current.addcmul_(gradients, step, value=-learning_rate))


def row_optimizer(name: OptimizerName) -> RowOptimizer:
    """A fresh optimizer for one table."""
    return LazyAdam() if name == "adam" else RowwiseAdagrad()
