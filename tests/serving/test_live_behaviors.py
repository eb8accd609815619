"""What a ranking replica knows of a user: the behavior store and, over it, the events that were posted."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_ray import artifacts
from mim_ray.config.scenario import Samples, Serving
from mim_ray.data.schema import TIME
from mim_ray.errors import ArtifactError
from mim_ray.serving import live_behaviors
from mim_ray.serving.behavior_store import BehaviorStore
from mim_ray.serving.events import SCHEMA, event_log, read_events
from mim_ray.serving.live_behaviors import LiveBehaviors


@pytest.fixture
def samples(tmp_path, monkeypatch):
    monkeypatch.setenv("MIM_RAY_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "samples" / "behaviors"
    folder.mkdir(parents=True)
    times = pa.array([[1_000, 2_000], None, []], pa.list_(TIME))
    users = pa.table({"user_id": ["timed", "untimed", "new"], "behaviors": [["a", "b"], ["a", "b"], []]})
    pq.write_table(users.append_column("behavior_times", times), folder / "part-0.parquet")
    return tmp_path / "samples"


@pytest.fixture
def make(samples, tmp_path):
    """Replicas over the same store and log."""

    def replica(
        rules: Samples | None = None, max_behaviors: int = 50, max_live_behaviors: int = 1_000
    ) -> LiveBehaviors:
        return LiveBehaviors(
            BehaviorStore.open(str(samples / "behaviors")),
            event_log(f"{tmp_path}/center"),
            rules or Samples(),
            max_behaviors=max_behaviors,
            max_live_behaviors=max_live_behaviors,
        )

    return replica


def event(user: str, item: str, us: int, name: str = "click", event_id: str | None = None, rating: float | None = None):
    return {
        "event_id": event_id or f"{user}-{item}-{us}-{name}",
        "user_id": user,
        "item_id": item,
        "event": name,
        "timestamp": datetime.fromtimestamp(us / 1e6, UTC),
        "rating": rating,
    }


def table(*events: dict) -> pa.Table:
    return pa.Table.from_pylist(list(events), SCHEMA)


def test_what_a_replica_stored_is_in_its_next_answer_and_in_the_others_after_a_look(make, tmp_path):
    here, there = make(), make()
    here.store(table(event("timed", "c", 3_000), event("stranger", "x", 5)))
    assert here.history("timed") == (["a", "b", "c"], [1_000, 2_000, 3_000])
    assert here.history("stranger") == (["x"], [5])
    assert there.history("timed") == (["a", "b"], [1_000, 2_000])
    there.refresh()
    assert there.history("timed") == here.history("timed")
    assert there.history("nobody") == ([], None)
    assert read_events(f"{tmp_path}/center").num_rows == 2


def test_behaviors_are_in_the_order_of_their_times_however_they_come(make):
    live = make()
    live.store(table(event("timed", "late", 9_000), event("timed", "between", 1_500)))
    live.store(table(event("timed", "early", 10), event("timed", "late2", 9_000)))
    assert live.history("timed") == (
        ["early", "a", "between", "b", "late", "late2"],
        [10, 1_000, 1_500, 2_000, 9_000, 9_000],
    )


def test_an_event_counts_once_however_often_it_is_met(make):
    live, other = make(), make()
    for replica in (live, other, live):
        replica.store(table(event("new", "c", 3_000, event_id="same")))
    for replica in (live, other):
        replica.refresh()
        replica.refresh()
        assert replica.history("new") == (["c"], [3_000])


def test_events_of_two_users_or_items_under_one_id_are_two_behaviors_also_when_they_are_read_back(make):
    live, other = make(), make()
    for user, item in (("new", "c"), ("stranger", "c"), ("new", "d")):
        live.store(table(event(user, item, 3_000, event_id="1")))
    other.refresh()
    fresh = make()
    fresh.load(datetime.now(UTC) - timedelta(days=1))
    for replica in (live, other, fresh):
        assert replica.history("new") == (["c", "d"], [3_000, 3_000])
        assert replica.history("stranger") == (["c"], [3_000])


def test_an_event_that_came_into_the_store_meanwhile_counts_once(make):
    live = make()
    live.store(table(event("timed", "b", 2_000), event("timed", "c", 3_000)))
    assert live.history("timed") == (["a", "b", "c"], [1_000, 2_000, 3_000])


def test_a_purchase_after_the_click_on_the_same_item_is_not_another_behavior_as_in_the_samples(make):
    live = make()
    live.store(
        table(event("new", "c", 1), event("new", "c", 2, "purchase"), event("new", "d", 3), event("new", "c", 4))
    )
    assert live.history("new") == (["c", "d", "c"], [1, 3, 4])


def test_without_stored_times_new_behaviors_come_last(make):
    live = make()
    live.store(table(event("untimed", "b", 1), event("untimed", "c", 2)))
    assert live.history("untimed") == (["a", "b", "c"], None)


def test_only_events_that_the_samples_count_are_behaviors_and_all_are_stored(make, tmp_path):
    live = make(Samples(positive_events=("buy",), min_rating=3.0))
    live.store(
        table(
            event("new", "click", 1),
            event("new", "bought", 2, "buy"),
            event("new", "disliked", 3, "buy", rating=2.0),
            event("new", "liked", 4, "buy", rating=3.0),
        )
    )
    assert live.history("new")[0] == ["bought", "liked"]
    assert read_events(f"{tmp_path}/center").num_rows == 4


def test_the_rules_are_those_of_the_samples_that_the_store_comes_from(samples, tmp_path):
    assert live_behaviors.rules_of(str(samples / "behaviors")) == Samples()
    scenario = {"samples": {"positive_events": ["play"], "min_rating": None}}
    artifacts.write_manifest(str(samples), artifacts.Manifest("samples", "f", "", 1.0, {}, {}, (), {}, scenario))
    assert live_behaviors.rules_of(str(samples / "behaviors")).positive_events == ("play",)


def test_a_user_keeps_the_newest_behaviors_only(make):
    live = make(max_behaviors=3)
    for us in (5, 1, 4, 2, 3, 6):
        live.store(table(event("new", f"i{us}", us)))
    assert live.history("new") == (["i4", "i5", "i6"], [4, 5, 6])
    assert live.num_live == 3


def test_memory_is_bounded_and_users_without_recent_events_go_first(make):
    live = make(max_live_behaviors=4)
    for us, user in enumerate(["old", "busy", "old2", "busy", "busy", "newest"]):
        live.store(table(event(user, f"i{us}", us)))
    assert live.num_live <= 4
    assert live.history("old") == ([], None)
    assert live.history("busy")[0] == ["i1", "i3", "i4"]
    assert live.history("newest")[0] == ["i5"]


def test_a_replica_that_starts_reads_the_last_days_back_and_folded_ones_too(make, tmp_path):
    live = make()
    live.store(table(event("timed", "c", 3_000)))
    event_log(f"{tmp_path}/center").fold(keep_s=0)
    live.store(table(event("timed", "d", 4_000)))
    fresh = make()
    fresh.load(datetime.now(UTC) - timedelta(days=1))
    assert fresh.history("timed") == live.history("timed") == (["a", "b", "c", "d"], [1_000, 2_000, 3_000, 4_000])
    small = make(max_live_behaviors=1)
    small.load(datetime.now(UTC) - timedelta(days=1))
    assert small.history("timed")[0] == ["a", "b", "d"]


def test_what_is_read_back_is_what_a_replica_that_saw_it_all_holds(make, tmp_path):
    rng = np.random.default_rng(0)
    live = make(max_behaviors=5)
    for number in range(30):
        live.store(
            table(
                *(
                    event(
                        f"u{rng.integers(8)}",
                        f"i{rng.integers(6)}",
                        int(rng.integers(1, 50)),
                        event_id=f"{number}-{place}",
                    )
                    for place in range(4)
                )
            )
        )
        if number % 7 == 0:
            event_log(f"{tmp_path}/center").fold(keep_s=0)
            make().store(
                table(event("u1", "again", 60, event_id="again"))
            )  # by replicas that do not know of each other
    live.refresh()
    fresh = make(max_behaviors=5)
    fresh.load(datetime.now(UTC) - timedelta(days=1))
    users = [f"u{number}" for number in range(8)]
    assert [fresh.history(user) for user in users] == [live.history(user) for user in users]
    assert fresh.num_live == live.num_live == 40
    assert fresh.history("u1")[0].count("again") == 1


def test_a_damaged_file_does_not_keep_a_replica_from_starting(make, tmp_path, caplog):
    live = make()
    for us, item in enumerate("cdef", 3_000):
        live.store(table(event("timed", item, us)))
        if item in "cd":
            event_log(f"{tmp_path}/center").fold(keep_s=0)
    (tmp_path / "center").joinpath(sorted(tmp_path.glob("center/events/folded/*/*"))[0]).write_bytes(b"garbage")
    (tmp_path / "center").joinpath(sorted(tmp_path.glob("center/events/segments/*/*"))[0]).write_bytes(b"garbage")
    fresh = make()
    fresh.load(datetime.now(UTC) - timedelta(days=1))
    fresh.refresh()
    assert fresh.history("timed")[0] == ["a", "b", "d", "f"]
    assert "is damaged" in caplog.text


def test_an_opened_one_follows_the_log_until_it_is_stopped(make, samples, tmp_path):
    writer, before = make(), set(threading.enumerate())
    opened = LiveBehaviors.open(str(samples / "behaviors"), f"{tmp_path}/center", Serving())
    writer.store(table(event("new", "c", 3_000)))
    deadline = time.monotonic() + 60
    while opened.history("new")[0] != ["c"]:
        assert time.monotonic() < deadline, "it does not follow"
        time.sleep(0.01)
    threads = set(threading.enumerate()) - before
    assert {thread.name for thread in threads} == {"follow-events", "fold-events", "reopen-behaviors"}
    opened.stop()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_threads_end_when_nobody_holds_it_any_more(make):
    live = make()
    before = set(threading.enumerate())
    live.start(0.01, 0.04)
    threads = set(threading.enumerate()) - before
    gone = weakref.ref(live)
    del live
    gc.collect()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert gone() is None


def test_a_store_that_fails_for_a_while_is_followed_again(make, monkeypatch, caplog):
    live, writer = make(), make()
    refresh = LiveBehaviors.refresh
    failures = iter([OSError("away")] * 3)

    def failing(self):
        for error in failures:
            raise error
        refresh(self)

    monkeypatch.setattr(LiveBehaviors, "refresh", failing)
    live.start(0.01, 100.0)
    writer.store(table(event("new", "c", 3_000)))
    deadline = time.monotonic() + 60
    while live.history("new")[0] != ["c"]:
        assert time.monotonic() < deadline, "it does not follow"
        time.sleep(0.01)
    live.stop()
    assert caplog.text.count("follow-events failed") == 1


def test_reading_beside_writing_never_misses_what_was_stored(make):
    live = make(max_behaviors=500)
    live.store(table(event("new", "i0", 0)))
    missing, stop = [], threading.Event()

    def look():
        seen = 0
        while not stop.is_set():
            found = len(live.history("new")[0])
            if found < max(seen, 1):
                missing.append((seen, found))
            seen = found

    reader = threading.Thread(target=look)
    reader.start()
    for us in range(1, 200):
        live.add(table(event("new", f"i{us}", us)))
    stop.set()
    reader.join()
    assert missing == []
    assert len(live.history("new")[0]) == 200


def build_samples(samples, user: str, *items: str, created_at: str, max_behaviors: int = 50) -> None:
    """As the samples stage does: the manifest goes first and comes last."""
    (samples / artifacts.MANIFEST).unlink(missing_ok=True)
    pq.write_table(pa.table({"user_id": [user], "behaviors": [list(items)]}), samples / "behaviors" / "part-0.parquet")
    settings = {"samples": Samples(max_behaviors=max_behaviors).model_dump(mode="json")}
    artifacts.write_manifest(
        str(samples), artifacts.Manifest("samples", "f", created_at, 1.0, {}, {}, (), {}, settings)
    )


def test_a_newer_build_of_the_samples_is_taken_over_when_it_is_whole(samples, tmp_path):
    build_samples(samples, "u", "a", "b", created_at="1")
    live = LiveBehaviors.open(str(samples / "behaviors"), f"{tmp_path}/center", Serving())
    live.stop()
    live.store(table(event("u", "x", 5)))
    pq.write_table(pa.table({"user_id": ["u"], "behaviors": [["half"]]}), samples / "behaviors" / "part-0.parquet")
    (samples / artifacts.MANIFEST).unlink()
    for _ in range(3):
        live.reopen()
    assert live.history("u") == (["a", "b", "x"], None), "it is being made"
    build_samples(samples, "u", "c", "d", created_at="2", max_behaviors=3)
    for _ in range(2):
        live.reopen()
    assert live.history("u") == (["c", "d", "x"], None), "with what was posted since"
    assert live._max_behaviors == 3
    pq.write_table(pa.table({"other": ["u"]}), samples / "behaviors" / "part-0.parquet")
    manifest = artifacts.read_manifest(str(samples))
    artifacts.write_manifest(str(samples), replace(manifest, created_at="3"))
    live.reopen()
    with pytest.raises(ArtifactError, match="no table of user_id and behaviors"):
        live.reopen()
    assert live.history("u") == (["c", "d", "x"], None), "one that cannot be read leaves the one before"


def test_a_store_without_a_manifest_is_taken_over_when_its_files_have_changed(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(live_behaviors, "REOPEN_EVERY_S", 0.02)
    live = LiveBehaviors.open(str(samples / "behaviors"), f"{tmp_path}/center", Serving())
    pq.write_table(pa.table({"user_id": ["u"], "behaviors": [["new"]]}), samples / "behaviors" / "part-1.parquet")
    deadline = time.monotonic() + 60
    while live.history("u")[0] != ["new"]:
        assert time.monotonic() < deadline, "it is not taken over"
        time.sleep(0.01)
    live.stop()
