"""The slow copy of the encoder, and what it is for."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mim_ray.csft.momentum import MomentumEncoder, with_embeddings
from mim_ray.csft.negatives import Candidates, PastBatches
from mim_ray.csft.objective import CsftObjective, LocalBatch, spread
from mim_ray.encoders import ItemEncoder


def make_encoder(value: float) -> nn.Module:
    encoder = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(value)
        encoder[1].running_mean.fill_(value)
    return encoder


def test_parameters_are_averaged_by_hand_and_buffers_copied() -> None:
    encoder = make_encoder(1.0)
    slow = MomentumEncoder(encoder, 0.9)
    for value in (2.0, 4.0):
        slow.update(make_encoder(value))
    # 0.9·1 + 0.1·2 = 1.1; 0.9·1.1 + 0.1·4 = 1.39
    assert [p.item() for p in slow.encoder.parameters()] == pytest.approx([1.39] * 4)
    assert slow.encoder[1].running_mean.item() == 4.0
    assert encoder[0].weight.item() == 1.0
    assert not slow.encoder.training
    assert not any(p.requires_grad for p in slow.encoder.parameters())


def test_it_comes_back_from_its_state() -> None:
    slow = MomentumEncoder(make_encoder(1.0), 0.9)
    slow.update(make_encoder(2.0))
    other = MomentumEncoder(make_encoder(7.0), 0.9)
    other.load_state({key: tensor.clone() for key, tensor in slow.state().items()})
    assert all(torch.equal(a, b) for a, b in zip(slow.state().values(), other.state().values(), strict=True))


def test_an_item_encoder_is_copied_whole(encoder_uri: str) -> None:
    encoder = ItemEncoder.load(encoder_uri)
    slow = MomentumEncoder(encoder, 0.5)
    start = slow.encoder.image_projection.weight.clone()
    assert slow.state().keys() == encoder.state_dict().keys()
    with torch.no_grad():
        encoder.image_projection.weight += 1.0
    slow.update(encoder)
    torch.testing.assert_close(slow.encoder.image_projection.weight, start + 0.5)
    assert slow.encoder.text.tokenize(["red shirt"])


def test_only_the_embeddings_of_the_past_change() -> None:
    flags, rows = torch.tensor([True, False]), torch.arange(2)
    fresh = Candidates(torch.ones(2, 3, 4), flags, ~flags, rows, rows + 5)
    own = torch.zeros(2, 3, 4)
    own[..., 1] = 3.0
    slow = with_embeddings(fresh, own)
    assert slow.embeddings[..., 1].eq(1.0).all()
    assert torch.equal(slow.items, fresh.items)
    assert torch.equal(slow.has_image, fresh.has_image)


def train(momentum: float, seed: int) -> tuple[float, float]:
    """64 past batches of 4 pairs from step 0 on, at a high learning rate; MRR of 200 noisy queries and spread of the items."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    widths = [16, 32, 32, 32, 32]
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    encoder = nn.Sequential(*layers, nn.Linear(32, 16))
    objective = CsftObjective(temperature=0.07, learn=False, text_loss_weight=0.0, image_loss_weight=0.0)
    slow = MomentumEncoder(encoder, momentum) if momentum else None
    optimizer, past = torch.optim.AdamW(encoder.parameters(), lr=0.01), PastBatches(64)
    styles, everything = torch.randn(200, 16, generator=rng), torch.ones(8, dtype=torch.bool)

    def levels(x: Tensor) -> Tensor:
        return x.unsqueeze(1).expand(len(x), 3, -1)

    for _ in range(150):
        rows = torch.randint(0, 200, (8,), generator=rng)
        items = styles[rows] + 0.1 * torch.randn(8, 16, generator=rng)
        queries = styles[rows[:4]] + 0.3 * torch.randn(4, 16, generator=rng)
        batch = LocalBatch(encoder(queries), levels(encoder(items)), everything, everything, rows, rows)
        result = objective(batch, past)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        assert result.fresh is not None
        if slow is None:
            past.push(result.fresh)
        else:
            slow.update(encoder)
            with torch.no_grad():
                past.push(with_embeddings(result.fresh, levels(slow.encoder(items))))
    with torch.no_grad():
        gallery = encoder(styles)
        queries = encoder(styles + 0.3 * torch.randn(200, 16, generator=rng))
        cosines = normalize(queries, dim=-1) @ normalize(gallery, dim=-1).T
    mrr = (1 / (cosines >= cosines.diag().unsqueeze(1)).sum(1)).mean().item()
    flags = torch.ones(200, dtype=torch.bool)
    return mrr, spread(Candidates(levels(gallery), flags, flags, torch.arange(200), torch.arange(200)))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_fast_encoder_flees_from_its_own_past_but_not_from_a_slow_copys(seed: int) -> None:
    """Without the copy all items end up looking alike."""
    mrr, spread_ = train(0.0, seed)
    slow_mrr, slow_spread = train(0.99, seed)
    assert spread_ < 0.1
    assert slow_spread > 0.3
    assert slow_mrr > 2 * mrr


def test_spread_by_hand() -> None:
    x, y = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [5.0, 0.0]])
    flags = torch.ones(2, dtype=torch.bool)
    values = [spread(Candidates(e.unsqueeze(1).expand(2, 3, 2), flags, flags, flags, flags)) for e in (x, y)]
    assert values == pytest.approx([1.0, 0.0])
