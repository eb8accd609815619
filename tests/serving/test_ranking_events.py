"""Events and the ranking app together: the next ranking of a user sees what was just posted."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from mim_ray.serving.events import read_events
from mim_ray.serving.ranker import RankingService
from mim_ray.serving.ranking_app import ranking_api
from mim_ray.serving.served import Served


@pytest.fixture
def make(small_run):
    """Ranking replicas of one run: HTTP clients."""
    services = []

    def replica() -> TestClient:
        services.append(RankingService.open(Served.of(small_run.scenario), small_run.scenario.serving))
        return TestClient(ranking_api(services[-1], small_run.scenario.serving), raise_server_exceptions=False)

    yield replica
    for service in services:
        service.embeddings.stop()
        service.behaviors.stop()


RANK = {"user_id": "stranger", "candidates": [f"i{row}" for row in range(8)]}


def test_the_next_ranking_of_the_user_sees_the_event_and_ranks_as_if_the_caller_had_sent_it(make, small_run):
    client = make()
    cold = client.post("/v1/rank", json=RANK).json()
    assert cold["num_behaviors"] == 0
    events = [{"user_id": "stranger", "item_id": item, "event": "click"} for item in ("i1", "i4", "i2")]
    answer = client.post("/v1/events", json={"events": [*events, {**events[0], "event": "impression"}]})
    assert answer.status_code == 200, answer.text
    warm = client.post("/v1/rank", json=RANK).json()
    assert warm["num_behaviors"] == 3
    sent = client.post("/v1/rank", json=RANK | {"behaviors": ["i1", "i4", "i2"]}).json()
    assert warm["items"] == sent["items"] != cold["items"]
    assert client.post("/v1/rank", json=RANK | {"user_id": "u9"}).json()["num_behaviors"] == 5
    assert read_events(f"{small_run.root}/center").num_rows == 4


def test_a_replica_that_starts_later_knows_it_too(make):
    event = {"user_id": "stranger", "item_id": "i1", "event": "purchase"}
    assert make().post("/v1/events", json=event).status_code == 200
    assert make().post("/v1/rank", json=RANK).json()["num_behaviors"] == 1


def test_a_question_about_the_past_does_not_see_later_events(make):
    client = make()
    client.post("/v1/events", json={"user_id": "stranger", "item_id": "i1", "event": "click"})
    past = client.post("/v1/rank", json=RANK | {"timestamp": "2026-01-01T00:00:00Z"}).json()
    assert (past["num_behaviors"], past["num_future_behaviors"]) == (0, 1)
