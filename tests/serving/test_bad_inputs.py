"""What strangers send, as tables: each bad request gets its 4xx with a sentence, and the next good one is answered.

A new POST route joins by one entry in ROUTES (everything in ANY_BODY is tried on it) and one table of its own.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import struct
import sys
import urllib.parse
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from mim_ray.config.scenario import Serving
from mim_ray.serving import keys
from mim_ray.serving.keys import new_key
from mim_ray.serving.limits import guarded

USER = "private-user-4711"
KEY, LINE = new_key("shop", ["rank", "write", "admin"])
JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Route:
    app: str
    path: str
    good: dict[str, Any]


ROUTES = {
    "rank": Route("ranking", "/v1/rank", {"user_id": USER, "candidates": ["i1", "i2"]}),
    "items": Route("items", "/v1/items", {"item_id": "bad-inputs", "title": "red mug"}),
    "events": Route("ranking", "/v1/events", {"user_id": USER, "item_id": "i1", "event": "click"}),
    "search": Route("ranking", "/v1/search/image", {"title": "red mug"}),
}


@dataclass(frozen=True)
class Bad:
    """A body, or what differs from the route's good one; and words of the sentence it gets."""

    words: str
    body: bytes | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    without: str | None = None
    headers: dict[str, Any] = field(default_factory=lambda: JSON)
    status: int = 422


def image(data: bytes) -> str:
    return base64.b64encode(data).decode()


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + body
        + struct.pack(">I", zlib.crc32(body))
        + struct.pack(">I", 10**6)
        + b"IDAT"
    )


