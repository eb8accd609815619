import asyncio
import base64
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime

import grpc
import numpy as np
import pytest
from ray.serve.exceptions import RayServeException
from starlette.testclient import TestClient

from mim_ray.config import load_scenario
from mim_ray.config.scenario import ParameterMachines
from mim_ray.data.transforms import decode_image
from mim_ray.encoders.item_encoder import ItemEncoder, encode_batch, encode_queries
from mim_ray.errors import RequestError, UnavailableError
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import append_segment, fold, segment_rows
from mim_ray.serving.loaded import Loaded
from mim_ray.serving.query_encoder import QueryEncoder
from mim_ray.serving.ranker import MAX_ONGOING_REQUESTS, RankingService
from mim_ray.serving.ranking_app import ranking_api
from mim_ray.serving.served import Served
from mim_ray.serving.similar import SimilarItems
from mim_ray.serving.similar_routes import MAX_EMBEDDING, encoder_app

WIDTH = load_scenario("tiny").encoders.width


@pytest.fixture
def service(small_run) -> Iterator[RankingService]:
    service = RankingService.open(Served.of(small_run.scenario), small_run.scenario.serving)
    service.embeddings.stop()  # the tests say when it looks
    yield service
    service.behaviors.stop()


@pytest.fixture
def similar(service) -> SimilarItems:
    return SimilarItems(lambda: service.rollout.current, exact_rows=1_000, recall=0.95)


@pytest.fixture
def client(small_run, service, similar):
    encoder = ItemEncoder.load(f"{small_run.root}/csft/encoder")
    queries = QueryEncoder(encoder, small_run.scenario.data)

    async def embed(image, title):
        return queries.embed(image, title), encoder.encoder_version

    api = ranking_api(service, small_run.scenario.serving, similar=similar, embed=embed)
    return TestClient(api, raise_server_exceptions=False)


def store_items(small_run, service, ids, vectors, **columns):
    rows = segment_rows(
        ids, vectors, content_hashes=["0" * 32] * len(ids), content_at=[datetime.now(UTC)] * len(ids), **columns
    )
    append_segment(f"{small_run.root}/center/window", rows, encoder_version=service.model.encoder_version)
    service.embeddings.refresh()


def vectors_of(small_run) -> dict[str, np.ndarray]:
    snapshot = Snapshot.open(Served.of(small_run.scenario).snapshot)
    return dict(zip(snapshot.ids.to_pylist(), snapshot.gather(np.arange(snapshot.num_rows)), strict=True))


def cosine(one, other) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_similar_items_are_those_of_highest_cosine_without_the_item_itself(client, similar, small_run):
    similar.refresh()
    answer = client.get("/v1/similar/i3?top_k=5")
    assert answer.status_code == 200, answer.text
    vectors = vectors_of(small_run)
    expected = sorted(
        ((cosine(vectors["i3"], other), name) for name, other in vectors.items() if name != "i3"), reverse=True
    )
    items = answer.json()["items"]
    assert [item["item_id"] for item in items] == [name for _, name in expected[:5]]
    np.testing.assert_allclose([item["similarity"] for item in items], [value for value, _ in expected[:5]], atol=1e-5)
    assert [item["category"] for item in items] == [("mugs", "socks")[int(item["item_id"][1:]) % 2] for item in items]
    assert answer.json()["encoder_version"] == similar._searched.lookup.encoder_version


def test_a_category_narrows_the_answer(client, similar):
    similar.refresh()
    items = client.get("/v1/similar/i3?top_k=40&category=mugs").json()["items"]
    assert {item["item_id"] for item in items} == {f"i{row}" for row in range(0, 40, 2)}
    assert client.get("/v1/similar/i3?category=hats").json()["items"] == []


