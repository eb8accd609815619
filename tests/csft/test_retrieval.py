"""Where the purchased item ranks."""

from __future__ import annotations

import numpy as np
import torch

from mim_ray.csft.retrieval import ages, choose_gallery, mean_drift, ranks_of_positives


def test_ranks_by_hand() -> None:
    items = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    positive = torch.tensor([1, 1, 0])
    nothing = np.zeros(3, bool)
    ranks = ranks_of_positives(queries, items, positive, np.zeros(3, np.int64), nothing)
    assert ranks.tolist() == [2.0, 2.0, 3.5]  # item 0 and item 3 tie for the third query
    left_out = ranks_of_positives(queries, items, positive, np.array([0, 0, 2]), np.array([True, False, True]))
    assert left_out.tolist() == [1.0, 2.0, 2.5]


def test_an_encoder_that_collapsed_gets_the_middle_rank() -> None:
    ranks = ranks_of_positives(
        torch.ones(2, 3), torch.ones(9, 3), torch.tensor([0, 8]), np.zeros(2, np.int64), np.zeros(2, bool)
    )
    assert ranks.tolist() == [5.0, 5.0]


def test_a_sampled_gallery_holds_every_positive() -> None:
    positives = np.array([7, 3, 7, 99])
    assert choose_gallery(np.arange(5), positives, 100, 0).tolist() == [0, 1, 2, 3, 4, 7, 99]
    sampled = choose_gallery(np.arange(1_000), positives, 10, 0)
    assert len(sampled) == 10
    assert {3, 7, 99} <= set(sampled)


def test_drift_is_the_mean_cosine() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert mean_drift(x, 3 * x) == 1.0
    assert mean_drift(x, torch.tensor([[0.0, 1.0], [0.0, 1.0]])) == 0.5
    assert (list(ages(0)), list(ages(1)), list(ages(10))) == ([], [1], [1, 5, 10])