ANY_BODY = {
    "nothing": Bad("Content-Type: application/json", b""),
    "no JSON": Bad("no valid JSON", b"hello"),
    "cut JSON": Bad("no valid JSON", b'{"user_id": "private-user-4711'),
    "JSON twice": Bad("no valid JSON", b"{}{}"),
    "a list": Bad("must be a JSON object", b"[]"),
    "a list of objects": Bad("must be a JSON object", b"[{}]"),
    "a string": Bad("must be a JSON object", b'"private-user-4711"'),
    "a number": Bad("must be a JSON object", b"17"),
    "null": Bad("", b"null"),
    "an empty object": Bad("", b"{}"),
    "a form": Bad("Content-Type", b"user_id=private-user-4711&candidates=i1", headers={"content-type": "application/x-www-form-urlencoded"}),
    "multipart": Bad("Content-Type", b"--x\r\n\r\n{}\r\n--x--", headers={"content-type": "multipart/form-data; boundary=x"}),
    "XML": Bad("Content-Type", b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>', headers={"content-type": "application/xml"}),
    "JSON as text": Bad("Content-Type", b"{}", headers={"content-type": "text/plain"}),
    "a pickle": Bad("", b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94."),
    "gzip": Bad("UTF-8", b"\x1f\x8b\x08\x00\x00", headers=JSON | {"content-encoding": "gzip"}),
    "wrong UTF-8": Bad("not UTF-8", b'{"user_id": "\xff"}'),
    "UTF-16": Bad("NUL", '{"a": 1}'.encode("utf-16-le")),
    "UTF-32": Bad("", '{"a": 1}'.encode("utf-32")),
    "NUL bytes": Bad("NUL", bytes(100)),
    "deep JSON": Bad("deeper", b'{"a":' * 50_000),
    "deep lists": Bad("deeper", b"[" * 50_000 + b"]" * 50_000),
    "huge array": Bad("more than", b'{"a": [' + b"0," * 300_000 + b"0]}"),
    "NaN": Bad("NaN", b'{"timestamp": NaN}'),
    "infinity": Bad("Infinity", b'{"top_k": Infinity}'),
    "1e999": Bad("too large", b'{"top_k": 1e999}'),
    "endless integer": Bad("too many digits", b'{"top_k": 1' + b"0" * 100_000 + b"}"),
    "a key twice": Bad("occurs twice", b'{"user_id": "a", "user_id": "private-user-4711"}'),
    "half a character": Bad("half of a character", b'{"user_id": "\\ud800"}'),
    "unknown key": Bad("no known key", changes={"is_admin": True}),
    "prototype": Bad("no known key", changes={"__proto__": {"a": 1}}),
    "a long unknown key": Bad("no known key", changes={"k" * 100_000: 1}),
    "a key of another alphabet": Bad("no known key", changes={"\u202eyek": 1}),
    "too many bytes": Bad("more than 3,000,000 bytes", b" " * 3_000_001, status=413),
}  # fmt: skip
OWN = {
    "rank": {
        "no user": Bad("user_id is missing", without="user_id"),
        "user null": Bad("user_id", changes={"user_id": None}),
        "user a number": Bad("user_id", changes={"user_id": 17}),
        "user a list": Bad("user_id", changes={"user_id": [USER]}),
        "user an operator": Bad("user_id", changes={"user_id": {"$ne": ""}}),
        "user empty": Bad("user_id", changes={"user_id": ""}),
        "user blank": Bad("blank", changes={"user_id": " \t\n"}),
        "user with NUL": Bad("NUL", changes={"user_id": "a\0b"}),
        "user long": Bad("user_id", changes={"user_id": "u" * 257}),
        "user very long": Bad("user_id", changes={"user_id": "u" * 1_000_000}),
        "no candidates": Bad("candidates is missing", without="candidates"),
        "candidates empty": Bad("candidates", changes={"candidates": []}),
        "candidates a string": Bad("candidates", changes={"candidates": "i1"}),
        "candidates an object": Bad("candidates", changes={"candidates": {"0": "i1"}}),
        "candidates null": Bad("candidates", changes={"candidates": None}),
        "candidate null": Bad("candidates[1]", changes={"candidates": ["i1", None]}),
        "candidate a list": Bad("candidates[0]", changes={"candidates": [["i1"]]}),
        "candidate true": Bad("candidates[0]", changes={"candidates": [True]}),
        "candidate blank": Bad("candidates[0]", changes={"candidates": ["\u3000"]}),
        "too many candidates": Bad("at most 2,000", changes={"candidates": [f"i{n}" for n in range(2_001)]}),
        "far too many candidates": Bad("more than", changes={"candidates": ["i"] * 200_000}),
        "too many behaviors": Bad("behaviors", changes={"behaviors": ["i1"] * 10_001}),
        "behavior long": Bad("behaviors[0]", changes={"behaviors": ["i" * 257]}),
        "times without behaviors": Bad("behavior_times", changes={"behavior_times": ["2026-01-01T00:00:00Z"]}),
        "time without a zone": Bad("timestamp", changes={"timestamp": "2026-01-01T00:00:00"}),
        "time no time": Bad("timestamp", changes={"timestamp": "'; DROP TABLE users; --"}),
        "time in year 0": Bad("timestamp", changes={"timestamp": "0000-01-01T00:00:00Z"}),
        "time a huge number": Bad("timestamp", changes={"timestamp": 10**300}),
        "top_k 0": Bad("top_k", changes={"top_k": 0}),
        "top_k negative": Bad("top_k", changes={"top_k": -(10**30)}),
        "top_k a fraction": Bad("top_k", changes={"top_k": 0.5}),
        "context a list": Bad("context", changes={"context": [1]}),
        "unknown feature": Bad("no feature of this model", changes={"context": {"device": "phone"}}),
        "a long unknown feature": Bad("no feature of this model", changes={"context": {"d" * 100_000: 1}}),
        "item_context no list": Bad("item_context", changes={"item_context": {"device": "phone"}}),
    },
    "items": {
        "no id": Bad("item_id is missing", without="item_id"),
        "id null": Bad("item_id", changes={"item_id": None}),
        "id blank": Bad("blank", changes={"item_id": "  "}),
        "id with NUL": Bad("NUL", changes={"item_id": "\0"}),
        "id long": Bad("item_id", changes={"item_id": "i" * 257}),
        "no content": Bad("neither an image nor a title", without="title"),
        "title a number": Bad("title", changes={"title": 17}),
        "title long": Bad("title", changes={"title": "t" * 100_001}),
        "image no base64": Bad("base64", changes={"image": "<svg/>"}),
        "image a path": Bad("", changes={"image": "/etc/passwd"}),
        "image an object": Bad("image", changes={"image": {"url": "http://169.254.169.254/"}}),
        "image a URL": Bad("base64", changes={"image": "http://169.254.169.254/latest/meta-data/"}),
        "image a data URL of SVG": Bad("image format", changes={"image": "data:image/svg+xml;base64," + image(b"<svg onload=alert(1)>")}),
        "image HTML": Bad("image format", changes={"image": image(b"<html>")}),
        "image a ZIP": Bad("image format", changes={"image": image(b"PK\3\4" + bytes(100))}),
        "image ends after its header": Bad("image corrupt", changes={"image": image(png_header(8, 8))}),
        "image a bomb": Bad("image too large", changes={"image": image(png_header(60_000, 60_000))}),
        "image larger than all memory": Bad("image", changes={"image": image(png_header(2**31 - 1, 2**31 - 1))}),
        "image of no pixels": Bad("image", changes={"image": image(png_header(0, 0))}),
        "URL switched off": Bad("switched off", changes={"image_url": "https://cdn.example/a.png"}),
        "URL of a file": Bad("switched off", changes={"image_url": "file:///etc/passwd"}),
        "URL long": Bad("image_url", changes={"image_url": "https://" + "a" * 3_000}),
        "category a list": Bad("category", changes={"category": ["mugs"]}),
        "category long": Bad("category", changes={"category": "c" * 257}),
        "content in the future": Bad("future", changes={"content_at": "2999-01-01T00:00:00Z"}),
        "time without a zone": Bad("content_at", changes={"content_at": "2026-01-01"}),
        "empty batch": Bad("items", body=b'{"items": []}'),
        "batch no list": Bad("items", body=b'{"items": {"item_id": "a", "title": "t"}}'),
        "batch and item": Bad("no known key", changes={"items": [{"item_id": "a", "title": "t"}]}),
        "large batch": Bad("items", body=json.dumps({"items": [{"item_id": f"n{n}", "title": "t"} for n in range(257)]}).encode()),
        "id twice": Bad("occurs twice", body=b'{"items": [{"item_id": "a", "title": "t"}, {"item_id": "a", "title": "u"}]}'),
    },
    "events": {
        "no user": Bad("user_id is missing", without="user_id"),
        "no item": Bad("item_id is missing", without="item_id"),
        "no event": Bad("event is missing", without="event"),
        "user blank": Bad("blank", changes={"user_id": " "}),
        "user with NUL": Bad("NUL", changes={"user_id": "\0"}),
        "item a list": Bad("item_id", changes={"item_id": ["i1"]}),
        "event with an escape": Bad("printable", changes={"event": "\x1b[31mclick"}),
        "event long": Bad("event", changes={"event": "c" * 65}),
        "revenue text": Bad("revenue", changes={"revenue": "'; DROP TABLE events; --"}),
        "revenue a huge integer": Bad("revenue", changes={"revenue": 10**400}),
        "time in the future": Bad("timestamp", changes={"timestamp": "2999-01-01T00:00:00Z"}),
        "time without a zone": Bad("timestamp", changes={"timestamp": "2026-01-01T00:00:00"}),
        "empty batch": Bad("events", body=b'{"events": []}'),
        "large batch": Bad("events", body=json.dumps({"events": [{"user_id": "u", "item_id": "i", "event": "e"}] * 1_001}).encode()),
        "one bad in a batch": Bad("events[1]", body=b'{"events": [{"user_id": "u", "item_id": "i1", "event": "click"}, {}]}'),
    },
    "search": {
        "neither": Bad("image, a title", without="title"),
        "blank": Bad("image, a title", changes={"title": " "}),
        "title long": Bad("title", changes={"title": "t" * 100_001}),
        "image no base64": Bad("base64", changes={"image": "<svg/>"}),
        "image a URL": Bad("base64", changes={"image": "http://169.254.169.254/latest/meta-data/"}),
        "top_k 0": Bad("top_k", changes={"top_k": 0}),
        "top_k huge": Bad("top_k", changes={"top_k": 10**30}),
        "category long": Bad("category", changes={"category": "c" * 257}),
    },
}  # fmt: skip
CASES = [(route, name, bad) for route in ROUTES for name, bad in (ANY_BODY | OWN[route]).items()]


@pytest.fixture(scope="module")
def clients(both_apis, tmp_path_factory) -> dict[str, TestClient]:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(LINE)
    apps = both_apis(Serving(keys_file=str(path), max_body_bytes=3_000_000))
    headers = {"Authorization": f"Bearer {KEY}"}
    return {name: TestClient(app, raise_server_exceptions=False, headers=headers) for name, app in apps.items()}


def test_the_table_is_long_enough():
    assert len(CASES) >= 60


@pytest.mark.parametrize(("route", "name", "bad"), CASES, ids=[f"{route}-{name}" for route, name, _ in CASES])
def test_a_bad_request_gets_its_4xx_in_a_sentence_and_the_next_one_is_answered(clients, route, name, bad):
    place = ROUTES[route]
    body = bad.body
    if body is None:
        changed = {key: value for key, value in (place.good | bad.changes).items() if key != bad.without}
        body = json.dumps(changed).encode()
    answer = clients[place.app].post(place.path, content=body, headers=bad.headers)
    assert answer.status_code == bad.status, answer.text
    assert set(answer.json()) == {"error"}
    sentence = answer.json()["error"]
    assert bad.words in sentence
    assert sentence.endswith((".", ")")), sentence
    assert len(sentence) <= 1_000
    assert not any(secret in answer.text for secret in (USER, KEY, "Traceback", "site-packages", "/mim_ray/"))
    good = clients[place.app].post(place.path, json=place.good)
    assert good.status_code == 200, good.text


PATHS = [
    ("/v1/rank/../../etc/passwd", (401, 404)),
    ("/v1/rank%00", (404,)),
    ("/v1/rank/%2e%2e/%2e%2e/etc/passwd", (404,)),
    ("//v1/rank", (404,)),
    ("/v1/rank?user_id=a", (422,)),
    ("/V1/RANK", (404,)),
    ("/.env", (404,)),
    ("/" + "a" * 10_000, (404,)),
    ("/%ff%fe", (404,)),
]


@pytest.mark.parametrize(("path", "statuses"), PATHS)
@pytest.mark.parametrize("app", ["ranking", "items"])
def test_paths_that_lead_nowhere_get_a_sentence(clients, app, path, statuses):
    answer = clients[app].post(path, content=b"")
    assert answer.status_code in (*statuses, 404)
    assert set(answer.json()) == {"error"}


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "HEAD"])
@pytest.mark.parametrize("route", ROUTES)
def test_other_methods_are_405(clients, route, method):
    answer = clients[ROUTES[route].app].request(method, ROUTES[route].path)
    assert answer.status_code == 405
    assert method == "HEAD" or set(answer.json()) == {"error"}


