"""Past batches and masks."""

from __future__ import annotations

import pytest
import torch

from mim_ray.csft.negatives import Candidates, PastBatches, masked_pairs


def make_candidates(value: int, rows: int = 2) -> Candidates:
    flags = torch.arange(rows) % 2 == 0
    return Candidates(
        torch.full((rows, 3, 4), float(value)),
        flags,
        ~flags,
        torch.arange(rows) + 10 * value,
        torch.full((rows,), value),
    )


def test_past_batches_start_empty_and_hold_the_last_k_whole_batches() -> None:
    past = PastBatches(2)
    assert past.current() is None
    for value in (1, 2, 3):
        past.push(make_candidates(value))
    held = past.current()
    assert held is not None
    assert len(past) == 2
    assert sorted(held.items.tolist()) == [20, 21, 30, 31]
    assert held.embeddings.dtype == torch.bfloat16
    torch.testing.assert_close(held.embeddings.float().norm(dim=-1), torch.ones(4, 3), rtol=1e-2, atol=0)
    newest, oldest = past.batch_of_age(1), past.batch_of_age(2)
    assert newest is not None
    assert oldest is not None
    assert (newest.contents.tolist(), oldest.contents.tolist()) == ([3, 3], [2, 2])
    assert past.batch_of_age(3) is None


def test_no_past_batches_stay_no_past_batches() -> None:
    past = PastBatches(0)
    past.push(make_candidates(1))
    assert past.current() is None
    assert past.state() == {}


def test_past_batches_come_back_from_their_state() -> None:
    past, other = PastBatches(3), PastBatches(3)
    for value in (1, 2, 3, 4):
        past.push(make_candidates(value))
    other.load_state({key: tensor.clone() for key, tensor in past.state().items()})
    for batches in (past, other):
        batches.push(make_candidates(5))
    mine, theirs = past.current(), other.current()
    assert mine is not None
    assert theirs is not None
    assert torch.equal(mine.items, theirs.items)
    assert torch.equal(mine.embeddings, theirs.embeddings)


def test_masked_are_the_own_positive_again_its_double_and_the_users_purchases() -> None:
    pairs = masked_pairs(
        positive_items=torch.tensor([5, 6]),
        positive_contents=torch.tensor([50, 60]),
        positive_index=torch.tensor([0, 1]),
        candidate_items=torch.tensor([5, 6, 7, 5, 8, 9]),
        candidate_contents=torch.tensor([50, 60, 60, 50, 51, 91]),
        bought=(torch.tensor([0, 0, 1]), torch.tensor([5, 9, 7])),
    )
    assert {(int(a), int(b)) for a, b in pairs.T} == {(0, 3), (0, 5), (1, 2)}
    assert pairs.shape == (2, 3)  # each once, though item 7 is a double and a purchase
    without = masked_pairs(
        torch.tensor([5]), torch.tensor([50]), torch.tensor([0]), torch.tensor([5, 9]), torch.tensor([50, 91]), None
    )
    assert without.shape == (2, 0)


@pytest.mark.parametrize("level", ["mm", "text", "image"])
def test_only_items_with_a_modality_take_part_at_its_level(level: str) -> None:
    valid = make_candidates(1).valid(level)
    assert (None if valid is None else valid.tolist()) == {"mm": None, "text": [True, False], "image": [False, True]}[
        level
    ]
