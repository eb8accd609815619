"""The ranking app: HTTP around a RankingService (`ranking_api`, for any ASGI server), and the Ray Serve application of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Response
from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from mim_ray import artifacts
from mim_ray.config import Scenario
from mim_ray.config.scenario import ParameterMachines, Serving
from mim_ray.representation_center.release import check_versions
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.runtime.memory import keep_freed_memory
from mim_ray.serving.events import add_event_routes
from mim_ray.serving.limits import FULL_QUEUE, check_count, check_exposure, guarded, max_queued_rankings
from mim_ray.serving.live_behaviors import LiveBehaviors
from mim_ray.serving.messages import Health, Problem, RankRequest, RankResponse, Ready
from mim_ray.serving.metrics import counted
from mim_ray.serving.metrics_hub import Reporter, add_metrics_routes
from mim_ray.serving.query import QueryVector, check_takes_queries, encoded, has_query
from mim_ray.serving.ranker import MAX_ONGOING_REQUESTS, RANK, THREADS, RankingService
from mim_ray.serving.served import Served
from mim_ray.serving.similar import SimilarItems
from mim_ray.serving.similar_routes import Embed, add_similar_routes, encoder_app
from mim_ray.serving.traffic import Chosen, Traffic, arms_of


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
    turn, waiting = CapacityLimiter(THREADS), CapacityLimiter(MAX_ONGOING_REQUESTS)

    @app.post(RANK, response_model=RankResponse, responses=problems)
    async def rank(request: RankRequest) -> Response:
        """Rank candidates for a user. Unknown users and items are scored too, by what is known."""
        service.metrics.parsed(RANK)
        chosen = Chosen(service, None) if traffic is None else traffic.choose(request.user_id, service)
        ranks, query = chosen.service, None
        if has_query(request):
            check_takes_queries(ranks.model)  # before the encoder is asked
            check_count("candidates", len(request.candidates), serving.max_candidates)
            query = await encoded(request, embed, serving.query_deadline_ms / 1e3)
        if ranks.is_short(request):
            return ranked(request, chosen, query)
        return await to_thread.run_sync(ranked, request, chosen, query, limiter=waiting if ranks.waits else turn)

    def ranked(request: RankRequest, chosen: Chosen, query: QueryVector | None) -> Response:
        told = service.rank(request, query) if traffic is None else traffic.rank(request, chosen, query)
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
        services = [service] if traffic is None else [service, *traffic.services]
        return Ready(
            status="ready",
            model_version=service.model_version,
            encoder_version=service.model.encoder_version,
            num_items=len(service.model.items.vocabulary),
            default_features=_summed([one.default_features for one in services]),
            degraded=_summed([one.degraded_answers for one in services]),
            release=service.rollout.current.served.release,
            refused=service.rollout.told,
            arms_missing=0 if traffic is None else len(traffic.missing),
        )

    add_similar_routes(app, similar, embed)
    add_metrics_routes(app, service.metrics)
    return counted(guarded(app, serving), app, service.metrics)


def _summed(counts: Sequence[Counter[str]]) -> Counter[str]:
    return sum((Counter(dict(one)) for one in counts), Counter[str]())  # copies: requests go on counting


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
        keep_freed_memory()  # a long request is ranked in a third of the time
        self._service = service = RankingService.open(served, serving, machines, follow)
        self._serving = serving
        other = partial(
            RankingService.open,
            serving=serving,
            machines=machines,
            behaviors=service.behaviors,
            metrics=service.metrics,
        )
        self._traffic = traffic = Traffic.open(serving, served, arms or {}, other)
        service.metrics.watch("mim_ray_arms_missing", lambda: len(traffic.missing))
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

    def __del__(self) -> None:
        """Serve calls it at the orderly end of a replica, after the last request; then it kills the process, so that nothing
        that waits for the interpreter's end would happen."""
        if "_reporter" not in vars(self):  # it was never ready
            return
        self._traffic.stop()
        if self._traffic.exposures is not None:
            self._traffic.exposures.close()
        self._reporter.stop()


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
        max_queued_requests=max_queued_rankings(serving),
        backpressure_config=FULL_QUEUE,
        ray_actor_options={"num_cpus": serving.cpus_per_replica},
    )(serve.ingress()(RankingReplica))
    return deployment.bind(served, serving, scenario.machines, follow, arms)


def _check_model(served: Served) -> None:
    found = Snapshot.open(served.snapshot, verify=False).encoder_version
    trained_on = artifacts.read_json(f"{served.ctr}/ctr.json").get("encoder_version")
    if trained_on is not None:
        check_versions(trained_on, found, expected_by=f"The CTR model {served.ctr}", found_in=served.snapshot)