STRANGE_IDS = {
    "path": "../../../../etc/passwd",
    "absolute path": "/etc/passwd",
    "Windows path": "..\\..\\windows\\passwd",
    "escaped path": "..%2f..%2fpasswd",
    "escaped NUL": "passwd%00.png",
    "URL": "file:///etc/passwd",
    "SQL": "'; DROP TABLE passwd; --",
    "SQL or": "passwd' OR '1'='1",
    "template": "{{passwd.__class__}}${jndi:ldap://passwd}",
    "format": "%s%n%x{0.__class__}passwd",
    "shell": "$(cat /etc/passwd)`id`|;&",
    "HTML": "<script>passwd</script>",
    "line breaks": "passwd\r\nSet-Cookie: a=b",
    "right to left": "\u202edwssap",
    "zero width": "pass\u200b\u200dwd",
    "emoji": "passwd👩‍👩‍👧‍👦",
    "combining": "passwd" + "\u0301" * 200,
    "control characters": "passwd\x07\x1b[31m\x7f",
    "as long as an id may be": "p" * 256,
    "a byte order mark": "\ufeffpasswd",
    "not a character": "passwd\uffff",
    "a dot": ".",
    "a key": "__proto__",
    "null": "null",
}


@pytest.fixture
def opened_files() -> Iterator[list[str]]:
    """Names of the files that this process opens, makes or renames during the test."""
    names: list[str] = []
    if not HOOK:
        sys.addaudithook(_keep)  # there is no way to take it away; it does nothing outside of this fixture
    HOOK["names"] = names
    yield names
    HOOK["names"] = None


