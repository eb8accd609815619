"""POST /v1/items, RIM (paper Section 3.5): new items are encoded as they come, made durable, and rankable at once.

An item is acknowledged when its window segment is safely stored; rankers follow the window, and a thread folds it
into the Delta table every `serving.window_s`. `NewItemEncoder` is plain Python, `new_item_api` puts HTTP around it,
`bind_new_item_encoder` makes it a Ray Serve application.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from mim_ray import artifacts
from mim_ray.config import Scenario
from mim_ray.config.scenario import Data, ParameterMachines, Serving
from mim_ray.data.transforms import clean_title, content_hash
from mim_ray.encoders.item_encoder import ItemEncoder, encode_batch, load_for_tables
from mim_ray.errors import ArtifactError, RequestError
from mim_ray.representation_center.known_content import KnownContent
from mim_ray.representation_center.new_items import Push, store_new_items
from mim_ray.representation_center.parameter_client import ParameterClient
from mim_ray.representation_center.release import check_versions
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import segment_rows
from mim_ray.serving.encoder_rollout import CurrentEncoder, OpenEncoder
from mim_ray.serving.fetch import check_prefixes
from mim_ray.serving.limits import FULL_QUEUE, check_exposure, guarded
from mim_ray.serving.messages import EncodedItem, Health, NewItem, NewItemsRequest, NewItemsResponse, Problem, Ready
from mim_ray.serving.metrics import Metrics, Versions, counted
from mim_ray.serving.metrics_hub import Reporter, add_metrics_routes
from mim_ray.serving.pictures import Pictures, TimeLimits
from mim_ray.serving.query_encoder import QueryEncoder
from mim_ray.serving.release_check import ReleaseCheck
from mim_ray.serving.rollout import Rollout, open_first
from mim_ray.serving.served import Served
from mim_ray.serving.window_folding import WindowFolding

APP = "new_item_encoder"
MAX_CLOCK_SKEW = timedelta(minutes=5)
MAX_ONGOING_REQUESTS = 8  # in one replica; more wait in the queue


@dataclass(frozen=True)
class _Content:
    """One item, checked and decoded."""

    item_id: str
    title: str | None
    pixels: np.ndarray | None  # (3, S, S) uint8
    category: str | None  # the first of several
    content_hash: str
    content_at: datetime

    def replaces(self, known_at: int, known_hash: str | None) -> bool:
        """Whether this is other content than the known, and not older (microseconds)."""
        return self.content_hash != known_hash and _microseconds(self.content_at) >= known_at


class NewItemEncoder:
    """Encodes items and stores them in the window.

    Attributes:
        check_release: raises where this encoder is not the release's; ReleaseCheck, where releases are followed.

    Args:
        encoder: makes the embeddings; its version must be that of the embeddings being served.
        center: URI with the table and the window.
        limits: what pictures and titles are taken.
        push: sends what was stored to the parameter machines; without it they find it in the window.
        serving: time limits, and where image URLs may lead. Default: the default settings.
    """

    def __init__(
        self,
        encoder: ItemEncoder,
        center: str,
        limits: Data,
        *,
        push: Push | None = None,
        serving: Serving | None = None,
    ) -> None:
        if encoder.encoder_version is None:
            raise ArtifactError("The encoder has no version: save it, and load it from there.")
        self.encoder_version = encoder.encoder_version
        self._encoder = encoder
        self._window = f"{center}/window"
        self._limits = limits
        self._push = push
        self.check_release: Callable[[], None] = lambda: None
        self._pictures = Pictures(encoder.picture, limits, serving or Serving())
        self._known = KnownContent(
            EmbeddingTable(f"{center}/table"),
            self._window,
            self.encoder_version,
            line=f"{center}/snapshots/{self.encoder_version}",
        )
        self._lock = threading.Lock()  # one request at a time looks up, encodes and stores

    def encode(self, request: NewItemsRequest) -> NewItemsResponse:
        """Encode and store what is new among the items; all of them or, where one is bad, none.

        Raises:
            RequestError: a picture that cannot be used, an item without content, an id twice, a time in the future.
            VersionMismatchError: this encoder is not the release's.
        """
        self.check_release()
        now = datetime.now(UTC)
        left = self._pictures.time_limits()
        contents = [self._check(item, place, now, left) for place, item in enumerate(request.items)]
        ids = [content.item_id for content in contents]
        if len(set(ids)) < len(ids):
            raise RequestError("An item_id occurs twice in this request. Send each item once.", 422)
        with self._lock:
            self._known.refresh()
            known = self._known.current(ids)
            new = [content for content, old in zip(contents, known, strict=True) if content.replaces(*old)]
            if new:
                self._store(new)
        changed = {content.item_id for content in new}
        return NewItemsResponse(
            items=[
                EncodedItem(
                    item_id=content.item_id,
                    encoder_version=self.encoder_version,
                    content_hash=content.content_hash,
                    changed=content.item_id in changed,
                    rankable=True,
                )
                for content in contents
            ]
        )

    def _check(self, item: NewItem, place: int, now: datetime, left: TimeLimits) -> _Content:
        title = clean_title(item.title, self._limits.max_title_chars)
        if title is None and not item.image and not item.image_url:
            raise RequestError(f"items[{place}] has neither an image nor a title. Send at least one of them.", 422)
        content_at = now if item.content_at is None else item.content_at
        if content_at > now + MAX_CLOCK_SKEW:
            text = "lies in the future, so that later content could never replace it. Send the time of the change."
            raise RequestError(f"items[{place}].content_at {text}", 422)
        image, pixels = self._pictures.get(item, place, left)
        category = (item.category or "").partition("|")[0].strip() or None
        return _Content(item.item_id, title, pixels, category, content_hash(title, image), content_at)

    def _store(self, contents: Sequence[_Content]) -> None:
        """One segment: durable when this returns."""
        size = self._encoder.image_size
        images = np.zeros((len(contents), 3, size, size), np.uint8)
        has_image = np.array([content.pixels is not None for content in contents])
        for row, content in enumerate(contents):
            if content.pixels is not None:
                images[row] = content.pixels
        vectors = encode_batch(self._encoder, [content.title for content in contents], images, has_image)  # (n, D)
        if not np.isfinite(vectors).all():
            raise FloatingPointError(f"{self.encoder_version} gave an embedding that is no number")
        rows = segment_rows(
            [content.item_id for content in contents],
            vectors,
            content_hashes=[content.content_hash for content in contents],
            content_at=[content.content_at for content in contents],
            categories=[content.category for content in contents],
        )
        store_new_items(self._window, rows, encoder_version=self.encoder_version, push=self._push)
        self._known.add(rows)


def new_item_api(encoder: NewItemEncoder | CurrentEncoder, serving: Serving, metrics: Metrics | None = None) -> ASGIApp:
    """The HTTP face of an encoder, with its limits. All paths begin with /v1/items, so that another app may have the rest."""
    metrics = Metrics(APP, lambda: Versions(None, encoder.encoder_version)) if metrics is None else metrics
    app = FastAPI(
        title="mim_ray new items",
        summary="New items become rankable.",
        docs_url="/v1/items/docs",
        redoc_url=None,
        openapi_url="/v1/items/openapi.json",
    )
    problems: dict[int | str, dict[str, Any]] = {status: {"model": Problem} for status in (400, 413, 422, 503)}

    @app.post("/v1/items", responses=problems)
    def items(request: NewItemsRequest) -> NewItemsResponse:
        """Encode one item, or a batch under `items`. Answers when they are durable; the same content again is a no-op."""
        metrics.parsed("/v1/items")
        answer = encoder.encode(request)
        changed = sum(item.changed for item in answer.items)
        metrics.encoded(changed=changed, unchanged=len(answer.items) - changed)
        return answer

    @app.get("/v1/items/healthz")
    async def healthz() -> Health:
        """The process answers."""
        return Health()

    @app.get("/v1/items/readyz", responses={503: {"model": Problem}})
    def readyz() -> Ready:
        """The encoder is loaded, and which; it is the release's."""
        encoder.check_release()
        return Ready(status="ready", encoder_version=encoder.encoder_version)

    add_metrics_routes(app, metrics, path="/v1/items/metrics")
    return counted(guarded(app, serving), app, metrics)


