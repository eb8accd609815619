"""What a JSON body may be, looked at before a message is built from it: its depth, its size, UTF-8, finite numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from mim_ray.errors import RequestError

MAX_JSON_DEPTH = 32
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{},"]', re.DOTALL)  # a lone quote: a string without end, found once
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")


def check_json(body: bytes, max_values: int) -> None:
    """
    Args:
        max_values: of strings, numbers, lists and objects, keys left out.

    Raises:
        RequestError: (422) no UTF-8, no JSON, too deep, too many values, a key twice in one object, a number that is not
            finite, or half a character; the sentence holds nothing of the body but the name of a plain key.
    """
    if not body:
        return  # the endpoint says what it wants
    _check_text(body)
    _check_size(body, max_values)
    try:
        value = _DECODER.decode(body.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise RequestError(f"The body is no valid JSON ({error.msg}, at character {error.pos:,}).", 422) from None
    except RequestError:
        raise
    except ValueError:  # Python reads no integer of more than 4,300 digits
        raise RequestError("The body holds a whole number with too many digits.", 422) from None
    if _HALF_CHARACTER.search(body):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RequestError("The body holds half of a character (a lone \\ud800 to \\udfff).", 422) from None


def _check_text(body: bytes) -> None:
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"The body is not UTF-8 text: see its byte {error.start:,}.", 422) from None
    if b"\0" in body:
        raise RequestError("The body holds NUL bytes. Send JSON as UTF-8, without them.", 422)


def _check_size(body: bytes, max_values: int) -> None:
    """Counting brackets and commas in strings too is quick and never too low; only where that is too much they are told apart."""
    if body.count(b"[") + body.count(b"{") <= MAX_JSON_DEPTH and body.count(b",") < max_values:
        return
    depth, values = 0, 1
    for match in _TOKEN.finditer(body):
        token = match[0]
        if token in (b"[", b"{"):
            depth += 1
            values += 1
            if depth > MAX_JSON_DEPTH:
                raise RequestError(f"The body's JSON is nested deeper than {MAX_JSON_DEPTH} levels.", 422)
        elif token in (b"]", b"}"):
            depth -= 1
        elif token == b",":
            values += 1
        elif token == b'"':
            raise RequestError("The body is no valid JSON: a string in it does not end.", 422)
        if values > max_values:
            raise RequestError(f"The body's JSON holds more than {max_values:,} values. Split the request.", 422)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        name = f'"{twice}"' if re.fullmatch(r"[a-z_]{1,40}", twice) else "A key"
        raise RequestError(f"{name} occurs twice in one object of the body. Send it once.", 422)
    return found


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise RequestError("The body holds a number that is too large.", 422)
    return number


def _no_constant(name: str) -> NoReturn:
    raise RequestError(f"The body holds {name}, which is no JSON. Send null where a value is not known.", 422)


_constant: Callable[[str], Any] = _no_constant
_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_float=_finite, parse_constant=_constant)