HOOK: dict[str, list[str] | None] = {}


def _keep(event: str, arguments: tuple) -> None:
    names = HOOK["names"]
    if names is not None and event in ("open", "os.mkdir", "os.rename", "os.remove", "os.listdir", "os.scandir"):
        names.extend(str(argument) for argument in arguments[:2])


@pytest.mark.parametrize("name", STRANGE_IDS)
def test_a_strange_id_is_an_id_like_any_other_and_never_a_path(clients, opened_files, name):
    strange = STRANGE_IDS[name]
    body = {"user_id": strange, "candidates": [strange, "i1"], "behaviors": [strange, "i2"]}
    answer = clients["ranking"].post("/v1/rank", json=body)
    assert answer.status_code == 200, answer.text
    items = {item["item_id"]: item for item in answer.json()["items"]}
    assert items[strange]["unknown_item"]
    assert not items["i1"]["unknown_item"]
    assert (
        clients["ranking"].post("/v1/rank", json={"user_id": strange, "candidates": ["i1"]}).json()["num_behaviors"]
        == 0
    )
    similar = clients["ranking"].get(f"/v1/similar/{urllib.parse.quote(strange, safe='')}")
    assert similar.status_code in (404, 422)
    assert set(similar.json()) == {"error"}
    posted = clients["items"].post("/v1/items", json={"item_id": strange, "title": "a thing", "category": strange})
    assert posted.status_code == 200, posted.text
    assert posted.json()["items"][0]["item_id"] == strange
    event = {"user_id": strange, "item_id": strange, "event": "click", "event_id": strange}
    assert clients["ranking"].post("/v1/events", json=event).status_code == 200
    assert opened_files, "the item's segment is a file"
    assert not [file for file in opened_files if "passwd" in file or (len(strange) > 8 and strange in file)]


