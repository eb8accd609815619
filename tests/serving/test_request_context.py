"""Features that a request brings: what is too long is refused, what the model does not look at is not copied."""

from __future__ import annotations

from typing import Any

import pytest

from mim_ray.ciubm.features import Categories, Features, Number
from mim_ray.errors import RequestError
from mim_ray.serving.request_context import MAX_VALUE_CHARS, context_table

FEATURES = Features(
    (Categories("device", None, num_buckets=9), Categories("tags", None, num_buckets=9, max_values=2)),
    (Number("price"),),
)


def columns(context: dict[str, Any], item_context: dict[str, list[Any]], num: int = 3) -> dict[str, Any]:
    table, _ = context_table(FEATURES, context, item_context, range(num), num)
    return table.drop_columns([""]).to_pydict()


def test_a_value_is_there_for_each_candidate_and_a_list_as_far_as_the_model_looks() -> None:
    found = columns({"device": 7, "tags": ["a", None, "c"]}, {"price": [1, 2.5, None]})
    assert found == {"device": ["7"] * 3, "tags": [["a", None]] * 3, "price": [1.0, 2.5, None]}
    assert columns({}, {"tags": [["a", "b", "c"], [], None]})["tags"] == [["a", "b"], [], None]


@pytest.mark.parametrize(
    ("context", "item_context"),
    [
        ({"device": "x" * (MAX_VALUE_CHARS + 1)}, {}),
        ({"device": 10**MAX_VALUE_CHARS}, {}),
        ({"tags": ["a", "x" * (MAX_VALUE_CHARS + 1)]}, {}),
        ({}, {"device": ["a", "x" * (MAX_VALUE_CHARS + 1), "c"]}),
    ],
)
def test_a_value_that_would_be_copied_for_each_candidate_is_not_long(
    context: dict[str, Any], item_context: dict[str, list[Any]]
) -> None:
    with pytest.raises(RequestError, match="has a value of more than 1,000 characters"):
        columns(context, item_context)
    assert columns({"device": "x" * MAX_VALUE_CHARS}, {})["device"] == ["x" * MAX_VALUE_CHARS] * 3


def test_an_endless_list_costs_no_more_than_what_is_looked_at() -> None:
    table, _ = context_table(FEATURES, {"tags": ["a"] * 50_000}, {}, range(2_000), 2_000)
    assert table.nbytes < 200_000
