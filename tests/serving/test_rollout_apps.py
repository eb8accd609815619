"""Both apps on a real Ray Serve while another encoder version is promoted: ranking never fails, and nothing is encoded wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import requests

from mim_ray import artifacts
from mim_ray.config import load_scenario
from mim_ray.encoders.item_encoder import ItemEncoder, encode_batch
from mim_ray.encoders.tokenizer import train_tokenizer
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.release import promote
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import segment_rows
from mim_ray.serving import local

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
IDS = [f"i{row}" for row in range(40)]


@pytest.fixture
def url(ray_cluster: None, small_run: Any) -> Iterator[str]:
    serving = small_run.scenario.serving.model_copy(update={"follow_release_s": 0.5})
    yield local.start(small_run.scenario.model_copy(update={"serving": serving}))
    local.stop()


def release_of_another_encoder(root: Path) -> tuple[str, dict[str, str]]:
    """A new encoder, the embeddings of all items by it, and a model for them; what `promote` takes."""
    titles = [f"thing {row}" for row in range(40)]
    encoder = ItemEncoder.build(load_scenario("tiny").encoders, train_tokenizer(titles, 200), seed=7)
    version = encoder.save(str(root / "new-encoder"), stage="csft")
    pictures = np.zeros((40, 3, encoder.image_size, encoder.image_size), np.uint8)
    vectors = encode_batch(encoder, titles, pictures, np.zeros(40, bool))
    table = EmbeddingTable(f"{root}/center/table")
    start = [datetime(2026, 1, 1, tzinfo=UTC)] * 40
    rows: pa.Table = segment_rows(IDS, vectors, content_hashes=["0" * 32] * 40, content_at=start)
    table.append(rows, encoder_version=version, shard_id="s-new")
    snapshot = build_snapshot(table, version, f"{root}/center/snapshots/{version}")
    for name in artifacts.list_files(f"{root}/ctr/sim-mim"):
        artifacts.write_bytes(name.replace("/ctr/sim-mim", "/ctr/new-mim"), artifacts.read_bytes(name))
    info = artifacts.read_json(f"{root}/ctr/new-mim/ctr.json")
    artifacts.write_json(f"{root}/ctr/new-mim/ctr.json", info | {"encoder_version": version})
    encoder_uri, ctr = str(root / "new-encoder"), f"{root}/ctr/new-mim"
    return version, {"encoder_version": version, "snapshot": snapshot.uri, "ctr_model": ctr, "encoder": encoder_uri}


def test_an_encoder_version_is_rolled_out_to_both_apps_under_constant_calls(url: str, small_run: Any) -> None:
    version, promoted = release_of_another_encoder(small_run.root)
    ranked: list[tuple[int, str | None]] = []
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set():
            answer = requests.post(f"{url}/v1/rank", json={"user_id": "u1", "candidates": IDS}, timeout=20)
            ranked.append((answer.status_code, answer.json().get("encoder_version")))

    thread = threading.Thread(target=call)
    thread.start()
    posted: list[tuple[int, str | None]] = []
    try:
        before = requests.post(f"{url}/v1/items", json={"item_id": "n0", "title": "red mug"}, timeout=20).json()
        old = before["items"][0]["encoder_version"]
        promote(f"{small_run.root}/center", **promoted)
        start = time.monotonic()
        while not posted or posted[-1] != (200, version):
            body = {"item_id": f"n{len(posted) + 1}", "title": f"red mug {len(posted)}"}
            answer = requests.post(f"{url}/v1/items", json=body, timeout=20)
            made = answer.json()["items"][0]["encoder_version"] if answer.status_code == 200 else None
            posted.append((answer.status_code, made))
            assert time.monotonic() - start < 90, (posted[-3:], ray.available_resources())
            time.sleep(0.1)
        while ranked[-1] != (200, version):
            assert time.monotonic() - start < 90, ranked[-3:]
            time.sleep(0.1)
    finally:
        stop.set()
        thread.join()
    assert {status for status, _ in ranked} == {200}, "no ranking fails"
    versions = [made for _, made in ranked]
    assert versions == sorted(versions, key=lambda made: made == version), "old, then new"
    assert set(posted) <= {(200, old), (503, None), (200, version)}, "either one, or none while the new one is opened"
    late = [place for place, one in enumerate(posted) if one == (200, old)]
    assert len(late) <= 0.1 * len(posted) + 10, "the old encoder stops when it sees the release"
    assert old != version