@pytest.mark.parametrize(
    "kinds", [["application/json", "text/plain"], ["text/plain", "application/json"], ["APPLICATION/Json; a=b"]]
)
def test_json_is_looked_at_however_it_is_announced(clients, kinds):
    headers = [("content-type", kind) for kind in kinds]
    answer = clients["ranking"].post("/v1/rank", content=b"[" * 50_000, headers=headers)
    assert answer.status_code == 422
    assert "deeper" in answer.json()["error"]


def test_a_body_that_does_not_arrive_is_not_waited_for():
    sent = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    app = guarded(FastAPI(), Serving(body_timeout_s=0.05))
    scope = {"type": "http", "method": "POST", "path": "/v1/rank", "headers": [], "query_string": b""}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 408
    assert "did not arrive" in json.loads(sent[1]["body"])["error"]


def test_no_user_id_item_id_or_key_is_logged(both_apis, tmp_path, capfd, monkeypatch):
    """Over good, bad, refused and failing requests, whatever logger and level."""
    monkeypatch.setattr(keys, "LOOK_EVERY_S", 0.0)
    other, _ = new_key("other", ["rank"])
    (tmp_path / "keys").write_text(LINE)
    apps = both_apis(Serving(keys_file=str(tmp_path / "keys")))
    failing = FastAPI()

    @failing.post("/v1/rank")
    def fails() -> None:
        raise KeyError(USER)

    apps["failing"] = guarded(failing, Serving(keys_file=str(tmp_path / "keys")))
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: None if record.name.startswith("httpx") else records.append(handler.format(record))
    loggers = [
        logging.root,
        *(one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)),
    ]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.addHandler(handler)
        one.setLevel(logging.DEBUG if one.name.startswith(("mim_ray", "ray.serve", "root", "uvicorn")) else one.level)
    try:
        for app in apps.values():
            client = TestClient(app, raise_server_exceptions=False)
            for headers in ({"Authorization": f"Bearer {KEY}"}, {"X-API-Key": other}, {}):
                for route in ROUTES.values():
                    client.post(route.path, json=route.good, headers=headers)
                    for changes in ({"user_id": [USER]}, {"candidates": [USER] * 3_000}, {USER: USER}, {"image": USER}):
                        client.post(route.path, json=route.good | changes, headers=headers)
                    client.post(route.path, content=f'{{"user_id": "{USER}'.encode(), headers=JSON | headers)
                client.get(f"/v1/similar/{USER}", headers=headers)
        (tmp_path / "keys").write_text(f"shop rank {KEY}")  # the key itself, by mistake
        client = TestClient(apps["ranking"], headers={"X-API-Key": KEY})
        assert client.post("/v1/rank", json=ROUTES["rank"].good).status_code == 200
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.removeHandler(handler)
            one.setLevel(level)
    out, err = capfd.readouterr()
    written = "\n".join([*records, out, err])
    assert any("API keys stay as they were" in record for record in records)
    assert any("a request met KeyError" in record for record in records), "failures of ours are logged"
    for secret in (USER, KEY, other, "bad-inputs"):
        assert secret not in written