def test_new_items_are_found_replaced_ones_move_and_deleted_ones_go(client, service, similar, small_run):
    similar.refresh()
    vectors = vectors_of(small_run)
    store_items(small_run, service, ["new", "i5"], np.stack([vectors["i3"], -vectors["i3"]]), categories=["hats", None])
    items = client.get("/v1/similar/i3?top_k=100").json()["items"]
    assert items[0] == {"item_id": "new", "similarity": pytest.approx(1, abs=1e-5), "category": "hats"}
    assert items[-1] == {"item_id": "i5", "similarity": pytest.approx(-1, abs=1e-5), "category": "socks"}
    assert len(items) == len({item["item_id"] for item in items}) == 40
    assert [item["item_id"] for item in client.get("/v1/similar/i3?category=hats").json()["items"]] == ["new"]
    near_new = client.get("/v1/similar/new?top_k=1").json()["items"]
    assert [item["item_id"] for item in near_new] == ["i3"]
    nothing = np.zeros((2, WIDTH), np.float32)
    store_items(small_run, service, ["new", "i7"], nothing, deleted=[True, True])
    left = {item["item_id"] for item in client.get("/v1/similar/i3?top_k=100").json()["items"]}
    assert left == set(vectors) - {"i3", "i7"}
    store_items(small_run, service, ["i7"], vectors["i3"][None])
    assert client.get("/v1/similar/i3").json()["items"][0]["item_id"] == "i7", "posted again"


def test_an_unknown_item_and_one_without_content_get_a_sentence(client, service, similar, small_run):
    similar.refresh()
    unknown = client.get("/v1/similar/nobody")
    assert (unknown.status_code, "no item with this id" in unknown.json()["error"]) == (404, True)
    store_items(small_run, service, ["i9"], np.zeros((1, WIDTH), np.float32), deleted=[True])
    without = client.get("/v1/similar/i9")
    assert (without.status_code, "has no embedding" in without.json()["error"]) == (409, True)
    for path in ("i3?top_k=0", "i3?top_k=1001", "i3?top_k=x", "x" * 300):
        assert client.get(f"/v1/similar/{path}").status_code == 422, path


def test_while_the_index_is_built_answers_say_when_to_come_back(client, similar):
    for answer in (client.get("/v1/similar/i3"), client.post("/v1/search/image", json={"title": "mug"})):
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert "being built" in answer.json()["error"]
    with pytest.raises(UnavailableError):
        similar.of_item("i3", 1)


def test_an_item_that_was_posted_a_moment_ago_is_looked_for(client, service, similar, small_run):
    similar.refresh()
    rows = segment_rows(
        ["just-posted"],
        vectors_of(small_run)["i3"][None],
        content_hashes=["0" * 32],
        content_at=[datetime.now(UTC)],
    )
    append_segment(f"{small_run.root}/center/window", rows, encoder_version=service.model.encoder_version)
    assert client.get("/v1/similar/just-posted?top_k=1").json()["items"][0]["item_id"] == "i3"


def test_the_thread_builds_and_follows_a_switch_of_releases(service, small_run, monkeypatch):
    monkeypatch.setattr("mim_ray.serving.similar._LOOK_EVERY_S", 0.02)
    now = [service.rollout.current]
    similar = SimilarItems(lambda: now[0], exact_rows=1_000, recall=0.95)
    similar.start()
    try:
        wait_until(lambda: similar.recall() == 1.0)
        table = EmbeddingTable(f"{small_run.root}/center/table")
        near = vectors_of(small_run)["i3"][None]
        rows = segment_rows(["later"], near, content_hashes=["1" * 32], content_at=[datetime.now(UTC)])
        table.append(rows, encoder_version=service.model.encoder_version, shard_id="s1")
        build_snapshot(table, service.model.encoder_version, now[0].served.snapshot)
        now[0] = Loaded.open(Served.of(small_run.scenario), ParameterMachines())
        wait_until(lambda: similar._searched.loaded is now[0])
        assert similar._searched.nearest.snapshot.num_rows == 41
        assert similar.of_item("i3", 1).items[0].item_id == "later"
    finally:
        similar.stop()
        now[0].close()


def test_items_that_come_while_the_next_index_is_built_are_found(service, similar, small_run, monkeypatch, caplog):
    similar.refresh()
    monkeypatch.setattr("mim_ray.serving.similar.LOOK_AGAIN_S", 0.0)
    service.rollout.current.close()  # another release serves: nobody follows the window for this one any more
    near = vectors_of(small_run)["i3"][None]

    def post(name: str) -> None:
        rows = segment_rows([name], near, content_hashes=["0" * 32], content_at=[datetime.now(UTC)])
        append_segment(f"{small_run.root}/center/window", rows, encoder_version=service.model.encoder_version)

    post("posted")
    assert similar.of_item("i3", 1).items[0].item_id == "posted"
    post("unseen")
    with monkeypatch.context() as broken:
        broken.setattr("mim_ray.representation_center.lookup.WindowTail.poll", away)
        assert similar.of_item("i3", 1).items[0].item_id == "posted", "storage is away: what is known is searched"
        with pytest.raises(RequestError, match="no item with this id"):
            similar.of_item("unseen", 1)
    assert "away" in caplog.text
    assert similar.of_item("unseen", 40).items[0].similarity == pytest.approx(1, abs=1e-5)