class NewItemReplica:
    """One process that serves `new_item_api`."""

    def __init__(
        self,
        served: Served,
        limits: Data,
        serving: Serving,
        machines: ParameterMachines,
        follow: Scenario | None = None,
    ) -> None:
        torch.set_num_threads(max(1, int(serving.cpus_per_replica)))
        push = None if machines.state is None else ParameterClient(machines.state, machines).push
        open_encoder = partial(_open, limits=limits, serving=serving, push=push, follow=follow is not None)
        if follow is None:
            rollout = Rollout(open_encoder(served))
        else:
            read = partial(Served.of, follow)
            first = open_first(read, served, open_encoder)
            rollout = Rollout(first, read, lambda wanted: open_encoder(wanted, before=rollout.current))
            rollout.start(serving.follow_release_s)
        self._encoder = CurrentEncoder(rollout)
        self._serving = serving
        self._folding = WindowFolding(served.center, serving.window_s)
        self._metrics = Metrics(APP, self._versions, MAX_ONGOING_REQUESTS)
        self._metrics.watch("mim_ray_fold_age_seconds", self._folding.age_s)
        self._reporter = Reporter(self._metrics)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return new_item_api(self._encoder, self._serving, self._metrics)

    async def embed_query(self, image: bytes | None, title: str | None) -> tuple[np.ndarray, str] | RequestError:
        """For the ranking app's /v1/search/image: the query's vector (D,) and this encoder's version, or why it has none."""
        current = self._encoder.rollout.current
        try:
            vector = await run_in_threadpool(current.queries.embed, image, title)
        except RequestError as error:  # raised, Serve would log it as a fault of ours
            return error
        return vector, current.items.encoder_version

    def _versions(self) -> Versions:
        return Versions(None, self._encoder.encoder_version, self._encoder.rollout.current.served.release)


