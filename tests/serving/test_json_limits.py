import json

import pytest

from mim_ray.errors import RequestError
from mim_ray.serving.json_limits import MAX_JSON_DEPTH, check_json

BAD = {
    "cut": (b'{"a": [1, 2', "no valid JSON"),
    "two values": (b"{} {}", "no valid JSON"),
    "single quotes": (b"{'a': 1}", "no valid JSON"),
    "comment": (b'{"a": 1} // why', "no valid JSON"),
    "trailing comma": (b'{"a": 1,}', "no valid JSON"),
    "line break in a string": (b'{"a": "b\nc"}', "no valid JSON"),
    "only a byte order mark": (b"\xef\xbb\xbf", "no valid JSON"),
    "Latin-1": ('{"a": "ü"}'.encode("latin-1"), "not UTF-8 text: see its byte 7"),
    "overlong slash": (b'{"a": "\xc0\xaf"}', "not UTF-8"),
    "surrogate in UTF-8": (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16-le"), "NUL bytes"),
    "UTF-16 with a mark": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "NaN": (b'{"a": NaN}', "holds NaN"),
    "minus infinity": (b'{"a": [-Infinity]}', "holds -Infinity"),
    "a float beyond all floats": (b'{"a": 1e999}', "too large"),
    "a float of many digits": (b'{"a": ' + b"9" * 400 + b".0}", "too large"),
    "an integer of 5,000 digits": (b'{"a": 1' + b"0" * 5_000 + b"}", "too many digits"),
    "key twice": (b'{"user_id": "a", "user_id": "b"}', '"user_id" occurs twice'),
    "key twice inside": (b'{"a": [{"b": 1, "\\u0062": 2}]}', '"b" occurs twice'),
    "private key twice": (b'{"Jo Doe": 1, "Jo Doe": 2}', "A key occurs twice"),
    "half a character": (b'{"a": "\\ud83d"}', "half of a character"),
    "half a character as a key": (b'{"\\uDe00": 1}', "half of a character"),
    "deep lists": (b"[" * 100 + b"]" * 100, "deeper than"),
    "very deep lists": (b"[" * 200_000, "deeper than"),
    "deep objects": (b'{"a":' * 100 + b"1" + b"}" * 100, "deeper than"),
    "a string without end after many brackets": (b"[]" * 33 + b'"' + b'\\"' * 500_000, "does not end"),
    "many keys, the last one twice": (
        b"{" + b",".join(b'"k%d":0' % n for n in range(900)) + b',"k899":1}',
        "occurs twice",
    ),
    "many numbers": (b"[" + b"0," * 1_000 + b"0]", "more than 1,000 values"),
    "many lists": (b"[" + b"[]," * 1_000 + b"[]]", "more than 1,000 values"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_json_is_refused_in_a_sentence(name):
    body, words = BAD[name]
    with pytest.raises(RequestError) as refused:
        check_json(body, 1_000)
    assert refused.value.status == 422
    assert words in refused.value.message
    assert len(refused.value.message) < 200
    assert "Jo Doe" not in refused.value.message


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        None,
        17,
        "",
        {"a": "[" * 10_000 + "," * 10_000 + '{"' + "\\" * 7},
        {"a": "NaN Infinity -Infinity", "b": "\\ud83d"},
        {"a": ["😀", "\u202e", "\u0000", "ü"]},
        {"a": [1e308, -0.0, 10**300, 1.5e-320]},
        [[[{"a": [1, {"b": [2]}]}]]],
        list(range(1_000)),
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_good_json_passes_whatever_its_strings_hold(value, ascii_only):
    check_json(json.dumps(value, ensure_ascii=ascii_only).encode(), 1_001)


def test_the_depth_is_that_of_open_brackets_and_not_their_number():
    check_json(json.dumps([[[]]] * 200).encode(), 1_000)
    check_json(b"[" * MAX_JSON_DEPTH + b"]" * MAX_JSON_DEPTH, 1_000)
    with pytest.raises(RequestError):
        check_json(b"[" * (MAX_JSON_DEPTH + 1) + b"]" * (MAX_JSON_DEPTH + 1), 1_000)


def test_an_empty_body_is_left_to_the_endpoint():
    check_json(b"", 1)


def test_a_picture_of_ten_megabytes_is_one_value():
    check_json(b'{"item_id": "a", "image": "' + b"NaN," * 2_500_000 + b'", "tags": [[]]}', 1_000)