def test_those_who_ask_for_unknown_items_at_once_share_one_look_at_storage(service, similar, monkeypatch):
    similar.refresh()
    lookup, looks = service.embeddings.lookup, []
    refresh = lookup.refresh

    def slow(**options):
        looks.append(options)
        time.sleep(0.05)
        return refresh(**options)

    monkeypatch.setattr(lookup, "refresh", slow)
    wait_until(lambda: lookup.behind_s > 0.2)
    monkeypatch.setattr("mim_ray.serving.similar.LOOK_AGAIN_S", 0.2)

    def ask(number: int) -> None:
        with pytest.raises(RequestError):
            similar.of_item(f"nobody-{number}", 1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert len(looks) < 8


def test_an_item_that_is_replaced_while_it_is_searched_is_in_the_answer_once(service, similar, small_run, monkeypatch):
    similar.refresh()
    vectors, nearest = vectors_of(small_run), similar._searched.nearest
    search, replaced = nearest.search, []

    def slow(*asked, **options):
        if not replaced:
            replaced.append("i5")
            store_items(small_run, service, ["i5"], vectors["i3"][None])
            similar._searched.newer.refresh()  # as another request does
        return search(*asked, **options)

    monkeypatch.setattr(nearest, "search", slow)
    found = [one.item_id for one in similar.of_item("i3", 100).items]
    assert sorted(found) == sorted(set(vectors) - {"i3"})


def away(*_, **__):
    raise OSError("away")


def test_a_newer_snapshot_is_indexed_when_enough_came_and_until_then_new_items_are_found(
    service, similar, small_run, monkeypatch
):
    monkeypatch.setattr("mim_ray.serving.similar.LOOK_AGAIN_S", 0.0)
    monkeypatch.setattr("mim_ray.serving.similar.FEW_NEWER", 2)
    similar.refresh()
    first = similar._searched
    near, table = vectors_of(small_run)["i3"], EmbeddingTable(f"{small_run.root}/center/table")
    line = first.lookup.snapshot.line
    for number in range(2):
        store_items(small_run, service, [f"new-{number}"], (near + number)[None], categories=["hats"])
        fold(f"{small_run.root}/center/window", table)
        build_snapshot(table, first.lookup.encoder_version, line)
        assert service.embeddings.take_newer()
        found = similar.of_item("i3", 40, category="hats").items
        assert [one.item_id for one in found] == [f"new-{one}" for one in range(number + 1)]
        similar.refresh()
        assert (similar._searched is first) == (number == 0)
    assert similar._searched.nearest.snapshot.num_rows == 42
    found = similar.of_item("i3", 40, category="hats").items
    assert [(one.item_id, one.category) for one in found] == [("new-0", "hats"), ("new-1", "hats")]


def test_where_parameter_machines_hold_the_rows_it_reads_the_snapshot_and_the_window_itself(service, small_run):
    elsewhere = replace(service.rollout.current, rows=None)
    similar = SimilarItems(lambda: elsewhere, exact_rows=1_000, recall=0.95)
    similar.refresh()
    try:
        vectors = vectors_of(small_run)
        rows = segment_rows(["new"], vectors["i3"][None], content_hashes=["1" * 32], content_at=[datetime.now(UTC)])
        append_segment(f"{small_run.root}/center/window", rows, encoder_version=service.model.encoder_version)
        wait_until(lambda: similar.of_item("i3", 1).items[0].item_id == "new")
    finally:
        similar.stop()


def wait_until(done) -> None:
    for _ in range(1_000):
        if done():
            return
        time.sleep(0.02)
    pytest.fail("it did not happen within 20 s")


def test_a_picture_is_searched_as_c_sft_trains_it_and_with_a_title_as_an_item(client, similar, small_run, picture):
    similar.refresh()
    encoder = ItemEncoder.load(f"{small_run.root}/csft/encoder")
    pixels = decode_image(picture(3), encoder.picture)[None]
    image = base64.b64encode(picture(3)).decode()
    vectors = vectors_of(small_run)
    for body, query in (
        ({"image": image}, encode_queries(encoder, [None], pixels, np.array([True]))[0]),
        ({"title": "red mug"}, encode_queries(encoder, ["red mug"], pixels, np.array([False]))[0]),
        ({"title": "red mug", "image": image}, encode_batch(encoder, ["red mug"], pixels, np.array([True]))[0]),
    ):
        answer = client.post("/v1/search/image", json=body | {"top_k": 3})
        assert answer.status_code == 200, answer.text
        expected = sorted((cosine(query, vector) for vector in vectors.values()), reverse=True)[:3]
        np.testing.assert_allclose([item["similarity"] for item in answer.json()["items"]], expected, atol=1e-4)
    only = client.post("/v1/search/image", json={"image": image, "category": "mugs", "top_k": 40}).json()["items"]
    assert {item["category"] for item in only} == {"mugs"}


def test_bad_searches_get_a_sentence(client, similar):
    similar.refresh()
    for body in (
        {},
        {"title": " "},
        {"image": ""},
        {"image": "aGVsbG8="},
        {"image": "%"},
        {"title": "a", "top_k": 0},
        {"x": 1},
    ):
        answer = client.post("/v1/search/image", json=body)
        assert (answer.status_code, set(answer.json())) == (422, {"error"}), (body, answer.text)


@pytest.mark.parametrize("gone", [UnavailableError("The new-item encoder does not answer."), None])
def test_without_the_encoder_a_search_is_answered_later_and_rankings_go_on(small_run, service, similar, gone):
    similar.refresh()

    async def embed(image, title):
        if gone is not None:
            raise gone
        return np.ones(WIDTH, np.float32), "csft-of-another-release"

    client = TestClient(
        ranking_api(service, small_run.scenario.serving, similar=similar, embed=embed), raise_server_exceptions=False
    )
    answer = client.post("/v1/search/image", json={"title": "mug"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert client.post("/v1/rank", json={"user_id": "u1", "candidates": ["i1"]}).status_code == 200


class Handle:
    """In the place of Serve's: `embed_query` does as it is told."""

    def __init__(self, work):
        self.embed_query = self
        self._work = work

    def remote(self, image, title):
        return self._work(image, title)


@pytest.mark.parametrize("problem", [grpc.RpcError("RESOURCE_EXHAUSTED"), RayServeException("gone"), TimeoutError()])
def test_whatever_is_wrong_with_the_encoder_app_it_is_told_as_away(monkeypatch, problem):
    async def work(image, title):
        raise problem

    monkeypatch.setattr("mim_ray.serving.similar_routes.serve.get_app_handle", lambda name: Handle(work))
    with pytest.raises(UnavailableError, match="does not answer"):
        asyncio.run(encoder_app()(b"picture", None))


def test_queries_that_wait_for_a_hanging_encoder_leave_places_to_others(monkeypatch):
    async def hang(image, title):
        await asyncio.sleep(60)

    monkeypatch.setattr("mim_ray.serving.similar_routes.serve.get_app_handle", lambda name: Handle(hang))

    async def ask() -> list[BaseException]:
        embed = encoder_app(deadline_s=0.3)
        first = asyncio.gather(*(embed(None, "mug") for _ in range(MAX_EMBEDDING)), return_exceptions=True)
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="many queries"):
            await embed(None, "one too many")
        found = await first
        with pytest.raises(UnavailableError, match="does not answer"):  # its turn has come
            await embed(None, "mug")
        return found

    assert [type(error) for error in asyncio.run(ask())] == [UnavailableError] * MAX_EMBEDDING
    assert MAX_EMBEDDING < MAX_ONGOING_REQUESTS


def test_switched_off_or_without_faiss_both_routes_say_so(small_run, service, similar, monkeypatch):
    async def embed(image, title):
        return np.ones(WIDTH, np.float32), service.model.encoder_version

    monkeypatch.setitem(sys.modules, "faiss", None)
    similar.start()
    similar.stop()
    for given, status, sentence in ((None, 404, "similar_items=true"), (similar, 501, "pip install")):
        client = TestClient(
            ranking_api(service, small_run.scenario.serving, similar=given, embed=embed), raise_server_exceptions=False
        )
        for answer in (client.get("/v1/similar/i3"), client.post("/v1/search/image", json={"title": "mug"})):
            assert (answer.status_code, sentence in answer.json()["error"]) == (status, True), answer.text
