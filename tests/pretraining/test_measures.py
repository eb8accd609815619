import numpy as np
import pytest
import torch

from mim_ray.pretraining.measures import SharedMean, alignment_recalls, own_batches, recall, shared_rows


def test_recall_by_hand():
    titles, same = torch.eye(4), torch.eye(4, dtype=torch.bool)
    images = torch.tensor([[9.0, 1, 0, 0], [9, 8, 0, 0], [0, 0, 1, 0], [0.0, 0, 0, 5]])
    assert recall(images, titles, same, 1) == 0.75  # the second image prefers the first title
    assert recall(images, titles, same, 2) == 1.0
    same[1, 0] = True  # which has the same words as its own
    assert recall(images, titles, same, 1) == 1.0


def test_recall_does_not_profit_from_equal_embeddings():
    same, diagonal = torch.ones(100, 3), torch.eye(100, dtype=torch.bool)
    assert recall(same, same, diagonal, 10) == 0.0  # everybody is tied at place 50
    assert recall(same[:15], same[:15], diagonal[:15, :15], 10) == 1.0


def test_both_directions_are_measured():
    titles = torch.eye(3)
    images = torch.tensor([[1.0, 0, 0], [1, 0.5, 0], [1, 0, 0.5]])  # all near the first title
    keys = torch.arange(6).view(3, 2)
    result = alignment_recalls(images, titles, keys)
    assert result["image_to_text_recall@1"] == pytest.approx(1 / 3, abs=1e-4)
    assert result["text_to_image_recall@1"] == 1.0
    assert result["chance@1"] == pytest.approx(1 / 3, abs=1e-4)
    assert result["chance@10"] == 1.0
    assert result["num_items"] == 3


def test_one_worker_measures_everything():
    rows = np.arange(600)
    assert np.concatenate([batch for _, batch in own_batches(rows)]).tolist() == rows.tolist()
    mean = SharedMean(torch.device("cpu"))
    assert mean.value() is None
    mean.add(torch.tensor(1.0), 3)
    mean.add(torch.tensor(2.0), 1)
    assert mean.value() == 1.25
    assert shared_rows(600, lambda numbers: torch.from_numpy(numbers)).tolist() == rows.tolist()
