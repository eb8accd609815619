import asyncio
import base64
import concurrent.futures
import json
import threading
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from mim_ray import artifacts
from mim_ray.ciubm.export import load_ranker
from mim_ray.ciubm.model import CtrNetwork, NetworkConfig
from mim_ray.config.scenario import Serving
from mim_ray.data.transforms import decode_image
from mim_ray.encoders.item_encoder import ItemEncoder, encode_queries
from mim_ray.errors import ArtifactError, UnavailableError, VersionMismatchError
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.updates import append_segment, segment_rows
from mim_ray.serving.answers import reasons
from mim_ray.serving.messages import RankRequest
from mim_ray.serving.query_encoder import QueryEncoder
from mim_ray.serving.ranker import MAX_ONGOING_REQUESTS, RankingService
from mim_ray.serving.ranking_app import bind_ranking, ranking_api
from mim_ray.serving.served import Served
from mim_ray.training.checkpoint import with_prefix


@pytest.fixture
def service(small_run):
    service = RankingService.open(Served.of(small_run.scenario), small_run.scenario.serving)
    yield service
    service.embeddings.stop()


@pytest.fixture
def client(service, small_run):
    serving = small_run.scenario.serving.model_copy(update={"max_candidates": 50})
    service.max_candidates = serving.max_candidates
    return TestClient(ranking_api(service, serving), raise_server_exceptions=False)


def test_items_come_by_falling_probability_of_the_model_itself(client, service, small_run):
    candidates = [f"i{row}" for row in range(20)]
    answer = client.post("/v1/rank", json={"user_id": "u1", "candidates": candidates}).json()
    prob = {item["item_id"]: item["prob"] for item in answer["items"]}
    assert list(prob.values()) == sorted(prob.values(), reverse=True)
    snapshot = Snapshot.open(Served.of(small_run.scenario).snapshot)

    def multi_get(ids):
        rows = snapshot.lookup(ids)
        return snapshot.gather(rows), rows >= 0, [None] * len(ids)

    model = load_ranker(f"{small_run.root}/ctr/sim-mim")
    expected = model.score("u1", ["i1", "i2", "i3", "i4", "i5"], candidates, multi_get)
    np.testing.assert_allclose([prob[item] for item in candidates], expected, atol=1e-7)
    assert answer["num_behaviors"] == 5
    assert answer["encoder_version"] == snapshot.encoder_version
    assert answer["model_version"].startswith("sim-mim-")


def test_top_k_keeps_the_best_and_a_candidate_given_twice_is_ranked_once(client):
    body = {"user_id": "u1", "candidates": ["i3", "i1", "i3", "i2", "i1"]}
    ranked = client.post("/v1/rank", json=body).json()["items"]
    assert sorted(item["item_id"] for item in ranked) == ["i1", "i2", "i3"]
    assert client.post("/v1/rank", json=body | {"top_k": 2}).json()["items"] == ranked[:2]
    assert client.post("/v1/rank", json=body | {"top_k": 99}).json()["items"] == ranked


def test_behaviors_in_the_request_replace_the_stored_ones(client):
    body = {"user_id": "u1", "candidates": ["i1", "i2"]}
    stored = client.post("/v1/rank", json=body).json()
    same = client.post("/v1/rank", json=body | {"behaviors": ["i1", "i2", "i3", "i4", "i5"]}).json()
    other = client.post("/v1/rank", json=body | {"behaviors": ["i20"]}).json()
    none = client.post("/v1/rank", json=body | {"behaviors": []}).json()
    assert same["items"] == stored["items"] != other["items"]
    assert (other["num_behaviors"], none["num_behaviors"]) == (1, 0)


