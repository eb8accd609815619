"""Ranking with all tables on parameter machines: real actors, the same scores, one call, never a wrong score."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from starlette.testclient import TestClient

from mim_ray import artifacts
from mim_ray.config import Scenario
from mim_ray.errors import ArtifactError, ConfigError
from mim_ray.pipeline.machines import main
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.machine_release import read_wanted
from mim_ray.representation_center.parameter_client import ParameterClient
from mim_ray.representation_center.parameter_machines import ParameterMachines
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.snapshot_line import current_snapshot
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import append_segment, fold, segment_rows
from mim_ray.serving.machines import load_current
from mim_ray.serving.messages import RankRequest, RankResponse
from mim_ray.serving.promotion import promote_version
from mim_ray.serving.ranker import RankingService
from mim_ray.serving.ranking_app import ranking_api
from mim_ray.serving.served import Served

pytestmark = pytest.mark.ray

CANDIDATES = [*(f"i{row}" for row in range(40)), "never-heard-of"]
ASK = RankRequest(user_id="u1", candidates=CANDIDATES)


@pytest.fixture(scope="module")
def fleet(
    ray_cluster: None, shared_run: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Scenario, ParameterMachines]]:
    """A copy of the run, promoted, on 2 shards of one machine each; and ctr/other-mim, the same model with other weights."""
    folder = tmp_path_factory.mktemp("on-machines")
    root = f"{folder}/run"
    shutil.copytree(shared_run.root, root, symlinks=True, ignore=shutil.ignore_patterns("window"))
    manifest = Path(f"{root}/extraction/artifact.json")
    manifest.write_text(manifest.read_text().replace(str(shared_run.root), root))
    shutil.copytree(f"{root}/ctr/sim-mim", f"{root}/ctr/other-mim")
    path = f"{root}/ctr/other-mim/seed-0/tables.safetensors"
    artifacts.write_tensors(path, {name: -30 * table for name, table in artifacts.read_tensors(path).items()})
    options = {
        "state": f"{folder}/machines.json",
        "folder": f"{folder}/machines",
        "replicas": 1,
        "cpus_per_machine": 0.0,
        "freshness_s": 0.5,
        "follow_every_s": 0.05,
        "deadline_ms": 30_000,
    }
    scenario = shared_run.scenario
    changed = {
        "machines": scenario.machines.model_copy(update=options),
        "run": scenario.run.model_copy(update={"root": root}),
    }
    scenario = scenario.model_copy(update=changed)
    promote_version(scenario, ctr="sim-mim")
    machines = load_current(scenario)
    yield scenario, machines
    machines.stop()


@pytest.fixture
def on_machines(fleet: tuple[Scenario, ParameterMachines]) -> tuple[Scenario, ParameterMachines, int]:
    """With sim-mim as the current release, and its number."""
    scenario, machines = fleet
    number = promote_version(scenario, ctr="sim-mim").number
    load_current(scenario)
    return scenario, machines, number


def opened(scenario: Scenario, *, follow: bool = False) -> RankingService:
    served = Served.for_ranking(scenario)
    return RankingService.open(served, scenario.serving, scenario.machines, scenario if follow else None)


def local(scenario: Scenario) -> RankingService:
    service = RankingService.open(Served.of(scenario), scenario.serving)
    assert service.embeddings is not None
    service.embeddings.stop()
    return service


def scores(service: RankingService, request: RankRequest = ASK) -> dict[str, float]:
    return {item.item_id: item.prob for item in service.rank(request).items}


def test_the_scores_are_those_of_tables_in_the_process_by_one_call_for_a_request(
    on_machines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario, _, number = on_machines
    served, plain = opened(scenario), local(scenario)
    assert served.embeddings is None, "the replica holds no table"
    vector = Snapshot.open(Served.of(scenario).snapshot).gather(np.array([0]))
    rows = segment_rows(["n1"], vector, content_hashes=["h"], content_at=[datetime.now(UTC)], categories=["mugs"])
    append_segment(f"{Served.of(scenario).center}/window", rows, encoder_version=plain.model.encoder_version or "")
    assert plain.embeddings is not None
    plain.embeddings.refresh()
    calls = []
    get_many = ParameterClient.get_many
    monkeypatch.setattr(
        ParameterClient, "get_many", lambda *given, **named: calls.append(1) or get_many(*given, **named)
    )
    start = time.monotonic()
    new = RankRequest(user_id="u1", candidates=["n1"])
    while served.rank(new).items[0].no_content:
        assert time.monotonic() - start < 20, "the machines do not see the new item"
    for user in ("u1", "u9", "nobody"):
        request = RankRequest(user_id=user, candidates=[*CANDIDATES, "n1"], top_k=30)
        del calls[:]
        ours, expected = served.rank(request), plain.rank(request)
        assert len(calls) == 1
        assert [item.item_id for item in ours.items] == [item.item_id for item in expected.items]
        for one, other in zip(ours.items, expected.items, strict=True):
            assert one.prob == pytest.approx(other.prob, abs=1e-5)
            assert (one.unknown_item, one.no_content) == (other.unknown_item, other.no_content)
        assert (ours.release, ours.degraded, ours.model_version) == (number, [], expected.model_version)
    assert len({round(prob, 5) for prob in scores(served).values()}) > 10


def test_a_shard_that_is_gone_degrades_within_the_deadline_and_says_so(on_machines: Any) -> None:
    scenario, machines, _ = on_machines
    quick = scenario.model_copy(update={"machines": scenario.machines.model_copy(update={"deadline_ms": 400})})
    served, plain = opened(quick), local(scenario)
    client = TestClient(ranking_api(served, scenario.serving))
    full = scores(served)
    (gone,) = [where for where in machines.status() if where["shard"] == 1]
    os.kill(gone["pid"], signal.SIGSTOP)
    try:
        with pytest.raises(ray.exceptions.GetTimeoutError):
            ray.get(machines.actors[1, 0].where.remote(), timeout=1.0)  # also longer than freshness_s
        answer = client.post("/v1/rank", json=ASK.model_dump(include={"user_id", "candidates"})).json()
        assert answer["degraded"] == ["content", "tables"]
        assert all(item["no_content"] for item in answer["items"])
        unknown = {item["item_id"] for item in answer["items"] if item["unknown_item"]}
        assert {f"i{row}" for row in range(30, 40)} < unknown < set(CANDIDATES)
        assert client.get("/readyz").json()["degraded"] == {"content": 1, "tables": 1}
        ours = {item["item_id"]: item["prob"] for item in answer["items"]}
        # Which rows are away is the machines' choice: put row 0 in their place, and score by hand.
        asked = plain.model.request("u1", plain.behaviors.history("u1")[0], CANDIDATES)
        found = served.rollout.current.rows.get(served.model.request("u1", asked.ids[:5], CANDIDATES))
        missing = found.tables[0].embed({"item": found.batch.item_row, "category": found.batch.category})["item"]  # type: ignore[index]
        table = plain.model.models[0][1].embed({"item": found.batch.item_row})["item"]
        away = (missing != table).any(dim=1)
        row_0 = plain.model.models[0][1].embed({"item": found.batch.item_row * 0})["item"]
        assert away.any()
        assert (missing[away] == row_0[away]).all()
        asked.item_row[away.numpy()] = 0
        expected = plain.model.predict(asked.batch())
        user_away = not np.allclose([ours[item] for item in CANDIDATES], expected, atol=1e-5)
        if user_away:  # the user's row was on the shard, too
            asked.user[:] = 0
            expected = plain.model.predict(asked.batch())
        np.testing.assert_allclose([ours[item] for item in CANDIDATES], expected, atol=1e-5)
    finally:
        os.kill(gone["pid"], signal.SIGCONT)
    start = time.monotonic()
    while (answer := served.rank(ASK)).degraded:
        assert time.monotonic() - start < 20, "it does not recover"
    assert {item.item_id: item.prob for item in answer.items} == pytest.approx(full, abs=1e-6)


def test_a_replica_follows_the_machines_to_another_release_and_never_mixes(on_machines: Any) -> None:
    scenario, _, number = on_machines
    served = opened(scenario, follow=True)
    try:
        first = scores(served)
        promote_version(scenario, ctr="other-mim")
        assert served.rollout.check().served.release == number, "promoted, but not on the machines yet"
        load_current(scenario)
        start = time.monotonic()
        while (answer := served.rank(ASK)).release == number:
            assert {item.item_id: item.prob for item in answer.items} == pytest.approx(first, abs=1e-6)
            assert time.monotonic() - start < 20, "the replica does not follow"
        expected = scores(local(scenario))
        assert {item.item_id: item.prob for item in answer.items} == pytest.approx(expected, abs=1e-5)
        assert expected != pytest.approx(first, abs=1e-3)
        assert answer.release == number + 1
    finally:
        served.rollout.stop()


def test_machines_that_dropped_the_release_make_the_replica_switch_at_once(
    on_machines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario, machines, number = on_machines
    quick = scenario.model_copy(update={"serving": scenario.serving.model_copy(update={"follow_release_s": 3_600.0})})
    served = opened(quick, follow=True)
    try:
        held = served.rollout.current.served.serial
        promote_version(scenario, ctr="other-mim")
        load_current(scenario)
        assert served.rank(ASK).release == number, "the machines still answer of the release before"
        ray.get([actor.change.remote("forget", held) for actor in machines.actors.values()])
        assert served.rank(ASK).release == number + 1
    finally:
        served.rollout.stop()


def test_an_item_newer_than_the_model_keeps_its_category_when_the_machines_get_a_newer_snapshot(
    on_machines: Any,
) -> None:
    scenario, _, _ = on_machines
    root, center = artifacts.run_root(scenario), Served.of(scenario).center
    table = EmbeddingTable(f"{center}/table")
    (version,) = table.encoder_versions()
    line = f"{center}/snapshots/{version}"
    shutil.copytree(f"{root}/ctr/sim-mim", f"{root}/ctr/exact-mim", ignore=shutil.ignore_patterns("machines"))
    info = artifacts.read_json(f"{root}/ctr/exact-mim/ctr.json")
    trained_on = f"{line}/{current_snapshot(line)}"
    artifacts.write_json(f"{root}/ctr/exact-mim/ctr.json", info | {"snapshot": trained_on})
    new = {"a-mug": "mugs", "a-sock": "socks", "a-hat": "hats", "a-thing": None}
    rows = segment_rows(
        list(new),
        np.ones((len(new), scenario.encoders.width), np.float32),
        content_hashes=["0" * 32] * len(new),
        content_at=[datetime.now(UTC)] * len(new),
        categories=list(new.values()),
    )
    append_segment(f"{center}/window", rows, encoder_version=version)
    promote_version(scenario, ctr="exact-mim")
    load_current(scenario)
    ask = RankRequest(user_id="u1", candidates=list(new))
    before = scores(opened(scenario), ask)
    assert before["a-mug"] != before["a-thing"] != before["a-sock"], "the category is seen"
    assert before["a-hat"] == before["a-thing"], "the model knows no hats"
    fold(f"{center}/window", table, keep_s=0)
    build_snapshot(table, version, line)
    machines = load_current(scenario)
    held = read_wanted(str(scenario.machines.state))[1].tables["mm"].snapshot
    assert held == f"{line}/{current_snapshot(line)}" != trained_on, "the newer state, without another promotion"
    assert {where["overlay_items"]["mm"] for where in machines.status()} == {0}
    service = opened(scenario)
    assert scores(service, ask) == pytest.approx(before, abs=1e-7)
    assert scores(local(scenario), ask) == pytest.approx(before, abs=1e-5)


def test_what_does_not_fit_never_gets_to_the_machines(on_machines: Any) -> None:
    scenario, _, number = on_machines
    served = opened(scenario)
    root = artifacts.run_root(scenario)
    shutil.copytree(f"{root}/ctr/sim-mim", f"{root}/ctr/bad-mim", ignore=shutil.ignore_patterns("network.safetensors"))
    promote_version(scenario, ctr="bad-mim")
    with pytest.raises(ArtifactError, match=r"network\.safetensors"):
        load_current(scenario)
    assert served.rank(ASK).release == number
    machines = scenario.machines.model_copy(update={"state": None})
    with pytest.raises(ConfigError, match=r"machines\.state is not set"):
        load_current(scenario.model_copy(update={"machines": machines}))


def test_the_job_switches_machines_that_run_and_says_what_they_hold(
    on_machines: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario, _, number = on_machines
    options = scenario.machines.model_dump(include={"state", "folder", "replicas", "cpus_per_machine"})
    words = [f"run.root={scenario.run.root}", *(f"machines.{key}={value}" for key, value in options.items())]
    with contextlib.suppress(SystemExit):
        main(__doc__, ["--config", "tiny", *words])
    said = capsys.readouterr()
    assert f"{number} (switch " in said.out, said.err
    assert "2 shards × 1 replicas" in said.out
    assert "item-0" in said.out


@pytest.mark.chaos
def test_a_machine_that_is_killed_under_constant_calls_costs_no_answer_and_no_content(
    on_machines: Any, tmp_path: Path
) -> None:
    scenario, _, number = on_machines
    options = {"state": f"{tmp_path}/machines.json", "folder": f"{tmp_path}/machines", "replicas": 2}
    pairs = scenario.model_copy(update={"machines": scenario.machines.model_copy(update=options)})
    machines = load_current(pairs)
    try:
        served, expected = opened(pairs), scores(local(scenario))
        answers: list[Any] = []
        stop = threading.Event()

        def call() -> None:
            while not stop.is_set():
                try:
                    answers.append(served.rank(ASK))
                except Exception as error:  # noqa: BLE001  (each is a failed request)
                    answers.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        try:
            killed = []
            for where in machines.status()[:2]:
                seen = len(answers)
                os.kill(where["pid"], signal.SIGKILL)
                killed.append(where["pid"])
                start = time.monotonic()
                while len(answers) < seen + 20 or not all_back(machines, killed):
                    assert time.monotonic() - start < 120, "Ray does not bring the machine back"
                    time.sleep(0.05)
        finally:
            stop.set()
            thread.join()
        assert {type(answer) for answer in answers} == {RankResponse}, [a for a in answers if isinstance(a, Exception)][
            :3
        ]
        for answer in answers:
            assert (answer.degraded, answer.release) == ([], number)
            assert {item.item_id: item.prob for item in answer.items} == pytest.approx(expected, abs=1e-5)
    finally:
        machines.stop()


def all_back(machines: ParameterMachines, killed: list[int]) -> bool:
    """Whether every place has a machine that answers, none of them killed."""
    pids = [where.get("pid") for where in machines.status()]
    return None not in pids and not set(pids) & set(killed)
