"""POST /v1/events over an app: what is taken, what it answers, and what is stored."""

from __future__ import annotations

import errno
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from mim_ray.config.scenario import Samples, Serving
from mim_ray.data.schema import INTERACTIONS
from mim_ray.serving.behavior_store import BehaviorStore
from mim_ray.serving.events import add_event_routes, event_log, interactions, read_events
from mim_ray.serving.limits import guarded
from mim_ray.serving.live_behaviors import LiveBehaviors


@pytest.fixture
def center(tmp_path, monkeypatch):
    monkeypatch.setenv("MIM_RAY_CACHE", str(tmp_path / "cache"))
    pq.write_table(pa.table({"user_id": ["u1"], "behaviors": [["a", "b"]]}), tmp_path / "behaviors.parquet")
    return f"{tmp_path}/center"


def replica(center: str) -> LiveBehaviors:
    store = BehaviorStore.open(f"{center.rpartition(chr(47))[0]}/behaviors.parquet")
    return LiveBehaviors(store, event_log(center), Samples(), max_behaviors=50, max_live_behaviors=1_000)


def client_of(live: LiveBehaviors) -> TestClient:
    app = FastAPI()
    add_event_routes(app, live)
    return TestClient(guarded(app, Serving(max_body_bytes=100_000)), raise_server_exceptions=False)


@pytest.fixture
def client(center):
    return client_of(replica(center))


EVENT = {"user_id": "u1", "item_id": "i1", "event": "click"}


def test_one_event_and_a_batch_are_stored_as_they_were_sent(client, center):
    before = datetime.now(UTC)
    one = client.post("/v1/events", json=EVENT)
    assert one.status_code == 200, one.text
    assert one.json()["num_events"] == 1
    at = "2026-01-02T03:04:05.678901+02:00"
    bought = {
        "user_id": "ü",
        "item_id": "i2",
        "event": "purchase",
        "timestamp": at,
        "request_id": "r1",
        "revenue": 12.5,
    }
    batch = client.post("/v1/events", json={"events": [bought, {**EVENT, "event": "rate", "rating": 4}]}).json()
    found = read_events(center).to_pylist()
    assert [row["event_id"] for row in found] == one.json()["event_ids"] + batch["event_ids"]
    assert before <= found[0].pop("timestamp") <= datetime.now(UTC)
    del found[0]["event_id"], found[1]["event_id"]
    assert found[0] == {**EVENT, "request_id": None, "revenue": None, "rating": None}
    assert found[1] == {**bought, "timestamp": datetime.fromisoformat(at), "rating": None}
    assert (found[2]["event"], found[2]["rating"]) == ("rate", 4.0)


def test_the_same_post_again_gets_the_same_answer_and_counts_once_on_any_replica_and_after_a_restart(client, center):
    headers, body = {"Idempotency-Key": "order-77"}, {"events": [EVENT, EVENT, {**EVENT, "event_id": "mine"}]}
    first = client.post("/v1/events", json=body, headers=headers)
    assert first.json()["event_ids"][2] == "mine"
    for app in (client, client_of(replica(center)), client_of(replica(center))):
        again = app.post("/v1/events", json=body, headers=headers)
        assert (again.status_code, again.json()) == (200, first.json())
    event_log(center).fold(keep_s=0)
    assert client_of(replica(center)).post("/v1/events", json=body, headers=headers).json() == first.json()
    assert read_events(center)["event_id"].to_pylist() == first.json()["event_ids"]


def test_a_post_that_is_repeated_on_the_same_replica_writes_nothing(client, center):
    for _ in range(3):
        client.post("/v1/events", json=EVENT, headers={"Idempotency-Key": "k"})
    assert event_log(center).read().num_rows == 1


def test_callers_who_number_their_events_alike_lose_none(client, center):
    """A replica that knows an id, one that does not, and a batch; and nobody claims an id before others use it."""
    bought = {**EVENT, "event": "purchase", "event_id": "1"}
    posts = [
        {**bought, "user_id": "mallory"},
        {**bought, "user_id": "alice"},
        {**bought, "user_id": "bob"},
        {**bought, "user_id": "bob", "item_id": "i2"},
        {**bought, "user_id": "bob", "event": "click"},
    ]
    for post in posts:
        assert client.post("/v1/events", json=post).json()["event_ids"] == ["1"]
    for app in (client, client_of(replica(center))):
        assert app.post("/v1/events", json={"events": posts}).status_code == 200, "all of them again"
    names = ("user_id", "item_id", "event")
    found = [tuple(row[name] for name in names) for row in read_events(center).to_pylist()]
    assert found == [tuple(post[name] for name in names) for post in posts]
    assert event_log(center).read().num_rows == 2 * len(posts), "the replica that knew them wrote nothing again"