def test_behaviors_with_times_are_sorted_and_later_ones_left_out(client, service, monkeypatch):
    seen, request = [], service.model.request

    def noted(user, behaviors, candidates, **options):
        seen.append((behaviors, options["behavior_times"], options["timestamp"]))
        return request(user, behaviors, candidates, **options)

    monkeypatch.setattr(service.model, "request", noted)
    body = {"user_id": "u1", "candidates": ["i1"], "timestamp": "2026-01-02T00:00:00Z"}
    days = ["2026-01-01T12:00:00Z", "2026-01-02T00:00:00Z", "2026-01-01T01:00:00+01:00", "2026-03-01T00:00:00Z"]
    answer = client.post("/v1/rank", json=body | {"behaviors": ["a", "b", "c", "d"], "behavior_times": days})
    assert (answer.json()["num_behaviors"], answer.json()["num_future_behaviors"]) == (2, 2)
    start = 1_767_225_600_000_000
    assert seen == [(["c", "a"], [start, start + 43_200_000_000], start + 86_400_000_000)]


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (["2026-01-01T12:00:00Z"], "behavior_times holds 1 times for 2 behaviors"),
        (["2026-01-01T12:00:00", "2026-01-01T12:00:00Z"], "timezone"),
        ("yesterday", "behavior_times"),
    ],
)
def test_times_that_do_not_fit_are_a_sentence(client, times, said):
    body = {"user_id": "u1", "candidates": ["i1"], "behaviors": ["a", "b"], "behavior_times": times}
    answer = client.post("/v1/rank", json=body)
    assert answer.status_code == 422
    assert said in answer.json()["error"]


@pytest.fixture
def with_features(client, service, monkeypatch):
    """The same client; the model has a categorical, a dense and a multi-valued feature. Gives the rows it was asked for."""
    kinds = {"device": "categorical", "price": "dense", "tags": "multi"}
    monkeypatch.setattr(type(service.model.features), "kinds", property(lambda _: kinds))
    seen, request = [], service.model.request

    def noted(*asked, context, **options):
        seen.append(context.select(list(kinds)).to_pylist())
        return request(*asked, **options)

    monkeypatch.setattr(service.model, "request", noted)
    return client, seen


def test_context_reaches_the_model_in_the_order_of_the_candidates(with_features):
    client, seen = with_features
    body = {"user_id": "u1", "candidates": ["i3", "i1", "i3"], "context": {"device": "phone", "tags": ["x", 3, None]}}
    answer = client.post("/v1/rank", json=body | {"item_context": {"price": [3, True, 99.5]}}).json()
    both = {"device": "phone", "tags": ["x", "3", None]}
    assert seen == [[both | {"price": 3.0}, both | {"price": 1.0}]]
    assert answer["default_features"] == []


