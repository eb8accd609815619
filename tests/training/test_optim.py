"""Parameter groups, learning rate course, non-finite losses."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from mim_ray.errors import NonFiniteLossError
from mim_ray.training.optim import average_gradients, check_finite, parameter_groups, warmup_cosine


def test_only_matrices_decay_and_frozen_parameters_are_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 1))
    model[2].requires_grad_(False)
    groups = parameter_groups(model, 0.1, 0.01)
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups] == [(1, 0.1, 0.01), (3, 0.1, 0.0)]
    assert parameter_groups(model[2].parameters(), 0.1, 0.01) == []


def test_learning_rate_rises_then_falls_to_zero() -> None:
    factors = [warmup_cosine(step, 100, 0.1) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[:10] == sorted(factors[:10])
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0)
    assert warmup_cosine(0, 1, 0.0) == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_is_named_with_its_step(value: float) -> None:
    with pytest.raises(NonFiniteLossError, match="at step 7; the optimizer did not move") as caught:
        check_finite(torch.tensor(value), 7)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301
    assert check_finite(torch.tensor(1.5), 7) == 1.5


def test_without_workers_gradients_stay() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    average_gradients([parameter])
    assert parameter.grad.tolist() == [1.0, 2.0]