def test_another_event_under_a_used_key_is_another_event(client, center):
    for item in ("i1", "i2"):
        client.post("/v1/events", json={**EVENT, "item_id": item}, headers={"Idempotency-Key": "k"})
    assert read_events(center)["item_id"].to_pylist() == ["i1", "i2"]


def test_without_a_key_each_post_counts(client, center):
    client.post("/v1/events", json=EVENT)
    client.post("/v1/events", json=EVENT)
    assert read_events(center).num_rows == 2


def test_a_clock_that_is_a_little_ahead_is_forgiven_and_counts_as_now(client, center):
    ahead = datetime.now(UTC) + timedelta(minutes=4)
    assert client.post("/v1/events", json={**EVENT, "timestamp": ahead.isoformat()}).status_code == 200
    assert read_events(center)["timestamp"][0].as_py() <= datetime.now(UTC)


NOW = datetime.now(UTC)
BAD = [
    ({}, "user_id is missing"),
    ({"user_id": "", **EVENT, "item_id": " "}, "an id must not be blank"),
    ({**EVENT, "user_id": "u" * 257}, "256 characters"),
    ({**EVENT, "user_id": 7}, "user_id: Input should be a valid string"),
    ({**EVENT, "user_id": "\ud800"}, "half of a character"),
    ({**EVENT, "item_id": "a\0b"}, "NUL"),
    ({**EVENT, "event": ""}, "event: String should have at least 1 character"),
    ({**EVENT, "event": "a\nb"}, "printable"),
    ({**EVENT, "event": "e" * 65}, "64 characters"),
    ({**EVENT, "timestamp": "2026-01-01T00:00:00"}, "timezone"),
    ({**EVENT, "timestamp": (NOW + timedelta(days=1)).isoformat()}, "lies in the future"),
    ({**EVENT, "timestamp": "1969-07-20T20:17:00Z"}, "before 1970"),
    ({**EVENT, "timestamp": "0001-01-01T00:00:00+14:00"}, "1970"),
    ({**EVENT, "timestamp": "9999-12-31T23:59:59-14:00"}, "future"),
    ({**EVENT, "timestamp": 1e300}, "timestamp"),
    ({**EVENT, "revenue": float("nan")}, "NaN"),
    ({**EVENT, "revenue": float("inf")}, "Infinity"),
    ({**EVENT, "revenue": "much"}, "revenue"),
    ({**EVENT, "rating": [1]}, "rating"),
    ({**EVENT, "colour": "red"}, "colour is no known key"),
    ({"events": []}, "at least 1 item"),
    ({"events": [EVENT] * 1_001}, "at most 1000 items"),
    ({"events": [{**EVENT, "event_id": "x"}] * 2}, "An event_id occurs twice"),
    ({"events": EVENT}, "events: Input should be a valid list"),
    ([EVENT], "JSON object"),
]


@pytest.mark.parametrize(("body", "said"), BAD)
def test_what_cannot_be_an_event_is_a_sentence_and_nothing_is_stored(client, center, body, said):
    answer = client.post("/v1/events", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert said in answer.json()["error"]
    assert read_events(center).num_rows == 0


@pytest.mark.parametrize("key", ["", "k" * 257])
def test_a_key_has_a_sensible_length(client, key):
    assert client.post("/v1/events", json=EVENT, headers={"Idempotency-Key": key}).status_code == 422


def test_a_batch_with_one_bad_event_stores_none(client, center):
    assert client.post("/v1/events", json={"events": [EVENT, {**EVENT, "event": ""}]}).status_code == 422
    assert read_events(center).num_rows == 0


def test_a_full_disk_is_a_503_and_what_was_not_stored_is_not_seen(client, center, monkeypatch):
    client.post("/v1/events", json=EVENT)  # the folders are there
    files, headers = set(Path(center).rglob("*")), {"Idempotency-Key": "k"}

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("os.fsync", full)
        answer = client.post("/v1/events", json=EVENT, headers=headers)
    assert (answer.status_code, answer.headers["retry-after"], set(answer.json())) == (503, "1", {"error"})
    assert {path for path in Path(center).rglob("*") if path.is_file()} <= files, "what was half written takes no room"
    assert read_events(center).num_rows == 1
    assert client.post("/v1/events", json=EVENT, headers=headers).status_code == 200
    assert read_events(center).num_rows == 2


def test_events_become_rows_of_the_interactions_table(client, center):
    client.post("/v1/events", json={**EVENT, "request_id": "r9", "revenue": 2.0})
    table = interactions(read_events(center))
    assert all(table.schema.field(name).type == INTERACTIONS.schema.field(name).type for name in table.column_names)
    assert set(INTERACTIONS.required) <= set(table.column_names)
    row = table.to_pylist()[0]
    assert (row["user_id"], row["item_id"], row["event"], row["impression_id"], row["revenue"]) == (
        "u1", "i1", "click", "r9", 2.0,
    )  # fmt: skip
