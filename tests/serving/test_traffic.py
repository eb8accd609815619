"""A/B tests online: who is in which arm, what ranks for them, and what is logged of it."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from starlette.testclient import TestClient

from mim_ray.config import load_scenario
from mim_ray.config.scenario import Arm
from mim_ray.errors import ArtifactError, ConfigError
from mim_ray.representation_center.release import promote
from mim_ray.serving import ranking_app
from mim_ray.serving import traffic as traffic_module
from mim_ray.serving.exposures import exposure_log, user_hash
from mim_ray.serving.messages import RankRequest
from mim_ray.serving.metrics import Metrics
from mim_ray.serving.ranker import RankingService
from mim_ray.serving.ranking_app import bind_ranking, ranking_api
from mim_ray.serving.served import Served
from mim_ray.serving.traffic import Traffic, arm_of, arms_of

USERS = [f"user-{number}" for number in range(20_000)]


def test_users_are_split_by_weight_and_stay_where_they_are():
    weights = {"a": 1.0, "b": 2.0, "c": 1.0}
    arms = [arm_of(user, "exp", weights) for user in USERS]
    assert arms == [arm_of(user, "exp", weights) for user in USERS]
    shares = {name: count / len(USERS) for name, count in Counter(arms).items()}
    assert shares == pytest.approx({"a": 0.25, "b": 0.5, "c": 0.25}, abs=0.01)  # 3 sigma
    assert [arm_of(user, "exp", {"a": 10, "b": 20, "c": 10}) for user in USERS] == arms


def test_two_experiments_have_nothing_to_do_with_each_other():
    weights = {"a": 1.0, "b": 1.0}
    one = np.array([arm_of(user, "one", weights) == "a" for user in USERS])
    two = np.array([arm_of(user, "two", weights) == "a" for user in USERS])
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.03


def test_without_arms_nobody_is_in_one():
    assert arm_of("u", "exp", {}) is None


def test_an_arm_does_not_depend_on_what_the_user_hash_of_exposures_says():
    weights = {"a": 1.0, "b": 1.0}
    low = np.array([int(user_hash(user)[:16], 16) % 1024 < 512 for user in USERS])
    arm = np.array([arm_of(user, "exp", weights) == "a" for user in USERS])
    assert abs(np.corrcoef(low, arm)[0, 1]) < 0.03


@pytest.mark.parametrize(
    "setting",
    ["serving.arms={a: {weight: 0}}", "serving.arms={a: {variant: din-mim, release: 1}}", "serving.arms={'': {}}",
     "serving.arms={'a b': {}}", "serving.arms={a: {variant: none}}"],
)  # fmt: skip
def test_arms_that_cannot_be_are_refused(setting):
    with pytest.raises(ConfigError):
        load_scenario("tiny", [setting])


def test_arms_are_set_on_the_command_line_and_keep_their_order():
    arms = load_scenario("tiny", ["serving.arms={mim: {weight: 0.9}, control: {variant: din-base}}"]).serving.arms
    assert list(arms) == ["mim", "control"]
    assert arms["control"] == Arm(variant="din-base")


@pytest.fixture
def experiment(small_run):
    """The run with a second CTR model, and an A/B test of it."""
    served = Served.of(small_run.scenario)
    second = small_run.root / "ctr" / "din-mim"
    second.mkdir()
    for path in (small_run.root / "ctr" / "sim-mim").iterdir():
        (second / path.name).symlink_to(path)
    info = (second / "ctr.json").read_text()
    (second / "ctr.json").unlink()
    (second / "ctr.json").write_text(info.replace('"seeds": [\n  0\n ]', '"seeds": [\n  0\n ],\n "note": "other"'))
    arms = {"control": Arm(), "other": Arm(variant="din-mim")}
    serving = small_run.scenario.serving.model_copy(update={"arms": arms, "exposed_items": 2})
    return small_run.scenario.model_copy(update={"serving": serving}), served


def test_each_user_gets_the_answer_of_their_arm_and_its_exposures_are_logged(experiment, monkeypatch):
    scenario, served = experiment
    serving = scenario.serving
    everybody = RankingService.open(served, serving)
    opened = []

    def other(served: Served) -> RankingService:
        opened.append(RankingService.open(served, serving, behaviors=everybody.behaviors))
        return opened[-1]

    traffic = Traffic.open(serving, served, arms_of(scenario, served), other)
    client = TestClient(ranking_api(everybody, serving, traffic), raise_server_exceptions=False)
    versions = {}
    for user in ("u1", "u2", "u3", "u4", "u5", "u6"):
        answer = client.post("/v1/rank", json={"user_id": user, "candidates": ["i1", "i2", "i3"]}).json()
        assert answer["arm"] == arm_of(user, "default", {"control": 1.0, "other": 1.0})
        versions.setdefault(answer["arm"], set()).add(answer["model_version"])
    assert versions["control"] == {everybody.model_version}
    assert versions["other"] == {opened[-1].model_version}
    assert versions["control"] != versions["other"]
    for service, number in ((everybody, 2), (opened[-1], 3)):
        service.degraded_answers["content"] += number
        service.default_features["device"] += number
    ready = client.get("/readyz").json()
    assert (ready["degraded"], ready["default_features"]) == ({"content": 5}, {"device": 5}), "of all arms"
    traffic.exposures.stop()
    rows = exposure_log(served.center).read().to_pylist()
    assert len(rows) == 6 * 2
    assert {row["position"] for row in rows} == {1, 2}
    assert {row["user_hash"]: row["arm"] for row in rows} == {
        user_hash(f"u{number}"): arm_of(f"u{number}", "default", {"control": 1.0, "other": 1.0})
        for number in range(1, 7)
    }
    assert not any("u1" in str(row) for row in rows), "no user id"
    client.post("/v1/events", json={"user_id": "u1", "item_id": "i9", "event": "click"})
    for service in (everybody, *opened):
        assert service.behaviors.history("u1")[0][-1] == "i9", "all arms know what was just posted"
        service.embeddings.stop()
    everybody.behaviors.stop()


def test_an_arm_may_be_a_release_and_one_that_is_not_there_is_refused(small_run):
    served = Served.of(small_run.scenario)
    ctr = f"{small_run.root}/ctr/sim-mim"
    version = RankingService.open(served, small_run.scenario.serving).model.encoder_version
    promote(served.center, encoder_version=version, snapshot=served.snapshot, ctr_model=ctr)
    promote(served.center, encoder_version=version, snapshot=served.snapshot, ctr_model=ctr)
    of = lambda number: small_run.scenario.model_copy(  # noqa: E731
        update={"serving": small_run.scenario.serving.model_copy(update={"arms": {"old": Arm(release=number)}})}
    )
    assert arms_of(of(1), Served.of(of(1)))["old"].release == 1
    with pytest.raises(ArtifactError, match="no release 3"):
        arms_of(of(3), Served.of(of(3)))


def test_an_experiment_with_a_model_that_is_not_there_does_not_start(small_run):
    serving = small_run.scenario.serving.model_copy(update={"arms": {"a": Arm(variant="din-base")}})
    with pytest.raises(ArtifactError):
        bind_ranking(small_run.scenario.model_copy(update={"serving": serving}))


def test_users_of_an_arm_that_cannot_be_opened_are_answered_and_counted_in_no_arm(experiment, caplog):
    scenario, served = experiment

    def gone(served: Served) -> RankingService:
        raise ArtifactError(f"{served.ctr} is not there.")

    traffic = Traffic.open(scenario.serving, served, arms_of(scenario, served), gone)
    everybody = RankingService.open(served, scenario.serving)
    client = TestClient(ranking_api(everybody, scenario.serving, traffic), raise_server_exceptions=False)
    arms = {}
    for number in range(1, 7):
        answer = client.post("/v1/rank", json={"user_id": f"u{number}", "candidates": ["i1"]}).json()
        assert answer["model_version"] == everybody.model_version
        arms[user_hash(f"u{number}")] = answer["arm"]
    intended = [traffic.arm_of(f"u{number}") for number in range(1, 7)]
    assert set(intended) == {"control", "other"}
    assert list(arms.values()) == ["control" if arm == "control" else None for arm in intended]
    ready = client.get("/readyz")
    assert ready.json()["arms_missing"] == 1
    assert str(scenario.run.root) not in ready.text
    assert "The arm other cannot be served" in caplog.text
    traffic.exposures.stop()
    assert {row["user_hash"]: row["arm"] for row in exposure_log(served.center).read().to_pylist()} == arms
    traffic.stop()
    everybody.embeddings.stop()
    everybody.behaviors.stop()


def test_a_replica_that_started_while_storage_was_away_becomes_whole(experiment, monkeypatch, caplog):
    monkeypatch.setattr(traffic_module, "RETRY_S", 0.01)
    scenario, served = experiment
    everybody = RankingService.open(served, scenario.serving)
    back, tried = threading.Event(), threading.Semaphore(0)

    def other(served: Served) -> RankingService:
        tried.release()
        if not back.is_set():
            raise OSError("storage is away")  # none of ours
        return RankingService.open(served, scenario.serving, behaviors=everybody.behaviors, metrics=everybody.metrics)

    before = set(threading.enumerate())
    traffic = Traffic.open(scenario.serving, served, arms_of(scenario, served), other)
    (thread,) = [one for one in set(threading.enumerate()) - before if one.name == "missing-arms"]
    for _ in range(4):
        assert tried.acquire(timeout=60), "it is not tried again"
    user = next(user for user in USERS if traffic.arm_of(user) == "other")
    request = RankRequest(user_id=user, candidates=["i1"])
    assert traffic.missing == ["other"]
    assert traffic.rank(request, traffic.choose(user, everybody)).arm is None
    back.set()
    thread.join(60)
    assert not thread.is_alive(), "nothing is left to be tried"
    assert traffic.missing == []
    answer = traffic.rank(request, traffic.choose(user, everybody))
    assert (answer.arm, answer.model_version != everybody.model_version) == ("other", True)
    assert caplog.text.count("The arm other cannot be served") == 1
    traffic.exposures.stop()
    for service in (everybody, *traffic.services):
        service.embeddings.stop()
    everybody.behaviors.stop()


def test_a_replica_counts_the_arms_that_it_lacks(experiment, monkeypatch):
    class NoReporter:  # it would ask Ray for the other replicas' metrics
        def __init__(self, metrics: Metrics) -> None:
            pass

        def stop(self) -> None:
            pass

    monkeypatch.setattr(ranking_app, "Reporter", NoReporter)
    scenario, served = experiment
    serving = scenario.serving.model_copy(update={"similar_items": False, "log_exposures": False})
    arms = arms_of(scenario, served)
    for lost, expected in ((0, 0.0), (1, 1.0)):
        gone = {name: replace(arm, ctr=f"{arm.ctr}-gone") if lost else arm for name, arm in arms.items()}
        replica = ranking_app.RankingReplica(served, serving, arms=gone)
        values = {
            family.name: [value for *_, value in family.samples] for family in replica._service.metrics.families()
        }
        assert values["mim_ray_arms_missing"] == [expected]
        for service in (replica._service, *replica._traffic.services):
            service.embeddings.stop()
        replica._service.behaviors.stop()


def test_a_missing_arm_is_tried_no_more_when_nobody_holds_the_replica(experiment, monkeypatch):
    monkeypatch.setattr(traffic_module, "RETRY_S", 0.01)
    scenario, served = experiment

    def gone(served: Served) -> RankingService:
        raise OSError("storage is away")

    serving = scenario.serving.model_copy(update={"log_exposures": False})
    before = set(threading.enumerate())
    traffic = Traffic.open(serving, served, arms_of(scenario, served), gone)
    (thread,) = set(threading.enumerate()) - before
    assert thread.is_alive()
    del traffic
    thread.join(60)
    assert not thread.is_alive()


def test_without_arms_nothing_is_logged_unless_it_is_wanted(small_run):
    served = Served.of(small_run.scenario)
    serving = small_run.scenario.serving
    assert Traffic.open(serving, served, {}, None).exposures is None
    wanted = Traffic.open(serving.model_copy(update={"log_exposures": True}), served, {}, None)
    assert wanted.exposures is not None
    assert wanted.arm_of("u1") is None
    wanted.exposures.stop()
