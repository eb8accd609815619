"""What rankings should say, computed in the test's process from the release's files."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from mim_ray.config import Scenario
from mim_ray.data.ids import hash_ids
from mim_ray.representation_center.key_index import shard_of, string_array
from mim_ray.representation_center.parameter_store import ParameterStore
from mim_ray.serving.behavior_store import BehaviorStore
from mim_ray.serving.client import Client
from mim_ray.serving.events import read_events
from mim_ray.serving.messages import RankRequest
from mim_ray.serving.ranker import RankingService
from mim_ray.serving.served import Served

from .chaos_load import Load, until


class Reference:
    """The scores of each release that was added, with all tables in this process."""

    def __init__(self) -> None:
        self._services: dict[str, RankingService] = {}
        self._known: dict[tuple[Any, ...], dict[str, float]] = {}

    def add_current(self, scenario: Scenario) -> str:
        """The scenario's current release; its model's version."""
        served = Served.of(scenario)
        service = RankingService.open(served, scenario.serving, behaviors=BehaviorStore.open(served.behaviors))
        assert service.embeddings is not None
        service.embeddings.stop()  # no item that the load asks for changes
        self._services[service.model_version] = service
        return service.model_version

    def check(self, body: Mapping[str, Any], answer: Mapping[str, Any], num_shards: int) -> None:
        """The answer names a release that was added, and has its scores: those without what it says is missing."""
        assert answer["model_version"] in self._services, "no release that was ever promoted"
        ours = {item["item_id"]: item["prob"] for item in answer["items"]}
        assert ours.keys() == set(body["candidates"])
        assert list(ours.values()) == sorted(ours.values(), reverse=True)
        if not answer["degraded"]:
            possible = [self.scores(body, answer["model_version"])]
        else:
            assert set(answer["degraded"]) <= {"content", "tables"}
            assert all(item["no_content"] for item in answer["items"]) or "content" not in answer["degraded"]
            most = num_shards if "tables" in answer["degraded"] else 0
            away = [shards for num in range(most + 1) for shards in itertools.combinations(range(num_shards), num)]
            possible = [self.scores_without(body, answer["model_version"], shards, num_shards) for shards in away]
        largest = [max(abs(expected[item] - prob) for item, prob in ours.items()) for expected in possible]
        assert min(largest) <= 1e-5, f"wrong by {min(largest)}, degraded: {answer['degraded']}"

    def scores(self, body: Mapping[str, Any], version: str) -> dict[str, float]:
        """By item id."""
        key = (version, body["user_id"], tuple(body.get("behaviors", ())))
        if key not in self._known:
            told = self._services[version].rank(RankRequest(**body))
            self._known[key] = {item.item_id: item.prob for item in told.items}
        return self._known[key]

    def scores_without(
        self, body: Mapping[str, Any], version: str, away: tuple[int, ...], num_shards: int
    ) -> dict[str, float]:
        """ID-only, and with the rows of those shards of the parameter machines unknown."""
        key = (version, body["user_id"], tuple(body.get("behaviors", ())), away)
        if key not in self._known:
            service = self._services[version]
            given = body.get("behaviors")
            behaviors = service.behaviors.history(body["user_id"])[0] if given is None else given
            asked = service.model.request(
                body["user_id"], behaviors[-service.model.max_behaviors :], body["candidates"]
            )
            for rows in (asked.item_row, asked.user):
                keys = string_array([str(row) for row in rows.tolist()])
                rows[np.isin(shard_of(hash_ids(keys), num_shards), away)] = 0
            prob = np.asarray(service.model.predict(asked.batch()))
            self._known[key] = dict(zip(body["candidates"], prob.tolist(), strict=True))
        return self._known[key]


def check_answers(load: Load, reference: Reference, scenario: Scenario, client: Client) -> None:
    """No answer is wrong, and all that was acknowledged is there."""
    for call in load.acknowledged("rank"):
        reference.check(call.body, call.answer, scenario.machines.shards)
    served = Served.of(scenario)
    items = [call.answer["items"][0] for call in load.acknowledged("items")]
    ids = [item["item_id"] for item in items]
    print(f"{sum(item['rankable'] for item in items)} of {len(items)} items were rankable when they were acknowledged")
    store = ParameterStore(
        served.snapshot,
        table=f"{served.center}/table",
        window=f"{served.center}/window",
        encoder_version=served.encoder_version,
    )
    store.refresh()
    found = store.multi_get(ids)[1]
    assert found.all(), f"{(~found).sum()} acknowledged items are lost"
    for begin in range(0, len(ids), 1_000):
        some = ids[begin : begin + 1_000]
        until(
            lambda some=some: not any(item["no_content"] for item in client.rank("u1", some)["items"]),
            "acknowledged items are ranked without content",
        )
    times = Counter(read_events(served.center)["event_id"].to_pylist())
    acknowledged = [event_id for call in load.acknowledged("events") for event_id in call.answer["event_ids"]]
    assert len(acknowledged) == len(set(acknowledged))
    assert {times[event_id] for event_id in acknowledged} == {1}
