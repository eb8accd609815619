"""Table 4 by name."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from mim_ray.config.scenario import Csft
from mim_ray.csft.negatives import PastBatches
from mim_ray.csft.objective import LocalBatch
from mim_ray.csft.supervision import Objective, Supervision, make_objective
from mim_ray.errors import DataError


def build(supervision: Supervision, *, multi_level: bool = True, num_categories: int = 4) -> Objective:
    return make_objective(
        supervision, temperature=0.2, learn_temperature=True, text_loss_weight=0.5, image_loss_weight=0.5,
        multi_level=multi_level, width=8, num_categories=num_categories,
    )  # fmt: skip


@pytest.mark.parametrize("supervision", get_args(Supervision))
def test_every_row_of_table_4_learns_a_few_steps(supervision: Supervision) -> None:
    rng = torch.Generator().manual_seed(0)
    styles = torch.randn(4, 8, generator=rng)
    encoder = torch.nn.Linear(8, 8)
    torch.nn.init.orthogonal_(encoder.weight, generator=rng)
    torch.nn.init.constant_(encoder.bias, 3.0)  # at first all embeddings point the same way
    objective, past = build(supervision), PastBatches(2)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *objective.parameters()], lr=0.05)
    losses = []
    for step in range(12):
        style = torch.randint(0, 4, (32,), generator=rng)
        raw = styles[style] + 0.3 * torch.randn(32, 8, generator=rng)
        queries = raw[:16] + 0.1 * torch.randn(16, 8, generator=rng)
        everything, rows = torch.ones(32, dtype=torch.bool), torch.arange(32) + 32 * step
        batch = LocalBatch(
            encoder(queries), encoder(raw).unsqueeze(1).expand(32, 3, 8), everything, everything, rows, rows,
            categories=style,
        )  # fmt: skip
        result = objective(batch, None)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        objective.clamp()
        losses.append(result.loss.item())
        if result.fresh is not None:
            past.push(result.fresh)
    assert losses[-1] < 0.9 * losses[0]
    assert len(past) == (0 if supervision in ("category", "click-binary", "purchase-binary") else 2)


def test_the_setting_names_the_same_choices() -> None:
    assert set(get_args(Csft.model_fields["supervision"].annotation)) == set(get_args(Supervision))


def test_signals_of_the_pairs() -> None:
    signals = {name: Csft(supervision=name).pair_signal for name in get_args(Supervision)}
    assert signals == {
        "category": "any", "click-binary": "click", "purchase-binary": "purchase", "click": "click",
        "purchase": "purchase", "any": "any",
    }  # fmt: skip


@pytest.mark.parametrize("supervision", ["purchase", "purchase-binary"])
def test_one_level_leaves_only_the_fused_embedding(supervision: Supervision) -> None:
    items = torch.randn(8, 3, 8, requires_grad=True)
    everything, rows = torch.ones(8, dtype=torch.bool), torch.arange(8)
    batch = LocalBatch(torch.randn(4, 8), items, everything, everything, rows, rows)
    result = build(supervision, multi_level=False)(batch, None)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(float(result.level_losses[0]))
    assert items.grad is not None
    assert items.grad[:, 1:].abs().max() == 0.0


def test_categories_need_categories() -> None:
    with pytest.raises(DataError, match="the catalogue has 1 of them"):
        build("category", num_categories=1)
