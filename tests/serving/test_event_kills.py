"""POST /v1/events of real processes that are killed with SIGKILL: no acknowledged event is lost, none is there twice."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from mim_ray.serving.events import event_log, read_events

# A replica as the ranking app has one, without a model: it stores, follows and folds, the latter every quarter second.
REPLICA = """
import sys, threading, time
from datetime import UTC, datetime
import uvicorn
from fastapi import FastAPI
from mim_ray.config.scenario import Samples, Serving
from mim_ray.serving.events import add_event_routes, event_log
from mim_ray.serving.live_behaviors import LiveBehaviors
from mim_ray.serving.limits import guarded

class NoStore:
    def history(self, user_id):
        return [], None

live = LiveBehaviors(NoStore(), event_log(sys.argv[1]), Samples(), max_behaviors=10**6, max_live_behaviors=10**6)
live.load(datetime(2026, 1, 1, tzinfo=UTC))
fold = live._log.fold
live._log.fold = lambda wait_s: fold(keep_s=0.3)
live.start(0.02, 1.0)
app = FastAPI()
add_event_routes(app, live)

@app.get("/history/{user_id}")
def history(user_id: str) -> list[str]:
    return live.history(user_id)[0]

config = uvicorn.Config(guarded(app, Serving()), host="127.0.0.1", port=0, log_level="error")
server = uvicorn.Server(config)

def tell():
    while not server.started:
        time.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)

threading.Thread(target=tell, daemon=True).start()
server.run()
"""


class Replica:
    """One process, started again after each kill."""

    def __init__(self, center: str) -> None:
        self._center = center
        self.url: str | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", REPLICA, self._center], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{self._process.stdout.readline().strip()}"

    def kill(self) -> None:
        assert self._process.poll() is None, "it ended by itself"
        self._process.kill()
        assert self._process.wait(60) == -9, "it was not killed"
        assert self._process.stdout is not None
        self._process.stdout.close()


class Shopper(threading.Thread):
    """Posts events, each until it is acknowledged, now by this replica, now by that; reads its own writes."""

    def __init__(self, number: int, replicas: list[Replica], stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.user = f"user{number}"
        self.acknowledged: list[str] = []
        self.unsure = 0  # posts whose answer never came
        self.problems: list[str] = []
        self._rng, self._replicas, self._enough = random.Random(number), replicas, stop

    def run(self) -> None:
        number = 0
        while not self._enough.is_set():
            number += 1
            item = f"{self.user}-{number}"
            answers = []
            wanted = self._rng.choice((1, 1, 1, 2))  # some posts are repeated though they were answered
            while len(answers) < wanted:
                replica = self._rng.choice(self._replicas)
                try:
                    url = replica.url
                    answers.append(self._post(f"{url}/v1/events", item))
                    with urllib.request.urlopen(f"{url}/history/{self.user}", timeout=30) as answer:
                        if item not in json.load(answer):
                            self.problems.append(f"{item} is not in its user's history")
                except (OSError, ValueError):  # refused, reset, cut off
                    self.unsure += 1
                    time.sleep(0.02)
            if any(answer != answers[0] for answer in answers):
                self.problems.append(f"{item} was answered in two ways")
            self.acknowledged.append(item)

    def _post(self, url: str, item: str) -> dict:
        body = json.dumps({"user_id": self.user, "item_id": item, "event": "click"}).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": item}
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30) as answer:
            assert answer.status == 200
            return json.load(answer)


def kill_replicas(center: str, kills: int, num_replicas: int, num_shoppers: int) -> list[Shopper]:
    rng = random.Random(5)
    replicas = [Replica(center) for _ in range(num_replicas)]
    stop = threading.Event()
    shoppers = [Shopper(number, replicas, stop) for number in range(num_shoppers)]
    for shopper in shoppers:
        shopper.start()
    try:
        for _ in range(kills):
            before = sum(len(shopper.acknowledged) for shopper in shoppers)
            deadline = time.monotonic() + 180
            while sum(len(shopper.acknowledged) for shopper in shoppers) < before + 20:
                assert time.monotonic() < deadline, "nothing is acknowledged any more"
                time.sleep(0.01)
            time.sleep(rng.random() * 0.3)
            replica = rng.choice(replicas)
            replica.kill()
            replica.start()
    finally:
        stop.set()
        for shopper in shoppers:
            shopper.join(120)
        for replica in replicas:
            replica.kill()
    assert not any(shopper.is_alive() for shopper in shoppers)
    return shoppers


def check(center: str, shoppers: list[Shopper]) -> None:
    assert [problem for shopper in shoppers for problem in shopper.problems] == []
    counts = Counter(read_events(center)["item_id"].to_pylist())
    acknowledged = [item for shopper in shoppers for item in shopper.acknowledged]
    assert set(acknowledged) - counts.keys() == set(), "acknowledged and lost"
    assert set(counts.values()) == {1}
    before = read_events(center)["event_id"].to_pylist()
    event_log(center).fold(keep_s=0)
    assert read_events(center)["event_id"].to_pylist() == before
    assert list(Path(center).glob("events/segments/*/*.arrow")) == []


def test_killed_under_load_no_acknowledged_event_is_lost(tmp_path: Path) -> None:
    shoppers = kill_replicas(f"{tmp_path}/center", kills=1, num_replicas=1, num_shoppers=3)
    assert sum(shopper.unsure for shopper in shoppers) > 0, "nobody noticed the kills"
    check(f"{tmp_path}/center", shoppers)


@pytest.mark.chaos
def test_killed_at_random_moments_no_acknowledged_event_is_lost(tmp_path: Path) -> None:
    """KILLS (default 20) kills among three replicas, one of which folds at any moment."""
    kills = int(os.environ.get("KILLS", "20"))
    shoppers = kill_replicas(f"{tmp_path}/center", kills, num_replicas=3, num_shoppers=4)
    check(f"{tmp_path}/center", shoppers)
    total = sum(len(shopper.acknowledged) for shopper in shoppers)
    print(f"{kills} kills, {total:,} acknowledged events, none lost, none twice")
