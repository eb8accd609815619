"""A promoted release reaches a running ranker by itself: no failure, no mixed answer; a bad one is refused."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from mim_ray import artifacts
from mim_ray.encoders.item_encoder import ItemEncoder
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.release import promote, read_release
from mim_ray.representation_center.snapshot_line import current_snapshot
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import append_segment, fold, segment_rows
from mim_ray.serving.messages import RankRequest
from mim_ray.serving.new_item_app import new_item_api
from mim_ray.serving.new_item_encoder import NewItemEncoder
from mim_ray.serving.promotion import promote_version, return_to
from mim_ray.serving.ranker import RankingService
from mim_ray.serving.ranking_app import ranking_api
from mim_ray.serving.release_check import ReleaseCheck
from mim_ray.serving.served import Served

CANDIDATES = [f"i{row}" for row in range(40)]
NEW = "csft-of-tomorrow"


@pytest.fixture
def run(small_run: Any) -> Any:
    """With a second encoder version, whose embeddings are others, and ctr/new-mim, trained on it, with other weights."""
    root = small_run.root
    table = EmbeddingTable(f"{root}/center/table")
    rows = table.current_rows(table.encoder_versions()[0])
    rows = rows.drop_columns(["encoder_version", "commit_version", "shard_id", "origin"])
    reversed_rows = rows.set_column(
        rows.schema.get_field_index("embedding"), "embedding", rows["embedding"].take(list(range(len(rows)))[::-1])
    )
    table.append(reversed_rows, encoder_version=NEW, shard_id="s0")
    build_snapshot(table, NEW, f"{root}/center/snapshots/{NEW}")
    copy_of_model(root, "new-mim", encoder_version=NEW)
    path = f"{root}/ctr/new-mim/seed-0/tables.safetensors"
    artifacts.write_tensors(path, {name: -30 * rows for name, rows in artifacts.read_tensors(path).items()})
    return small_run


def copy_of_model(root: Any, name: str, **info: Any) -> None:
    shutil.copytree(root / "ctr" / "sim-mim", root / "ctr" / name)
    path = root / "ctr" / name / "ctr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | info))


@pytest.fixture
def service(run: Any) -> Iterator[RankingService]:
    """A replica that follows, every 50 ms."""
    serving = run.scenario.serving.model_copy(update={"follow_release_s": 0.05})
    service = RankingService.open(Served.of(run.scenario), serving, None, run.scenario)
    service.rollout._retry_s = 0.1
    yield service
    service.rollout.stop()
    service.rollout.current.close()


def reference(run: Any) -> np.ndarray:
    """Scores of `CANDIDATES` by a replica that knows the current release alone."""
    service = RankingService.open(Served.of(run.scenario), run.scenario.serving)
    service.rollout.current.close()
    return scores(service.rank(RankRequest(user_id="u1", candidates=CANDIDATES)))


def scores(answer: Any) -> np.ndarray:
    prob = {item.item_id: item.prob for item in answer.items}
    return np.array([prob[item] for item in CANDIDATES])


def wait_for(service: RankingService, release: int | None) -> None:
    start = time.monotonic()
    while service.rollout.current.served.release != release:
        assert time.monotonic() - start < 30, service.rollout.refused
        time.sleep(0.01)


def wait_for_refusal(service: RankingService, said: str) -> str:
    start = time.monotonic()
    while said not in (service.rollout.refused or ""):
        assert time.monotonic() - start < 30, service.rollout.refused
        time.sleep(0.01)
    return service.rollout.refused or ""


def test_under_constant_calls_a_release_and_a_roll_back_fail_no_request_and_mix_nothing(
    run: Any, service: RankingService
) -> None:
    client = TestClient(ranking_api(service, run.scenario.serving))
    body = {"user_id": "u1", "candidates": CANDIDATES}
    answers: list[Any] = []
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set():
            answers.append(client.post("/v1/rank", json=body))

    expected = {None: reference(run)}
    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for promoted in (
            lambda: promote_version(run.scenario, ctr="sim-mim"),
            lambda: promote_version(run.scenario, NEW, ctr="new-mim"),
            lambda: return_to(run.scenario),
        ):
            number = promoted().number
            expected[number] = reference(run)
            wait_for(service, number)
            seen = len(answers)
            while len(answers) < seen + 5:
                time.sleep(0.01)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {answer.status_code for answer in answers} == {200}
    versions = set()
    for answer in answers:
        told = answer.json()
        prob = {item["item_id"]: item["prob"] for item in told["items"]}
        np.testing.assert_allclose([prob[item] for item in CANDIDATES], expected[told["release"]], atol=1e-6)
        versions.add((told["release"], told["encoder_version"] == NEW))
    assert versions == {(None, False), (1, False), (2, True), (3, False)}
    assert np.abs(expected[1] - expected[2]).max() > 0.01, "the two releases rank differently"


@pytest.mark.parametrize("fault", ["missing weights", "damaged snapshot", "no numbers", "other versions", "no model"])
def test_a_release_that_cannot_serve_leaves_the_one_before_serving_and_says_why(
    run: Any, service: RankingService, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = TestClient(ranking_api(service, run.scenario.serving))
    good = promote_version(run.scenario, ctr="sim-mim")
    wait_for(service, 1)
    before = reference(run)
    copy_of_model(run.root, "bad-mim")
    ctr, snapshot, version = f"{run.root}/ctr/bad-mim", good.snapshot, good.encoder_version
    if fault == "missing weights":
        (run.root / "ctr" / "bad-mim" / "seed-0" / "network.safetensors").unlink()
        said = "network.safetensors"
    elif fault == "damaged snapshot":
        snapshot = f"{run.root}/center/snapshots/copy/broken"
        shutil.copytree(good.snapshot, snapshot)
        for file in artifacts.list_files(snapshot):
            if "matrix" in file:
                artifacts.write_bytes(file, b"x" * 100)
        said = "snapshots/copy/broken"
    elif fault == "no numbers":
        path = f"{ctr}/seed-0/network.safetensors"
        artifacts.write_tensors(path, {name: w * np.nan for name, w in artifacts.read_tensors(path).items()})
        said = "no numbers"
    elif fault == "other versions":
        ctr, said = f"{run.root}/ctr/new-mim", NEW
    else:
        ctr, said = f"{run.root}/ctr/nowhere", "nowhere"
    kind = "its parts are of different encoder versions" if fault == "other versions" else "missing or damaged"
    with caplog.at_level(logging.ERROR, logger="ray.serve"):
        promote(f"{run.root}/center", encoder_version=version, snapshot=snapshot, ctr_model=ctr)
        refused = wait_for_refusal(service, said)
        assert refused.startswith("Release 2 cannot be served: ")
        ready = client.get("/readyz").json()
        assert ready["release"] == 1
        assert kind in ready["refused"], "what sort of problem it is"
        assert "/" not in ready["refused"], "and no path: strangers may ask"
        answer = service.rank(RankRequest(user_id="u1", candidates=CANDIDATES))
        assert answer.release == 1
        np.testing.assert_allclose(scores(answer), before, atol=1e-7)
        time.sleep(0.3)
    told = [record.getMessage() for record in caplog.records if "Release 2" in record.getMessage()]
    assert len(told) == 1, "told once, not at every look"
    assert told[0].endswith("release 1 goes on.")
    assert refused in told[0]
    return_to(run.scenario)
    wait_for(service, 3)
    assert client.get("/readyz").json()["refused"] is None


def test_a_release_that_is_repaired_is_taken_up(run: Any, service: RankingService) -> None:
    copy_of_model(run.root, "bad-mim")
    path = run.root / "ctr" / "bad-mim" / "seed-0" / "network.safetensors"
    weights = path.read_bytes()
    path.unlink()
    promote_version(run.scenario, ctr="bad-mim")
    wait_for_refusal(service, "Release 1")
    path.write_bytes(weights)
    wait_for(service, 1)
    assert service.rollout.refused is None


def test_a_replica_that_starts_while_the_release_is_bad_serves_what_it_was_given(run: Any) -> None:
    good = Served.of(run.scenario)
    copy_of_model(run.root, "bad-mim")
    promote_version(run.scenario, ctr="bad-mim")
    (run.root / "ctr" / "bad-mim" / "seed-0" / "network.safetensors").unlink()
    service = RankingService.open(good, run.scenario.serving, None, run.scenario)
    try:
        assert service.rollout.current.served == good
        assert "Release 1" in (service.rollout.refused or "")
    finally:
        service.rollout.stop()
        service.rollout.current.close()


def test_a_replica_of_something_else_than_the_release_stays_with_it(run: Any) -> None:
    given = replace(Served.of(run.scenario), ctr=f"{run.root}/ctr/sim-mim")
    service = RankingService.open(given, run.scenario.serving)
    promote_version(run.scenario, NEW, ctr="new-mim")
    assert service.rollout.check().served == given
    service.rollout.current.close()


def test_the_encoder_app_encodes_nothing_under_a_release_of_another_version(run: Any) -> None:
    encoder = ItemEncoder.load(f"{run.root}/csft/encoder")
    app = NewItemEncoder(encoder, f"{run.root}/center", run.scenario.data)
    app.check_release = ReleaseCheck(f"{run.root}/center", encoder.encoder_version, 0.0)
    client = TestClient(new_item_api(app, run.scenario.serving))
    assert client.post("/v1/items", json={"item_id": "n1", "title": "red mug"}).status_code == 200
    promote_version(run.scenario, NEW, ctr="new-mim")
    window = sorted((run.root / "center" / "window").rglob("*"))
    assert client.post("/v1/items", json={"item_id": "n2", "title": "blue mug"}).status_code == 503
    assert client.get("/v1/items/readyz").status_code == 503
    assert sorted((run.root / "center" / "window").rglob("*")) == window, "nothing was stored"
    return_to_old = promote_version(run.scenario, encoder.encoder_version, ctr="sim-mim")
    assert read_release(f"{run.root}/center") == return_to_old
    assert client.post("/v1/items", json={"item_id": "n2", "title": "blue mug"}).status_code == 200


def test_an_item_that_is_newer_than_the_model_keeps_its_category_when_a_newer_snapshot_is_promoted(run: Any) -> None:
    table, window = EmbeddingTable(f"{run.root}/center/table"), f"{run.root}/center/window"
    version = table.encoder_versions()[0]
    line = f"{run.root}/center/snapshots/{version}"
    info = artifacts.read_json(f"{run.root}/ctr/sim-mim/ctr.json")
    trained_on = f"{line}/{current_snapshot(line)}"
    artifacts.write_json(f"{run.root}/ctr/sim-mim/ctr.json", info | {"snapshot": trained_on})
    vectors = np.ones((2, run.scenario.encoders.width), np.float32)
    rows = segment_rows(
        ["mug", "thing"],
        vectors,
        content_hashes=["0" * 32] * 2,
        content_at=[datetime.now(UTC)] * 2,
        categories=["mugs", None],
    )
    append_segment(window, rows, encoder_version=version)

    def prob() -> dict[str, float]:
        service = RankingService.open(Served.of(run.scenario), run.scenario.serving)
        service.rollout.current.close()
        service.behaviors.stop()
        answer = service.rank(RankRequest(user_id="u1", candidates=["mug", "thing"]))
        return {item.item_id: item.prob for item in answer.items}

    promote_version(run.scenario, ctr="sim-mim")
    before = prob()
    assert before["mug"] != before["thing"], "the category is seen"
    fold(window, table, keep_s=0)
    build_snapshot(table, version, line)
    assert prob() == pytest.approx(before, abs=1e-7), "a newer snapshot is read"
    promote_version(run.scenario, ctr="sim-mim")
    assert prob() == pytest.approx(before, abs=1e-7), "and promoted"
