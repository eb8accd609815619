import math

import pytest
import torch

from mim_ray.pretraining.equal_content import chance_loss, equal_content_pairs


def test_pairs_of_equal_title_or_picture_are_found_once():
    keys = torch.tensor([[1, 10], [2, 10], [1, 30]])  # titles 1, 2, 1; pictures 10, 10, 30
    others = torch.tensor([[1, 10], [2, 20], [3, 30]])
    pairs = {tuple(pair) for pair in equal_content_pairs(keys, others).T.tolist()}
    assert pairs == {(0, 0), (1, 0), (1, 1), (2, 0), (2, 2)}


def test_chance_counts_the_candidates_that_are_left():
    pairs = torch.tensor([[0, 0, 1], [0, 3, 1]])  # the first query is without one negative
    assert chance_loss(pairs, 2, 4) == pytest.approx((math.log(3) + math.log(4)) / 2)
