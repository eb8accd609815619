"""POST /v1/rank: candidates of a user by falling click probability. Knows tables and the CTR network, no encoder.

`RankingService` is plain Python, `ranking_api` puts HTTP around it (any ASGI server runs it), `bind_ranking` makes it a
Ray Serve application.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, Response
from fastapi.concurrency import run_in_threadpool
from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from mim_ray import artifacts
from mim_ray.ciubm.export import Ranker
from mim_ray.config import Scenario
from mim_ray.config.scenario import ParameterMachines, Serving
from mim_ray.errors import ReleaseGoneError
from mim_ray.representation_center.parameter_store import ParameterStore
from mim_ray.representation_center.release import check_versions
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.serving.answers import answer
from mim_ray.serving.behavior_store import BehaviorStore
from mim_ray.serving.events import add_event_routes
from mim_ray.serving.limits import FULL_QUEUE, check_count, check_exposure, guarded
from mim_ray.serving.live_behaviors import LiveBehaviors
from mim_ray.serving.loaded import Loaded, LocalRows, RequestRows
from mim_ray.serving.messages import Health, Problem, RankRequest, RankResponse, Ready
from mim_ray.serving.metrics import Metrics, Versions, counted
from mim_ray.serving.metrics_hub import Reporter, add_metrics_routes
from mim_ray.serving.query import QueryVector, check_takes_queries, encoded, has_query
from mim_ray.serving.request_context import context_table
from mim_ray.serving.rollout import Rollout, open_first
from mim_ray.serving.served import Served
from mim_ray.serving.similar import SimilarItems
from mim_ray.serving.similar_routes import Embed, add_similar_routes, encoder_app
from mim_ray.serving.traffic import Traffic, arms_of

RANK = "/v1/rank"
MAX_ONGOING_REQUESTS = 8  # in one replica; more wait in the queue


class RankingService:
    """Ranks one request.

    Args:
        rollout: the release that serves.
        behaviors: used when a request brings none.
        metrics: of another service in this process, which counts for this one too.

    Attributes:
        default_features: how many requests lacked each declared feature.
        degraded_answers: how many answers lacked content or rows of tables.
    """

    def __init__(
        self,
        rollout: Rollout[Loaded],
        behaviors: BehaviorStore | LiveBehaviors,
        *,
        max_candidates: int,
        metrics: Metrics | None = None,
    ) -> None:
        self.rollout = rollout
        self.behaviors = behaviors
        self.max_candidates = max_candidates
        self.default_features: Counter[str] = Counter()
        self.degraded_answers: Counter[str] = Counter()
        self._counting = threading.Lock()
        self.metrics = Metrics("ranking", self._versions, MAX_ONGOING_REQUESTS) if metrics is None else metrics
        if metrics is None:
            self.metrics.watch_embeddings(lambda: self.embeddings)
            self.metrics.watch("mim_ray_release_refused", lambda: float(rollout.refused is not None))
            if isinstance(behaviors, LiveBehaviors):
                self.metrics.watch("mim_ray_live_behaviors", lambda: behaviors.num_live)

    @classmethod
    def open(
        cls,
        served: Served,
        serving: Serving,
        machines: ParameterMachines | None = None,
        follow: Scenario | None = None,
        behaviors: BehaviorStore | LiveBehaviors | None = None,
        metrics: Metrics | None = None,
    ) -> RankingService:
        """
        Args:
            machines: needed where `served` is on parameter machines.
            follow: serve what is current in this scenario, now and later; `served` where it cannot be served now.
            behaviors, metrics: of another service in this process, shared with it.

        Raises:
            ArtifactError: something is missing or damaged.
            VersionMismatchError: the CTR model was trained on another encoder version's embeddings.
        """
        open_release = partial(Loaded.open, machines=ParameterMachines() if machines is None else machines)
        if follow is None:
            rollout = Rollout(open_release(served))
        else:
            read = partial(Served.for_ranking, follow)
            rollout = Rollout(open_first(read, served, open_release), read, open_release)
            rollout.check()
            rollout.start(serving.follow_release_s)
        if behaviors is None:
            newest = rollout.current.model.max_behaviors
            behaviors = LiveBehaviors.open(served.behaviors, served.center, serving, newest)
        return cls(rollout, behaviors, max_candidates=serving.max_candidates, metrics=metrics)

    @property
    def model(self) -> Ranker:
        """Of the release that serves now."""
        return self.rollout.current.model

    @property
    def model_version(self) -> str:
        """Of the release that serves now."""
        return self.rollout.current.model_version

    @property
    def embeddings(self) -> ParameterStore | None:
        """The embeddings of the release that serves now, where they are read in this process."""
        rows = self.rollout.current.rows
        return rows.store if isinstance(rows, LocalRows) else None

    def rank(self, request: RankRequest, query: QueryVector | None = None) -> RankResponse:
        """
        Args:
            query: of the request's query_text or query_image.

        Raises:
            RequestError: too many candidates, or a context or a query that does not fit the model.
            UnavailableError: the parameter machines hold another release, and that cannot be opened; or the query is of
                another encoder version than the model's.
        """
        check_count("candidates", len(request.candidates), self.max_candidates)
        loaded = self.rollout.current
        try:
            return self._rank(request, loaded, query)
        except ReleaseGoneError:  # the machines were faster than this replica
            newer = self.rollout.check()
            if newer is loaded:
                raise
            return self._rank(request, newer, query)

    def _rank(self, request: RankRequest, loaded: Loaded, query: QueryVector | None) -> RankResponse:
        model = loaded.model
        place = {item: number for number, item in reversed(list(enumerate(request.candidates)))}
        candidates = list(dict.fromkeys(request.candidates))
        context, absent = context_table(
            model.features.kinds,
            request.context,
            request.item_context,
            [place[item] for item in candidates],
            len(request.candidates),
        )
        timestamp = round((request.timestamp or datetime.now(UTC)).timestamp() * 1e6)
        behaviors, times, num_future = self._history(request, timestamp, model.max_behaviors)
        asked = model.request(
            request.user_id,
            behaviors,
            candidates,
            behavior_times=times,
            timestamp=timestamp,
            context=context,
            query_mm=None if query is None else query.for_model(model),
        )
        began = time.perf_counter()
        found = loaded.rows.get(asked)
        looked = time.perf_counter()
        prob = model.predict(found.batch, found.tables)  # (C,)
        self.metrics.stage(RANK, "lookup", looked - began)
        self.metrics.stage(RANK, "network", time.perf_counter() - looked)
        if not np.isfinite(prob).all():
            raise FloatingPointError("the CTR model gave a probability that is no number")
        self._count(found, absent)
        return answer(
            loaded,
            asked,
            found,
            prob,
            top_k=request.top_k,
            explain=request.explain,
            num_future_behaviors=num_future,
            default_features=absent,
        )

    def _count(self, found: RequestRows, absent: Sequence[str]) -> None:
        with self._counting:
            self.default_features.update(absent)
            self.degraded_answers.update(found.degraded)
        self.metrics.ranked(
            candidates=len(found.unknown),
            unknown=int(found.unknown.sum()),
            without_content=int((~found.has_content).sum()),
            default_features=absent,
            degraded=found.degraded,
        )
        if found.batch.mm is not None:
            candidates = found.batch.mm.numpy()[-len(found.unknown) :]  # (C, D)
            self.metrics.embeddings(candidates if found.has_content.all() else candidates[found.has_content])

    def _versions(self) -> Versions:
        now = self.rollout.current
        return Versions(now.model_version, now.model.encoder_version, now.served.release)

    def _history(self, request: RankRequest, timestamp: int, newest: int) -> tuple[list[str], list[int] | None, int]:
        """The `newest` behaviors before the request, oldest first, their times if these are known, and how many are later."""
        if request.behaviors is None:
            behaviors, times = self.behaviors.history(request.user_id)
        else:
            behaviors, given = request.behaviors, request.behavior_times
            times = None if given is None else [round(time.timestamp() * 1e6) for time in given]
        if times is None:
            return behaviors[-newest:], None, 0
        past = sorted((pair for pair in zip(times, behaviors, strict=True) if pair[0] < timestamp), key=itemgetter(0))
        kept = past[-newest:]
        return [item for _, item in kept], [time for time, _ in kept], len(behaviors) - len(past)


def ranking_api(
    service: RankingService,
    serving: Serving,
    traffic: Traffic | None = None,
    similar: SimilarItems | None = None,
    embed: Embed | None = None,
) -> ASGIApp:
    """The HTTP face of a service, with its limits.

    Args:
        traffic: deals users out to the arms of an A/B test, and logs what was shown.
        similar, embed: as of `add_similar_routes`.
    """
    app = FastAPI(title="mim_ray ranking", summary="Candidates of a user by click probability.")
    problems: dict[int | str, dict[str, Any]] = {status: {"model": Problem} for status in (400, 413, 422, 503)}

    embed = encoder_app() if embed is None else embed

    @app.post(RANK, response_model=RankResponse, responses=problems)
    async def rank(request: RankRequest) -> Response:
        """Rank candidates for a user. Unknown users and items are scored too, by what is known."""
        service.metrics.parsed(RANK)
        query = None
        if has_query(request):
            if traffic is None:
                check_takes_queries(service.model)
            query = await encoded(request, embed)
        return await run_in_threadpool(ranked, request, query)

    def ranked(request: RankRequest, query: QueryVector | None) -> Response:
        told = service.rank(request, query) if traffic is None else traffic.rank(request, service, query)
        return Response(told.model_dump_json(), media_type="application/json")  # checked when it was built

    if isinstance(service.behaviors, LiveBehaviors):
        add_event_routes(app, service.behaviors)

    @app.get("/healthz")
    async def healthz() -> Health:
        """The process answers."""
        return Health()

    @app.get("/readyz", responses={503: {"model": Problem}})
    def readyz() -> Ready:
        """Model and tables are loaded, and which."""
        return Ready(
            status="ready",
            model_version=service.model_version,
            encoder_version=service.model.encoder_version,
            num_items=len(service.model.items.vocabulary),
            default_features=dict(service.default_features),
            degraded=dict(service.degraded_answers),
            release=service.rollout.current.served.release,
            refused=service.rollout.refused,
        )

    add_similar_routes(app, similar, embed)
    add_metrics_routes(app, service.metrics)
    return counted(guarded(app, serving), app, service.metrics)


class RankingReplica:
    """One process that serves `ranking_api`."""

    def __init__(
        self,
        served: Served,
        serving: Serving,
        machines: ParameterMachines | None = None,
        follow: Scenario | None = None,
        arms: Mapping[str, Served] | None = None,
    ) -> None:
        torch.set_num_threads(max(1, int(serving.cpus_per_replica)))
        self._service = service = RankingService.open(served, serving, machines, follow)
        self._serving = serving
        other = partial(
            RankingService.open,
            serving=serving,
            machines=machines,
            behaviors=service.behaviors,
            metrics=service.metrics,
        )
        self._traffic = Traffic.open(serving, served, arms or {}, other)
        if (exposures := self._traffic.exposures) is not None:
            service.metrics.watch("mim_ray_exposures_dropped", lambda: exposures.num_dropped)
        self._similar = None
        if serving.similar_items:
            self._similar = SimilarItems(
                lambda: service.rollout.current, exact_rows=serving.exact_search_rows, recall=serving.search_recall
            )
            self._similar.start()
            service.metrics.watch("mim_ray_index_recall", self._similar.recall)
        self._reporter = Reporter(service.metrics)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return ranking_api(self._service, self._serving, self._traffic, self._similar)


def bind_ranking(scenario: Scenario, served: Served | None = None) -> Application:
    """The Serve application of what is current, now and after later promotions; refuses early what a replica would refuse late.

    Args:
        served: this, and no other, whatever is promoted.

    Raises:
        MimRayError: the run is not finished, versions do not match, or strangers could call.
    """
    serving = check_exposure(scenario.serving)
    follow = scenario if served is None else None
    served = Served.for_ranking(scenario) if served is None else served
    arms = arms_of(scenario, served)
    for one in (served, *arms.values()):
        _check_model(one)
    deployment = serve.deployment(
        name="Ranking",
        num_replicas=serving.num_replicas,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_queued_requests=serving.max_queued_requests,
        backpressure_config=FULL_QUEUE,
        ray_actor_options={"num_cpus": serving.cpus_per_replica},
    )(serve.ingress()(RankingReplica))
    return deployment.bind(served, serving, scenario.machines, follow, arms)


def _check_model(served: Served) -> None:
    found = Snapshot.open(served.snapshot, verify=False).encoder_version
    trained_on = artifacts.read_json(f"{served.ctr}/ctr.json").get("encoder_version")
    if trained_on is not None:
        check_versions(trained_on, found, expected_by=f"The CTR model {served.ctr}", found_in=served.snapshot)
