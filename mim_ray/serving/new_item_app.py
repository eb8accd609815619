"""The new-item encoder app: HTTP around a NewItemEncoder (`new_item_api`), and the Ray Serve application of it."""

from __future__ import annotations

from dataclasses import replace
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
from mim_ray.encoders.item_encoder import load_for_tables
from mim_ray.errors import RequestError, UnavailableError
from mim_ray.representation_center.new_items import Push
from mim_ray.representation_center.parameter_client import ParameterClient
from mim_ray.representation_center.release import check_versions
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.serving.decoding import ImageDecoder
from mim_ray.serving.encoder_rollout import CurrentEncoder, OpenEncoder
from mim_ray.serving.fetch import check_prefixes
from mim_ray.serving.limits import FULL_QUEUE, check_exposure, guarded
from mim_ray.serving.messages import Health, NewItemsRequest, NewItemsResponse, Problem, Ready
from mim_ray.serving.metrics import Metrics, Versions, counted
from mim_ray.serving.metrics_hub import Reporter, add_metrics_routes
from mim_ray.serving.new_item_encoder import NewItemEncoder
from mim_ray.serving.query_encoder import QueryEncoder
from mim_ray.serving.release_check import ReleaseCheck
from mim_ray.serving.rollout import Rollout, open_first
from mim_ray.serving.served import Served
from mim_ray.serving.window_folding import WindowFolding

APP = "new_item_encoder"
MAX_ONGOING_REQUESTS = 8  # in one replica; more wait in the queue


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
        ImageDecoder.shared(limits.max_image_bytes, limits.max_image_pixels).start()
        self._serving = serving
        self._folding = WindowFolding(served.center, serving.window_s)
        self._metrics = Metrics(APP, self._versions, MAX_ONGOING_REQUESTS)
        self._metrics.watch("mim_ray_fold_age_seconds", self._folding.age_s)
        self._reporter = Reporter(self._metrics)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return new_item_api(self._encoder, self._serving, self._metrics)

    def __del__(self) -> None:
        """Serve calls it at the orderly end of a replica. What was acknowledged is durable; only counts are left to be told."""
        if "_reporter" in vars(self):
            self._reporter.stop()

    async def embed_query(
        self, image: bytes | None, title: str | None
    ) -> tuple[np.ndarray, str] | RequestError | UnavailableError:
        """For the ranking app's /v1/search/image: the query's vector (D,) and this encoder's version, or why it has none."""
        current = self._encoder.rollout.current
        try:
            vector = await run_in_threadpool(current.queries.embed, image, title)
        except (RequestError, UnavailableError) as error:  # raised, Serve would log it as a fault of ours
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
        max_queued_requests=serving.max_queued_new_items,
        backpressure_config=FULL_QUEUE,
        ray_actor_options={"num_cpus": serving.cpus_per_replica, "num_gpus": serving.gpus_per_replica},
    )(serve.ingress()(NewItemReplica))
    return deployment.bind(served, scenario.data, serving, scenario.machines, follow)


def _check_encoder(served: Served, encoder_version: str | None) -> None:
    snapshot = Snapshot.open(served.snapshot, verify=False)
    check_versions(
        encoder_version,
        snapshot.encoder_version,
        expected_by=f"the encoder {served.encoder}",
        found_in=f"the snapshot {served.snapshot}",
    )
