import base64
import gc
import threading
import weakref
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from starlette.testclient import TestClient

from mim_ray.config.scenario import Serving
from mim_ray.data.transforms import content_hash, decode_image
from mim_ray.encoders.item_encoder import ItemEncoder, encode_batch
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import WindowTail, fold, segment_rows
from mim_ray.serving.decoding import TimeLeft
from mim_ray.serving.messages import NewItemsRequest
from mim_ray.serving.new_item_app import new_item_api
from mim_ray.serving.new_item_encoder import NewItemEncoder
from mim_ray.serving.pictures import Pictures


@pytest.fixture
def encoder(small_run):
    network = ItemEncoder.load(f"{small_run.root}/csft/encoder")
    return NewItemEncoder(network, f"{small_run.root}/center", small_run.scenario.data)


@pytest.fixture
def client(encoder, small_run):
    return TestClient(new_item_api(encoder, small_run.scenario.serving), raise_server_exceptions=False)


def stored(encoder, small_run) -> pa.Table:
    """All rows in the window."""
    segments = WindowTail(f"{small_run.root}/center/window", encoder.encoder_version).poll()
    return pa.concat_tables([rows for _, rows in segments]) if segments else None


def text_of(image: bytes) -> str:
    return base64.b64encode(image).decode()


def test_an_image_and_title_become_the_embedding_that_extraction_would_make(client, encoder, small_run, picture):
    image = picture(1, size=64)
    body = {"item_id": "n1", "title": "  red\tmug ", "image": text_of(image), "category": "mugs|gifts"}
    answer = client.post("/v1/items", json=body)
    assert answer.status_code == 200, answer.text
    (item,) = answer.json()["items"]
    assert item == {
        "item_id": "n1",
        "encoder_version": encoder.encoder_version,
        "content_hash": content_hash("red mug", image),
        "changed": True,
        "rankable": True,
    }
    rows = stored(encoder, small_run)
    assert rows["item_id"].to_pylist() == ["n1"]
    assert rows["category"].to_pylist() == ["mugs"]
    network = ItemEncoder.load(f"{small_run.root}/csft/encoder")
    pixels = decode_image(image, network.picture)
    expected = encode_batch(network, ["red mug"], pixels[None], np.array([True]))
    np.testing.assert_allclose(np.array(rows["embedding"].to_pylist()), expected, atol=1e-6)


def test_an_item_that_a_refresh_has_deleted_is_stored_when_it_comes_back(client, encoder, small_run):
    body = {"item_id": "i3", "title": "a thing that goes and comes"}
    assert client.post("/v1/items", json=body).json()["items"][0]["changed"]
    vectors = np.zeros((1, small_run.scenario.encoders.width), np.float32)
    gone = segment_rows(["i3"], vectors, content_hashes=[""], content_at=[datetime.now(UTC)], deleted=[True])
    EmbeddingTable(f"{small_run.root}/center/table").append(
        gone, encoder_version=encoder.encoder_version, shard_id="refresh"
    )
    assert client.post("/v1/items", json=body).json()["items"][0]["changed"]
    assert not client.post("/v1/items", json=body).json()["items"][0]["changed"]


def test_one_modality_is_enough(client, encoder, small_run, picture):
    batch = [{"item_id": "t", "title": "a mug"}, {"item_id": "p", "image": text_of(picture(2, "JPEG"))}]
    answer = client.post("/v1/items", json={"items": batch})
    assert [item["item_id"] for item in answer.json()["items"]] == ["t", "p"]
    vectors = np.array(stored(encoder, small_run)["embedding"].to_pylist())
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)


def test_the_same_content_again_stores_nothing(client, encoder, small_run):
    body = {"item_id": "n1", "title": "red mug"}
    assert client.post("/v1/items", json=body).json()["items"][0]["changed"]
    assert not client.post("/v1/items", json=body).json()["items"][0]["changed"]
    assert stored(encoder, small_run).num_rows == 1
    assert client.post("/v1/items", json=body | {"title": "blue mug"}).json()["items"][0]["changed"]
    assert client.post("/v1/items", json=body).json()["items"][0]["changed"], "back to the first content is a change"
    assert stored(encoder, small_run).num_rows == 3


