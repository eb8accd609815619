"""The user side of a ranking request is computed once, and nothing comes out differently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mim_ray.ciubm.dataset import IndexedBatch, gather_batch
from mim_ray.ciubm.export import Ranker
from mim_ray.ciubm.request import Request

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "average": ("average", {}),
    "base": ("din", {"content_width": None}),
    "bst": ("bst", {}),
    "bst with times": ("bst", {"time_gaps": True}),
    "dien": ("dien", {}),
    "din": ("din", {}),
    "din with everything": (
        "din",
        {
            "content_norm": "mean",
            "num_histogram_bins": 5,
            "similarity_summary": True,
            "target_content": True,
            "missing_content": True,
            "content_attention": True,
            "query_interest": True,
            "query_width": 8,
        },
    ),
    "no id module": ("din", {"id_module": False, "content_norm": "log"}),
    "sim": ("sim", {}),
    "sim, few searched": ("sim", {"num_searched": 2, "num_short": 4, "content_attention": True}),
    "sim, soft, dien, times": (
        "sim",
        {"sim_search": "soft", "sim_short": "dien", "time_gaps": True, "num_searched": 3},
    ),
    "sim, soft": ("sim", {"sim_search": "soft", "num_searched": 5}),
    "twin": ("twin", {}),
    "twin, few searched": ("twin", {"num_searched": 3, "time_gaps": True, "content_attention": True}),
    "twin, searched by mask": ("twin", {"num_searched": 8}),
}


def asked(ranker: Ranker, num_behaviors: int, num_candidates: int) -> tuple[Request, IndexedBatch]:
    generator = np.random.default_rng(num_behaviors)
    behaviors = [f"item-{number}" for number in generator.integers(0, 60, num_behaviors)]
    candidates = [f"item-{number}" for number in generator.permutation(60)[: num_candidates - 1]] + ["new"]
    request = ranker.request(
        "user-3",
        behaviors,
        candidates,
        behavior_times=list(range(0, 10**9 * num_behaviors, 10**9)),
        timestamp=10**9 * num_behaviors,
        query_mm=generator.normal(size=8),
    )
    found = generator.random(len(request.ids)) < 0.8
    vectors = generator.normal(size=(len(request.ids), 8)).astype(np.float32)
    names = ["category-2" if one == "new" else None for one in request.ids]
    return request, request.batch(vectors, found, names)


def for_each(batch: IndexedBatch) -> IndexedBatch:
    """The same with the user side repeated for every candidate, as a batch of impressions has it."""
    names = ("user", "behaviors", "behavior_mask", "behavior_age_s", "query")
    once = {name: getattr(batch, name) for name in names}
    size = len(batch.target)
    return replace(batch, **{n: None if v is None else v.repeat(size, *[1] * (v.dim() - 1)) for n, v in once.items()})


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("num_behaviors", "num_candidates"), [(30, 50), (100, 7), (3, 2), (0, 4), (5, 1)])
def test_all_candidates_at_once_score_as_each_alone(
    name: str, num_behaviors: int, num_candidates: int, untrained_ranker: Callable[..., Ranker]
) -> None:
    backbone, options = OPTIONS[name]
    ranker = untrained_ranker(backbone, **options)
    request, batch = asked(ranker, num_behaviors, num_candidates)
    assert len(batch.behaviors) == len(batch.user) == 1
    prob = ranker.predict(batch)
    assert prob.shape == (num_candidates,)
    np.testing.assert_allclose(prob, ranker.predict(for_each(batch)), rtol=0, atol=1e-6)
    assert num_candidates < 3 or prob.std() > 1e-3
    assert request.unknown.tolist() == [False] * (num_candidates - 1) + [True]


def test_the_user_side_is_looked_up_once(untrained_ranker: Callable[..., Ranker]) -> None:
    ranker = untrained_ranker("din")
    _, batch = asked(ranker, 30, 50)
    embedded = gather_batch(batch, ranker.models[0][1])
    assert embedded.target.shape == (50, 16)
    assert embedded.same_category.shape == (50, 30)
    for values in (embedded.behaviors, embedded.behavior_mask, embedded.user, embedded.behavior_mm):
        assert values is not None
        assert len(values) == 1


def test_items_without_content_and_no_content_at_all_are_zeros(untrained_ranker: Callable[..., Ranker]) -> None:
    ranker = untrained_ranker("din")
    request, batch = asked(ranker, 4, 3)
    vectors = np.ones((7, 8), np.float32)
    none = request.batch(vectors, np.zeros(7, bool), [None] * 7)
    assert torch.equal(none.mm, request.batch().mm)  # type: ignore[arg-type]
    assert (none.mm == 0).all()
    one = request.batch(vectors, np.arange(7) == 2, [None] * 7)
    assert one.mm is not None
    assert one.mm.sum(dim=1).tolist() == [0, 0, 8, 0, 0, 0, 0]
    assert int(batch.category[-1]) == 3, "the category of an item that the model does not know comes with its embedding"
    assert int(none.category[-1]) == 0
