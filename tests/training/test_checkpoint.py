"""Checkpoints: complete ones only, the last two, exact."""

from __future__ import annotations

from pathlib import Path

import torch

from mim_ray.training import checkpoint


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert checkpoint.load(folder) is None
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    shared = checkpoint.with_prefix("model", model.state_dict())
    shared |= checkpoint.with_prefix("optimizer", checkpoint.optimizer_state(optimizer))
    checkpoint.save(folder, 7, shared, {"own": torch.tensor([1, 2])}, {"position": [1, 2]})
    drawn = torch.rand(3)
    torch.manual_seed(0)
    found = checkpoint.load(folder)
    assert found is not None
    assert (found.step, found.values) == (7, {"position": [1, 2]})
    assert torch.equal(torch.rand(3), drawn)  # the random state is back
    assert found.own["own"].tolist() == [1, 2]
    other = torch.nn.Linear(3, 2)
    other.load_state_dict(checkpoint.under_prefix("model", found.shared))
    fresh = torch.optim.AdamW(other.parameters(), lr=0.1)
    checkpoint.load_optimizer_state(fresh, checkpoint.under_prefix("optimizer", found.shared))
    for net, opt in ((model, optimizer), (other, fresh)):
        opt.zero_grad()
        net(torch.arange(3.0).unsqueeze(0)).sum().backward()
        opt.step()
    assert torch.equal(model.weight, other.weight)


def test_an_unfinished_checkpoint_does_not_count_and_two_are_kept(tmp_path: Path) -> None:
    folder = str(tmp_path)
    for step in (1, 2, 3):
        checkpoint.save(folder, step, {"x": torch.tensor(float(step))}, {}, {})
    (tmp_path / "step-00000003" / "state.json").unlink()
    found = checkpoint.load(folder)
    assert found is not None
    assert found.step == 2
    assert float(found.shared["x"]) == 2.0
    assert not (tmp_path / "step-00000001").exists()