def changed(client, **body) -> bool:
    answer = client.post("/v1/items", json={"item_id": "n1", "title": "red mug", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["items"][0]["changed"]


def test_another_category_of_the_same_content_is_stored_and_the_same_one_again_is_not(client, encoder, small_run):
    assert changed(client, category="mugs")
    assert not changed(client, category=" mugs |gifts"), "the first of several is the category"
    assert changed(client, category="cups")
    assert not changed(client, category="cups")
    assert not changed(client), "it names none"
    old = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    assert not changed(client, category="mugs", content_at=old), "older never replaces newer"
    rows = stored(encoder, small_run)
    assert rows["category"].to_pylist() == ["mugs", "cups"]
    first, second = rows["embedding"].to_pylist()
    np.testing.assert_allclose(first, second, atol=1e-6)
    network = ItemEncoder.load(f"{small_run.root}/csft/encoder")
    center = f"{small_run.root}/center"
    fold(f"{center}/window", EmbeddingTable(f"{center}/table"), keep_s=0)
    other = TestClient(new_item_api(NewItemEncoder(network, center, small_run.scenario.data), Serving()))
    assert not changed(other, category="cups"), "another replica reads it in the table"
    assert changed(other, category="mugs")


def test_an_item_that_only_the_snapshot_shows_changes_its_category_at_a_later_time_alone(client, encoder, small_run):
    table, line = EmbeddingTable(f"{small_run.root}/center/table"), f"{small_run.root}/center/snapshots"

    def forget() -> None:
        """What every snapshot does."""
        fold(f"{small_run.root}/center/window", table, keep_s=0)
        build_snapshot(table, encoder.encoder_version, f"{line}/{encoder.encoder_version}")
        encoder.take_newer_snapshot()

    at = datetime.now(UTC) - timedelta(hours=2)
    dated = {"category": "mugs", "content_at": at.isoformat()}
    assert changed(client, **dated)
    for _ in range(2):  # a feed that posts the same again and again
        forget()
        assert not changed(client, **dated)
        assert not changed(client, category="mugs")
    assert not changed(client, category="cups"), "whether that is another one nobody knows"
    later = {"category": "cups", "content_at": (at + timedelta(hours=1)).isoformat()}
    assert changed(client, **later)
    assert not changed(client, **later)
    forget()
    assert not changed(client, **later)


def test_an_id_that_comes_twice_is_refused_before_any_picture_is_fetched_or_decoded(client, encoder, picture):
    class NoPictures(Pictures):
        def get(self, item, place, left):
            raise AssertionError("a picture was looked at")

    encoder._pictures = NoPictures(encoder._encoder.picture, encoder._limits, Serving())
    twice = {"items": [{"item_id": "x", "image": text_of(picture(6))}, {"item_id": "x", "title": "u"}]}
    answer = client.post("/v1/items", json=twice)
    assert answer.status_code == 422
    assert "occurs twice" in answer.json()["error"]


def test_content_that_extraction_has_encoded_is_no_change(client, encoder, small_run):
    known = {"item_id": "i3", "title": "plain red thing 3"}
    assert not client.post("/v1/items", json=known).json()["items"][0]["changed"]
    assert stored(encoder, small_run) is None
    assert client.post("/v1/items", json=known | {"title": "another"}).json()["items"][0]["changed"]


def test_another_replica_and_a_restart_know_what_was_stored(encoder, small_run):
    network = ItemEncoder.load(f"{small_run.root}/csft/encoder")
    center, limits = f"{small_run.root}/center", small_run.scenario.data
    other = NewItemEncoder(network, center, limits)
    request = NewItemsRequest.model_validate({"item_id": "n1", "title": "red mug"})
    assert encoder.encode(request).items[0].changed
    assert not other.encode(request).items[0].changed
    fold(f"{center}/window", EmbeddingTable(f"{center}/table"), keep_s=0)
    assert stored(encoder, small_run) is None, "the segment is in the table now"
    assert not NewItemEncoder(network, center, limits).encode(request).items[0].changed


def test_older_content_never_replaces_newer(client, encoder, small_run):
    now = datetime.now(UTC)
    new = {"item_id": "n1", "title": "new", "content_at": now.isoformat()}
    old = {"item_id": "n1", "title": "old", "content_at": (now - timedelta(days=1)).isoformat()}
    assert client.post("/v1/items", json=new).json()["items"][0]["changed"]
    assert not client.post("/v1/items", json=old).json()["items"][0]["changed"]
    assert stored(encoder, small_run).num_rows == 1


def bad_items(picture) -> dict[str, tuple[dict, str]]:
    image = picture(3, size=64)
    bomb = picture(4, size=8)
    bomb = bomb[:16] + (60_000).to_bytes(4, "big") * 2 + bomb[24:]
    return {
        "neither": ({"item_id": "x"}, "neither an image nor a title"),
        "blank title": ({"item_id": "x", "title": " \n"}, "neither an image nor a title"),
        "empty image": ({"item_id": "x", "image": ""}, "neither an image nor a title"),
        "no image file": ({"item_id": "x", "image": text_of(b"BM, or so")}, "image format"),
        "text as image": ({"item_id": "x", "title": "t", "image": text_of(b"<svg/>")}, "image format"),
        "cut image": ({"item_id": "x", "image": text_of(image[:200])}, "image corrupt"),
        "too many pixels": ({"item_id": "x", "image": text_of(bomb)}, "image"),
        "too many bytes": ({"item_id": "x", "image": text_of(b"\x89PNG" + bytes(8_000_001))}, "image too large"),
        "future": ({"item_id": "x", "title": "t", "content_at": "2999-01-01T00:00:00Z"}, "lies in the future"),
        "blank id": ({"item_id": " ", "title": "t"}, "must not be blank"),
        "empty batch": ({"items": []}, "items"),
        "twice": ({"items": [{"item_id": "x", "title": "t"}, {"item_id": "x", "title": "u"}]}, "occurs twice"),
        "good and bad": ({"items": [{"item_id": "g", "title": "t"}, {"item_id": "x"}]}, "items[1] has neither"),
    }


def test_bad_items_get_a_4xx_with_a_sentence_and_store_nothing(client, encoder, small_run, picture):
    for name, (body, words) in bad_items(picture).items():
        answer = client.post("/v1/items", json=body)
        assert 400 <= answer.status_code < 500, (name, answer.text)
        assert words in answer.json()["error"], (name, answer.text)
        assert "Traceback" not in answer.text
    assert stored(encoder, small_run) is None


def test_health_readiness_and_the_openapi_page_answer(client, encoder):
    assert client.get("/v1/items/healthz").json() == {"status": "ok"}
    assert client.get("/v1/items/readyz").json()["encoder_version"] == encoder.encoder_version
    page = client.get("/v1/items/openapi.json").json()
    assert page["components"]["schemas"]["NewItemsRequest"]["examples"]


class OneUrl:
    """Stands for the network."""

    def __init__(self, url: str, answer: bytes) -> None:
        self._url, self._answer = url, answer

    def fetch(self, url: str, left: TimeLeft) -> bytes:
        assert url == self._url
        assert left.seconds > 0
        return self._answer


def test_an_image_by_url_is_the_same_as_its_bytes(client, encoder, small_run, picture):
    url, image = "https://cdn.example/a.png", picture(5)
    network, limits, serving = encoder._encoder, small_run.scenario.data, small_run.scenario.serving
    encoder._pictures = Pictures(network.picture, limits, serving, fetcher=OneUrl(url, image))
    assert client.post("/v1/items", json={"item_id": "n", "image_url": url}).json()["items"][0]["changed"]
    assert not client.post("/v1/items", json={"item_id": "n", "image": text_of(image)}).json()["items"][0]["changed"]
    encoder._pictures = Pictures(network.picture, limits, serving, fetcher=OneUrl(url, b"<html>"))
    answer = client.post("/v1/items", json={"item_id": "n", "image_url": url})
    assert answer.status_code == 422
    assert "image format" in answer.json()["error"]
    answer = client.post("/v1/items", json={"item_id": "n", "image_url": url, "image": text_of(image)})
    assert "both image and image_url" in answer.json()["error"]


def test_image_urls_are_off_by_default(client):
    answer = client.post("/v1/items", json={"item_id": "n", "title": "t", "image_url": "https://cdn.example/a.png"})
    assert answer.status_code == 422
    assert "switched off" in answer.json()["error"]


def test_where_parameter_machines_run_an_item_is_rankable_when_they_have_it(small_run):
    told: list[bool | Exception] = [True, False, ConnectionError("away")]

    def push(*_) -> bool:
        said = told.pop(0)
        if isinstance(said, Exception):
            raise said
        return said

    network = ItemEncoder.load(f"{small_run.root}/csft/encoder")
    encoder = NewItemEncoder(network, f"{small_run.root}/center", small_run.scenario.data, push=push)
    for number, rankable in enumerate((True, False, False)):
        request = NewItemsRequest(items=[{"item_id": f"n{number}", "title": "mug"}, {"item_id": "i3", "title": "mug"}])
        first, second = encoder.encode(request).items
        assert (first.changed, first.rankable) == (True, rankable)
        assert (second.changed, second.rankable) == (number == 0, True), "what was there before is there"
    assert not told


def test_what_came_since_the_newest_snapshot_alone_stays_in_memory(client, encoder, small_run):
    for number in range(5):
        client.post("/v1/items", json={"item_id": f"n{number}", "title": f"mug {number}"})
    assert len(encoder._known._newer) == 5
    table = EmbeddingTable(f"{small_run.root}/center/table")
    fold(f"{small_run.root}/center/window", table, keep_s=0)
    build_snapshot(table, encoder.encoder_version, f"{small_run.root}/center/snapshots/{encoder.encoder_version}")
    encoder.take_newer_snapshot()
    assert not client.post("/v1/items", json={"item_id": "n3", "title": "mug 3"}).json()["items"][0]["changed"]
    assert client.post("/v1/items", json={"item_id": "n5", "title": "mug 5"}).json()["items"][0]["changed"]
    assert set(encoder._known._newer) == {"n5"}


def test_a_thread_looks_for_a_newer_snapshot_as_long_as_somebody_holds_the_encoder(small_run, monkeypatch):
    monkeypatch.setattr("mim_ray.serving.new_item_encoder.NEWER_SNAPSHOT_EVERY_S", 0.01)
    looked = threading.Event()
    monkeypatch.setattr(NewItemEncoder, "take_newer_snapshot", lambda _: looked.set())
    network = ItemEncoder.load(f"{small_run.root}/csft/encoder")
    held = NewItemEncoder(network, f"{small_run.root}/center", small_run.scenario.data)
    assert looked.wait(60)
    gone = weakref.ref(held)
    del held
    gc.collect()
    assert gone() is None
