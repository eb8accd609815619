"""The declared features that a ranking request brings, as rows of a table: from there on the code is that of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from sys import float_info
from typing import Any

import pyarrow as pa

from mim_ray.ciubm.features import Features
from mim_ray.errors import RequestError

MAX_VALUE_CHARS = 1_000
_TYPES = {"categorical": pa.string(), "dense": pa.float64(), "multi": pa.list_(pa.string())}
_WORDS = {
    "categorical": "a string or a whole number",
    "dense": "a number",
    "multi": "a list of strings or whole numbers",
}


def context_table(
    features: Features,
    context: Mapping[str, Any],
    item_context: Mapping[str, Sequence[Any]],
    places: Sequence[int],
    num_candidates: int,
) -> tuple[pa.Table, list[str]]:
    """
    Args:
        features: the model's. Of a list, values that it does not look at are left out here already.
        context: values of the request. item_context: values of each of the request's `num_candidates` candidates.
        places: the candidates to rank, by their place in the request.

    Returns:
        a row for each of `places`, and the features that the request lacks for one of them or more.

    Raises:
        RequestError: (422) a feature that the model does not have or that is given twice, a value of another type or longer than
            MAX_VALUE_CHARS, or not one for each candidate.
    """
    kinds, max_values = features.kinds, features.max_values
    for key, given in (("context", context), ("item_context", item_context)):
        for name in given:
            if name not in kinds:
                known = ", ".join(kinds) or "none"
                raise RequestError(f"{key}.{name} is no feature of this model; it has {known}. Take it out.", 422)
    columns, absent = {}, []
    for name, kind in kinds.items():
        if name in item_context:
            values = item_context[name]
            if name in context:
                raise RequestError(f"{name} is both in context and in item_context. Send it in one of them.", 422)
            if len(values) != num_candidates:
                raise RequestError(
                    f"item_context.{name} holds {len(values):,} values for {num_candidates:,} candidates. "
                    "Send one for each, in the same order.",
                    422,
                )
            most = max_values.get(name)
            read = [_value(f"item_context.{name}[{place}]", values[place], kind, most) for place in places]
        else:
            read = [_value(f"context.{name}", context.get(name), kind, max_values.get(name))] * len(places)
        if any(value is None for value in read):
            absent.append(name)
        columns[name] = pa.array(read, _TYPES[kind])
    return pa.table({"": pa.nulls(len(places)), **columns}), absent


def _value(where: str, value: Any, kind: str, most: int | None) -> str | float | list[str | None] | None:
    """What the column holds; None for null and for a number that is no float64 or not finite."""
    if value is None:
        return None
    if kind == "dense":
        if isinstance(value, int | float):
            return float(value) if abs(value) <= float_info.max else None
    elif kind == "multi":
        if isinstance(value, list) and all(one is None or _is_name(one) for one in value):
            return [None if one is None else _name(where, one) for one in value[:most]]
    elif _is_name(value):
        return _name(where, value)
    raise RequestError(f"{where} must be {_WORDS[kind]}.", 422)


def _name(where: str, value: str | int) -> str:
    text = str(value)
    if len(text) > MAX_VALUE_CHARS:  # it is copied for each candidate
        raise RequestError(f"{where} has a value of more than {MAX_VALUE_CHARS:,} characters. Shorten it.", 422)
    return text


def _is_name(value: Any) -> bool:
    if isinstance(value, str):
        return not any("\ud800" <= letter <= "\udfff" for letter in value)  # halves of a character: no UTF-8
    return isinstance(value, int) and not isinstance(value, bool)
