"""Does the run serve? Start both apps, post an item that nobody has seen, and rank it for a user, over real HTTP."""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from mim_ray import artifacts
from mim_ray.config import Scenario
from mim_ray.data.batches import ordered_batches
from mim_ray.data.catalogue import Catalogue
from mim_ray.data.synthetic import ShopModel, make_items
from mim_ray.errors import TrainingError
from mim_ray.pipeline.graph import snapshot_uri
from mim_ray.pipeline.layout import Layout
from mim_ray.pipeline.stages import with_settings
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.updates import append_segment, segment_rows
from mim_ray.runtime.progress import Progress
from mim_ray.runtime.summary import StageResult
from mim_ray.serving import local
from mim_ray.serving.served import Served

NUM_CANDIDATES = 200
NUM_REQUESTS = 50
PATIENCE_S = 30.0


@dataclass(frozen=True)
class UnseenItem:
    """What is posted: an item that is in no table."""

    item_id: str
    title: str | None
    image: bytes | None
    category: str | None


def run(scenario: Scenario, layout: Layout) -> StageResult:
    """Measure the time from posting an unseen item to a ranking that knows its content, and the latency of rankings.

    The item is removed again afterwards when the data are the user's own.
    """
    scenario = with_settings(scenario, "serving", port=0)
    item = unseen_item(scenario, layout)
    user, behaviors, candidates = a_user(scenario, layout)
    base = local.start(scenario, Served.of_run(scenario))
    try:
        before = _rank(base, user, [*candidates, item.item_id])
        start = time.monotonic()
        posted = _call(f"{base}/v1/items", as_message(item))
        after, waited = before, 0.0
        while _of(after, item.item_id)["no_content"] and waited < PATIENCE_S:
            after = _rank(base, user, [*candidates, item.item_id])
            waited = time.monotonic() - start
        latencies = _latencies(base, user, candidates)
    finally:
        local.stop()
        if scenario.data.root is not None:
            _forget(layout, item.item_id)
    rank_ok = (
        _of(before, item.item_id)["no_content"]
        and not _of(after, item.item_id)["no_content"]
        and len(after["items"]) == len(candidates) + 1
        and all(0.0 <= ranked["prob"] <= 1.0 for ranked in after["items"])
    )
    if not rank_ok:
        raise TrainingError(
            f"{item.item_id} was posted, but {waited:.0f} s later the ranking still has no content for it."
        )
    place = 1 + next(n for n, ranked in enumerate(after["items"]) if ranked["item_id"] == item.item_id)
    p50, p99 = (float(np.percentile(latencies, q)) for q in (50, 99))
    metrics = {
        "rank_ok": rank_ok,
        "new_item_rankable_s": round(waited, 3),
        "encoder_version": posted["items"][0]["encoder_version"],
        "rank_p50_ms": round(1_000 * p50, 1),
        "rank_p99_ms": round(1_000 * p99, 1),
        "num_candidates": len(candidates),
        "num_behaviors": len(behaviors),
    }
    rows = [
        (
            "never-seen item",
            f"posted, rankable after {waited:.2f} s, ranked {place} of {len(candidates) + 1} for a user",
        ),
        (
            "ranking over HTTP",
            f"{len(candidates)} candidates: {1_000 * p50:.0f} ms in the median, {1_000 * p99:.0f} ms p99",
        ),
    ]
    return StageResult(metrics=metrics, rows=rows)


def unseen_item(scenario: Scenario, layout: Layout) -> UnseenItem:
    """The synthetic shop's next item; for the user's data the newest item's content under an id of its own."""
    item_id = f"unseen-{time.time_ns():x}"
    if scenario.data.root is None:
        number = scenario.synthetic.num_items
        settings = scenario.synthetic.model_copy(update={"missing_image_ratio": 0.0, "missing_title_ratio": 0.0})
        row = make_items(ShopModel(scenario.run.seed, settings), number, number + 1).to_pylist()[0]
    else:
        catalogue = Catalogue.open(f"{layout.samples}/catalogue")
        row = catalogue.take(np.argsort(catalogue.created_at, kind="stable")[-1:]).to_pylist()[0]
    return UnseenItem(item_id, row["title"], row["image"], row["category"])


def a_user(scenario: Scenario, layout: Layout) -> tuple[str, list[str], list[str]]:
    """The test row with the longest history: user, behaviors; and candidates that have embeddings."""
    table = next(iter(ordered_batches(f"{layout.samples}/impressions/test", ["user_id", "behaviors"], 2_048)))
    history = table["behaviors"].to_pylist()
    place = max(range(len(history)), key=lambda index: len(history[index]))
    uri = snapshot_uri(layout, "mim")
    assert uri is not None
    ids = Snapshot.open(uri).ids
    chosen = np.random.default_rng(scenario.run.seed).permutation(len(ids))[:NUM_CANDIDATES]
    return table["user_id"][place].as_py(), history[place], [ids[int(index)].as_py() for index in chosen]


def as_message(item: UnseenItem) -> dict[str, Any]:
    """The body of POST /v1/items."""
    image = None if item.image is None else base64.b64encode(item.image).decode()
    return {"item_id": item.item_id, "title": item.title, "image": image, "category": item.category}


def _rank(base: str, user: str, candidates: list[str]) -> dict[str, Any]:
    return _call(f"{base}/v1/rank", {"user_id": user, "candidates": candidates})


def _of(answer: dict[str, Any], item_id: str) -> dict[str, Any]:
    return next(ranked for ranked in answer["items"] if ranked["item_id"] == item_id)


def _latencies(base: str, user: str, candidates: list[str]) -> list[float]:
    seconds = []
    with Progress("rank over HTTP", NUM_REQUESTS, "requests") as progress:
        for _ in range(NUM_REQUESTS):
            start = time.perf_counter()
            _rank(base, user, candidates)
            seconds.append(time.perf_counter() - start)
            progress.add(1)
    return seconds


def _call(url: str, message: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(message).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        raise TrainingError(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:500]}") from None


def _forget(layout: Layout, item_id: str) -> None:
    """A deletion as a window message: the next fold takes the item out of the table's current rows."""
    version = artifacts.read_manifest(layout.stage("extraction"))
    assert version is not None
    encoder_version = str(version.metrics["encoder_version"])
    width = Snapshot.open(str(version.metrics["snapshot"])).width
    rows = segment_rows(
        [item_id], np.zeros((1, width), np.float32), content_hashes=[""], content_at=[datetime.now(UTC)], deleted=[True]
    )
    append_segment(f"{layout.center}/window", rows, encoder_version=encoder_version)