def _open(
    served: Served,
    *,
    limits: Data,
    serving: Serving,
    push: Push | None,
    follow: bool,
    before: OpenEncoder | None = None,
) -> OpenEncoder:
    """
    Args:
        before: goes on where it is the encoder that `served` names, with what it knows.

    Raises:
        ArtifactError: the encoder is missing or damaged. VersionMismatchError: it did not make the release's embeddings.
    """
    version = artifacts.read_json(f"{served.encoder}/encoder.json").get("encoder_version")
    _check_encoder(served, version)
    if before is not None and before.served.encoder == served.encoder and before.items.encoder_version == version:
        return replace(before, served=served)
    on_gpu = serving.gpus_per_replica > 0 and torch.cuda.is_available()
    encoder = load_for_tables(served.encoder, "cuda" if on_gpu else "cpu")
    items = NewItemEncoder(encoder, served.center, limits, push=push, serving=serving)
    if follow:
        items.check_release = ReleaseCheck(served.center, encoder.encoder_version, serving.follow_release_s)
    return OpenEncoder(served, items, QueryEncoder(encoder, limits, decode_timeout_s=serving.decode_timeout_s))


def bind_new_item_encoder(scenario: Scenario, served: Served | None = None) -> Application:
    """The Serve application of what is current, now and after later promotions; refuses early what a replica would refuse late.

    Args:
        served: this, and no other, whatever is promoted.

    Raises:
        MimRayError: the run is not finished, versions do not match, or strangers could call.
    """
    follow = scenario if served is None else None
    serving = check_exposure(scenario.serving)
    check_prefixes(serving.image_url_prefixes)
    served = Served.of(scenario) if served is None else served
    _check_encoder(served, artifacts.read_json(f"{served.encoder}/encoder.json").get("encoder_version"))
    deployment = serve.deployment(
        name="NewItems",
        num_replicas=serving.num_replicas,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_queued_requests=serving.max_queued_requests,
        backpressure_config=FULL_QUEUE,
        ray_actor_options={"num_cpus": serving.cpus_per_replica, "num_gpus": serving.gpus_per_replica},
    )(serve.ingress()(NewItemReplica))
    return deployment.bind(served, scenario.data, serving, scenario.machines, follow)


def _microseconds(at: datetime) -> int:
    return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def _check_encoder(served: Served, encoder_version: str | None) -> None:
    snapshot = Snapshot.open(served.snapshot, verify=False)
    check_versions(
        encoder_version,
        snapshot.encoder_version,
        expected_by=f"the encoder {served.encoder}",
        found_in=f"the snapshot {served.snapshot}",
    )