def test_absent_features_are_named_and_counted(with_features):
    client, seen = with_features
    body = {"user_id": "u1", "candidates": ["i3", "i1"], "context": {"device": None}}
    answer = client.post("/v1/rank", json=body | {"item_context": {"price": [None, 2.5]}}).json()
    assert answer["default_features"] == ["device", "price", "tags"]
    assert seen == [[{"device": None, "price": None, "tags": None}, {"device": None, "price": 2.5, "tags": None}]]
    body = '{"user_id": "u1", "candidates": ["i1"], "context": {"device": 7, "tags": [], "price": null}}'
    answer = client.post("/v1/rank", content=body, headers={"content-type": "application/json"}).json()
    assert answer["default_features"] == ["price"]
    body = body.replace("null", "1" + "0" * 400)
    answer = client.post("/v1/rank", content=body, headers={"content-type": "application/json"}).json()
    assert answer["default_features"] == ["price"]
    client.post("/v1/rank", json={"user_id": "u1", "candidates": ["i1"]})
    assert client.get("/readyz").json()["default_features"] == {"device": 2, "price": 4, "tags": 2}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"context": {"colour": "red"}}, "context.colour is no feature of this model; it has device, price, tags"),
        ({"item_context": {"colour": ["red"]}}, "item_context.colour is no feature of this model"),
        ({"context": {"price": "12"}}, "context.price must be a number."),
        ({"context": {"price": {"eur": 12}}}, "context.price must be a number."),
        ({"context": {"device": 1.5}}, "context.device must be a string or a whole number."),
        ({"context": {"device": True}}, "context.device must be a string or a whole number."),
        ({"context": {"device": "\ud800"}}, "half of a character"),
        ({"context": {"tags": "x"}}, "context.tags must be a list of strings or whole numbers."),
        ({"context": {"tags": [["x"]]}}, "context.tags must be a list of strings or whole numbers."),
        ({"item_context": {"price": [1, 2]}}, "item_context.price holds 2 values for 1 candidates."),
        ({"item_context": {"price": ["1"]}}, "item_context.price[0] must be a number."),
        ({"item_context": {"price": [1]}, "context": {"price": 1}}, "price is both in context and in item_context."),
        ({"context": ["device"]}, "context"),
    ],
)
def test_a_context_that_does_not_fit_is_a_sentence(with_features, body, said):
    client, _ = with_features
    text = json.dumps({"user_id": "u1", "candidates": ["i1"]} | body)
    answer = client.post("/v1/rank", content=text, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert said in answer.json()["error"]


def test_unknown_users_and_items_are_scored_and_flagged(client):
    answer = client.post("/v1/rank", json={"user_id": "nobody", "candidates": ["i1", "i35", "never-heard-of"]}).json()
    flags = {item["item_id"]: (item["unknown_item"], item["no_content"]) for item in answer["items"]}
    assert flags == {"i1": (False, False), "i35": (True, False), "never-heard-of": (True, True)}
    assert answer["num_behaviors"] == 0
    assert all(0 <= item["prob"] <= 1 for item in answer["items"])


def test_requests_that_wait_for_parameter_machines_wait_side_by_side(service, client, monkeypatch):
    together = threading.Barrier(MAX_ONGOING_REQUESTS, timeout=60)
    rank = service.rank

    def rank_together(*given):
        together.wait()
        return rank(*given)

    monkeypatch.setattr(service, "rank", rank_together)
    monkeypatch.setattr(type(service.rollout.current.rows), "waits", True)
    with client, concurrent.futures.ThreadPoolExecutor(MAX_ONGOING_REQUESTS) as pool:
        body = {"user_id": "u1", "candidates": ["i1"]}
        answers = list(pool.map(lambda _: client.post("/v1/rank", json=body), range(MAX_ONGOING_REQUESTS)))
    assert {answer.status_code for answer in answers} == {200}


def test_ids_that_look_like_paths_or_sql_are_ids(client):
    ids = ["../../etc/passwd", "'; drop table items; --", "i1/../i2", "💥", "%00", "a b"]
    answer = client.post("/v1/rank", json={"user_id": ids[0], "candidates": ids})
    assert answer.status_code == 200
    assert sorted(item["item_id"] for item in answer.json()["items"]) == sorted(ids)


def test_more_candidates_than_allowed_are_refused(client):
    answer = client.post("/v1/rank", json={"user_id": "u", "candidates": [f"i{row}" for row in range(51)]})
    assert answer.status_code == 422
    assert "51 items; at most 50" in answer.json()["error"]


def test_a_new_item_gets_content_and_its_category_without_a_restart(service, small_run):
    request = RankRequest(user_id="u1", candidates=["n1"])
    before = service.rank(request).items[0]
    assert (before.unknown_item, before.no_content) == (True, True)
    vector = Snapshot.open(Served.of(small_run.scenario).snapshot).gather(np.array([0]))
    rows = segment_rows(["n1"], vector, content_hashes=["h"], content_at=[datetime.now(UTC)], categories=["mugs"])
    append_segment(f"{small_run.root}/center/window", rows, encoder_version=service.model.encoder_version)
    service.embeddings.refresh()
    after = service.rank(request).items[0]
    assert (after.unknown_item, after.no_content) == (True, False)
    assert after.prob != before.prob
    assert service.embeddings.multi_get(["n1"])[2].to_pylist() == ["mugs"]


@pytest.mark.parametrize("error", [ArtifactError("a segment is damaged"), OSError("the disk is away")])
def test_without_the_embedding_store_all_is_scored_as_without_content_and_the_answer_says_so(
    client, service, monkeypatch, error
):
    candidates = [f"i{row}" for row in range(20)]
    body = {"user_id": "u1", "candidates": candidates}
    full = client.post("/v1/rank", json=body).json()
    assert full["degraded"] == []
    with monkeypatch.context() as broken:
        broken.setattr(service.embeddings, "multi_get", lambda _: (_ for _ in ()).throw(error))
        answer = client.post("/v1/rank", json=body).json()
    assert answer["degraded"] == ["content"]
    assert all(item["no_content"] for item in answer["items"])
    nothing = np.zeros((25, service.model.content_width), np.float32)
    expected = service.model.score(
        "u1", ["i1", "i2", "i3", "i4", "i5"], candidates, lambda ids: (nothing, np.zeros(25, bool), [None] * 25)
    )
    prob = {item["item_id"]: item["prob"] for item in answer["items"]}
    np.testing.assert_allclose([prob[item] for item in candidates], expected, atol=1e-7)
    assert prob != {item["item_id"]: item["prob"] for item in full["items"]}
    assert client.post("/v1/rank", json=body).json()["items"] == full["items"]
    assert client.get("/readyz").json()["degraded"] == service.degraded_answers == {"content": 1}


def test_a_score_that_is_no_number_is_never_answered(client, service, monkeypatch):
    monkeypatch.setattr(service.model, "predict", lambda *_: np.array([np.nan]))
    answer = client.post("/v1/rank", json={"user_id": "u1", "candidates": ["i1"]})
    assert answer.status_code == 500
    assert set(answer.json()) == {"error"}


@pytest.mark.parametrize("part", ["network", "tables"])
def test_a_model_with_one_weight_that_is_no_number_refuses_to_start(small_run, part):
    path = str(small_run.root / "ctr" / "sim-mim" / "seed-0" / f"{part}.safetensors")
    weights = {name: weight.clone() for name, weight in artifacts.read_tensors(path).items()}
    next(iter(weights.values())).view(-1)[-1] = float("nan")
    artifacts.write_tensors(path, weights)
    with pytest.raises(ArtifactError, match=rf"{part}\.safetensors holds weights that are no numbers"):
        RankingService.open(Served.of(small_run.scenario), small_run.scenario.serving)


def test_a_model_of_another_encoder_version_refuses_to_start_naming_both(small_run):
    path = small_run.root / "ctr" / "sim-mim" / "ctr.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"encoder_version": "csft-of-yesterday"}))
    for start in (
        lambda: bind_ranking(small_run.scenario),
        lambda: RankingService.open(Served.of(small_run.scenario), small_run.scenario.serving),
    ):
        with pytest.raises(VersionMismatchError) as caught:
            start()
        assert "csft-of-yesterday" in str(caught.value)
        assert info["encoder_version"] in str(caught.value)


def test_a_run_that_is_not_finished_is_a_sentence(small_run):
    serving = small_run.scenario.serving.model_copy(update={"variant": "din-mim"})
    with pytest.raises(ArtifactError, match=r"din-mim/ctr\.json is not there"):
        bind_ranking(small_run.scenario.model_copy(update={"serving": serving}))
    (small_run.root / "extraction" / "artifact.json").unlink()
    with pytest.raises(ArtifactError, match="nothing to serve"):
        bind_ranking(small_run.scenario)


def test_health_readiness_and_the_openapi_page_answer(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = client.get("/readyz").json()
    assert ready["num_items"] == 40
    assert ready["encoder_version"].startswith("csft-")
    assert client.get("/openapi.json").json()["components"]["schemas"]["RankRequest"]["examples"]


def test_reasons_are_the_networks_own_relevance_the_largest_first(client, service):
    body = {"user_id": "u1", "candidates": [f"i{row}" for row in range(20)], "top_k": 4}
    assert {item["reasons"] for item in client.post("/v1/rank", json=body).json()["items"]} == {None}
    items = client.post("/v1/rank", json=body | {"explain": True}).json()["items"]
    assert [item["item_id"] for item in items] == [
        item["item_id"] for item in client.post("/v1/rank", json=body).json()["items"]
    ]
    behaviors = ["i1", "i2", "i3", "i4", "i5"]
    asked = service.model.request("u1", behaviors, [item["item_id"] for item in items])
    found = service.rollout.current.rows.get(asked)
    by_id, by_content = service.model.relevance(found.batch, np.arange(4))
    for item, of_id, of_content in zip(items, by_id, by_content, strict=True):
        told = item["reasons"]
        for reason in told:
            place = behaviors.index(reason["item_id"])
            assert reason["id_relevance"] == pytest.approx(of_id[place], abs=1e-5)
            assert reason["content_relevance"] == pytest.approx(of_content[place], abs=1e-5)
        assert behaviors[np.abs(of_content).argmax()] in [reason["item_id"] for reason in told[:2]]
        assert 3 <= len(told) <= 5
    none = client.post("/v1/rank", json=body | {"explain": True, "behaviors": []}).json()["items"]
    assert [item["reasons"] for item in none] == [[], [], [], []]


@pytest.mark.parametrize(
    ("by_id", "by_content", "expected"),
    [
        ([0.1, -0.9, 0.2, 0.0], [0.5, 0.4, 0.3, 0.9], ["b", "d", "c", "a"]),
        (None, [0.0, 0.4, 0.0, -0.9], ["d", "b"]),
        ([0.0, 2.0, 1.0, 0.0], None, ["b", "c"]),
        (None, None, []),
    ],
)
def test_reasons_take_the_largest_of_either_kind_in_turn(by_id, by_content, expected):
    found = reasons(
        ["a", "b", "c", "d"],
        None if by_id is None else np.array(by_id),
        None if by_content is None else np.array(by_content),
    )
    assert [reason.item_id for reason in found] == expected
    assert all((reason.id_relevance is None) == (by_id is None) for reason in found)


def test_a_query_is_refused_by_a_model_that_was_trained_without(client):
    for query in ({"query_text": "red mug"}, {"query_image": "aGVsbG8="}):
        answer = client.post("/v1/rank", json={"user_id": "u1", "candidates": ["i1"], **query})
        assert answer.status_code == 422
        assert answer.json()["error"].startswith("sim-mim was trained without queries.")


@pytest.fixture
def with_queries(small_run):
    """A model that feeds the query, in the place of sim-mim; the encoder's QueryEncoder answers. Gives a function that says
    what was asked of it."""
    root, encoder = small_run.root, ItemEncoder.load(f"{small_run.root}/csft/encoder")
    info = json.loads((root / "ctr" / "sim-mim" / "ctr.json").read_text())
    config = NetworkConfig.from_json(info["network"] | {"query_width": encoder.width, "query_interest": True})
    torch.manual_seed(3)
    network = with_prefix("network", CtrNetwork(config).state_dict())
    artifacts.write_tensors(
        f"{root}/ctr/sim-mim/seed-0/network.safetensors", {name[8:]: w for name, w in network.items()}
    )
    queries = {"width": encoder.width, "encoder_version": encoder.encoder_version, "line": "unused"}
    (root / "ctr" / "sim-mim" / "ctr.json").write_text(
        json.dumps(info | {"network": config.to_json(), "queries": queries})
    )
    service = RankingService.open(Served.of(small_run.scenario), small_run.scenario.serving)
    of_queries, asked = QueryEncoder(encoder, small_run.scenario.data), []

    async def embed(image, title):
        asked.append((image, title))
        return of_queries.embed(image, title), encoder.encoder_version

    api = ranking_api(service, small_run.scenario.serving, embed=embed)
    yield TestClient(api, raise_server_exceptions=False), service, encoder, asked
    service.rollout.current.close()
    service.behaviors.stop()


def test_a_query_is_encoded_as_training_encoded_it(with_queries, picture):
    client, service, encoder, asked = with_queries
    candidates = [f"i{row}" for row in range(10)]
    body = {"user_id": "u1", "candidates": candidates}
    image = base64.b64encode(picture(3)).decode()
    answers = {}
    for name, query in {
        "none": {},
        "text": {"query_text": "striped  red thing"},
        "image": {"query_image": image},
        "both": {"query_image": image, "query_text": "blue"},
    }.items():
        answer = client.post("/v1/rank", json=body | query)
        assert answer.status_code == 200, answer.text
        answers[name] = {item["item_id"]: item["prob"] for item in answer.json()["items"]}
    assert answers["both"] == answers["image"] != answers["text"] != answers["none"] != answers["image"]
    assert len(asked) == 3
    pixels = decode_image(picture(3), encoder.picture, 10**7, 10**8)[None]
    vectors = {
        "none": np.zeros(encoder.width, np.float32),
        "text": encode_queries(encoder, ["striped red thing"], pixels, np.zeros(1, bool))[0],
        "image": encode_queries(encoder, [None], pixels, np.ones(1, bool))[0],
    }
    for name, vector in vectors.items():
        behaviors = service.behaviors.history("u1")[0]
        request = service.model.request("u1", behaviors, candidates, query_mm=vector)
        found = service.rollout.current.rows.get(request)
        expected = service.model.predict(found.batch)
        np.testing.assert_allclose([answers[name][item] for item in candidates], expected, atol=1e-6)


def test_a_query_that_is_not_read_in_time_is_left_out_and_the_answer_says_so(with_queries, monkeypatch):
    client, service, _, asked = with_queries
    body = {"user_id": "u1", "candidates": [f"i{row}" for row in range(10)]}

    def scores(answer):
        assert answer.status_code == 200, answer.text
        return {item["item_id"]: item["prob"] for item in answer.json()["items"]}

    without, full = (client.post("/v1/rank", json=body | query) for query in ({}, {"query_text": "striped red"}))
    assert without.json()["degraded"] == full.json()["degraded"] == []
    assert scores(full) != scores(without)

    async def away(image, title):
        raise UnavailableError("no encoder")

    async def slow(image, title):
        await asyncio.sleep(60)

    serving = Serving(query_deadline_ms=50)
    for embed in (away, slow):
        other = TestClient(ranking_api(service, serving, embed=embed), raise_server_exceptions=False)
        answer = other.post("/v1/rank", json=body | {"query_text": "striped red"})
        assert scores(answer) == scores(without)
        assert answer.json()["degraded"] == ["query"]
    monkeypatch.setattr(service.model, "query_encoder_version", "csft-of-yesterday")
    answer = client.post("/v1/rank", json=body | {"query_text": "striped red"})
    assert (answer.json()["degraded"], scores(answer)) == (["query"], scores(without))
    assert client.get("/readyz").json()["degraded"] == {"query": 3}
    del asked[:]
    many = {"user_id": "u1", "candidates": ["i1"] * 2_001, "query_text": "red"}
    assert client.post("/v1/rank", json=many).status_code == 422
    assert asked == [], "the encoder is not asked in vain"


def test_a_query_that_cannot_be_read_is_a_sentence(with_queries):
    client, _, _, _ = with_queries
    body = {"user_id": "u1", "candidates": ["i1"]}
    answer = client.post("/v1/rank", json=body | {"query_image": "aGVsbG8="})
    assert answer.status_code == 422
    assert "image" in answer.json()["error"]
    assert client.post("/v1/rank", json=body | {"query_text": "  "}).status_code == 422
    assert client.post("/v1/rank", json=body).status_code == 200
