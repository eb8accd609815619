"""POST /v1/rank: candidates of a user by falling click probability. Knows tables and the CTR network, no encoder.

`RankingService` is plain Python, `ranking_api` puts HTTP around it (any ASGI server runs it), `bind_ranking` makes it a
Ray Serve application.
"""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from mim_ray import artifacts
from mim_ray.ciubm.export import Ranker, load_ranker
from mim_ray.config import Scenario
from mim_ray.config.scenario import Serving
from mim_ray.representation_center.parameter_store import ParameterStore
from mim_ray.representation_center.release import check_versions
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.serving.behavior_store import BehaviorStore
from mim_ray.serving.events import add_event_routes
from mim_ray.serving.limits import check_count, check_exposure, guarded
from mim_ray.serving.live_behaviors import LiveBehaviors
from mim_ray.serving.messages import Health, Problem, RankedItem, RankRequest, RankResponse, Ready
from mim_ray.serving.request_context import context_table
from mim_ray.serving.served import Served
from mim_ray.serving.traffic import Traffic, arms_of

FOLLOW_EVERY_S = 0.1  # how often new items are looked for
MAX_ONGOING_REQUESTS = 8  # in one replica; more wait in the queue


class RankingService:
    """Ranks one request.

    Args:
        model: the CTR model; its `encoder_version` None means that it uses no content.
        embeddings: where MM embeddings come from, those of new items included.
        behaviors: used when a request brings none.

    Attributes:
        default_features: how many requests lacked each declared feature.
    """

    def __init__(
        self,
        model: Ranker,
        embeddings: ParameterStore,
        behaviors: BehaviorStore | LiveBehaviors,
        *,
        max_candidates: int,
    ) -> None:
        self.model = model
        self.embeddings = embeddings
        self.behaviors = behaviors
        self.max_candidates = max_candidates
        self.default_features: Counter[str] = Counter()
        self._counting = threading.Lock()
        self.model_version = f"{model.variant}-{artifacts.fingerprint(model.info)[:12]}"

    @classmethod
    def open(
        cls, served: Served, serving: Serving, behaviors: BehaviorStore | LiveBehaviors | None = None
    ) -> RankingService:
        """
        Args:
            behaviors: open ones, shared with another service.

        Raises:
            ArtifactError: something is missing or damaged.
            VersionMismatchError: the CTR model was trained on another encoder version's embeddings.
        """
        model = load_ranker(served.ctr)
        embeddings = ParameterStore(
            served.snapshot,
            table=f"{served.center}/table",
            window=f"{served.center}/window",
            encoder_version=model.encoder_version,
        )
        embeddings.start(every_s=FOLLOW_EVERY_S)
        if behaviors is None:
            behaviors = LiveBehaviors.open(served.behaviors, served.center, serving, model.max_behaviors)
        return cls(model, embeddings, behaviors, max_candidates=serving.max_candidates)

    def rank(self, request: RankRequest) -> RankResponse:
        """
        Raises:
            RequestError: too many candidates, or a context that does not fit the model.
        """
        check_count("candidates", len(request.candidates), self.max_candidates)
        place = {item: number for number, item in reversed(list(enumerate(request.candidates)))}
        candidates = list(dict.fromkeys(request.candidates))
        context, absent = context_table(
            self.model.features.kinds,
            request.context,
            request.item_context,
            [place[item] for item in candidates],
            len(request.candidates),
        )
        with self._counting:
            self.default_features.update(absent)
        timestamp = round((request.timestamp or datetime.now(UTC)).timestamp() * 1e6)
        behaviors, times, num_future = self._history(request, timestamp)
        has_content = np.zeros(len(candidates), bool)

        def multi_get(ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray, Sequence[str | None]]:
            vectors, found, categories = self.embeddings.multi_get(ids)
            has_content[:] = found[len(behaviors) :]
            return vectors, found, categories.to_pylist()

        prob = self.model.score(
            request.user_id,
            behaviors,
            candidates,
            multi_get,
            behavior_times=times,
            timestamp=timestamp,
            context=context,
        )  # (C,)
        if not np.isfinite(prob).all():
            raise FloatingPointError("the CTR model gave a probability that is no number")
        position = self.model.items.vocabulary.encode(candidates)
        unknown = self.model.items.rows(candidates, position) == 0  # (C,)
        order = np.argsort(-prob, kind="stable")[: request.top_k]
        return RankResponse(
            request_id=uuid.uuid4().hex,
            items=[
                RankedItem(
                    item_id=candidates[row],
                    prob=float(prob[row]),
                    unknown_item=bool(unknown[row]),
                    no_content=not has_content[row],
                )
                for row in order
            ],
            num_behaviors=len(behaviors),
            num_future_behaviors=num_future,
            default_features=absent,
            model_version=self.model_version,
            encoder_version=self.model.encoder_version,
        )

    def _history(self, request: RankRequest, timestamp: int) -> tuple[list[str], list[int] | None, int]:
        """The newest behaviors before the request, oldest first, their times if these are known, and how many are later."""
        if request.behaviors is None:
            behaviors, times = self.behaviors.history(request.user_id)
        else:
            behaviors, given = request.behaviors, request.behavior_times
            times = None if given is None else [round(time.timestamp() * 1e6) for time in given]
        newest = self.model.max_behaviors
        if times is None:
            return behaviors[-newest:], None, 0
        past = sorted((pair for pair in zip(times, behaviors, strict=True) if pair[0] < timestamp), key=itemgetter(0))
        kept = past[-newest:]
        return [item for _, item in kept], [time for time, _ in kept], len(behaviors) - len(past)


def ranking_api(service: RankingService, serving: Serving, traffic: Traffic | None = None) -> ASGIApp:
    """The HTTP face of a service, with its limits.

    Args:
        traffic: deals users out to the arms of an A/B test, and logs what was shown.
    """
    app = FastAPI(title="mim_ray ranking", summary="Candidates of a user by click probability.")
    problems: dict[int | str, dict[str, Any]] = {status: {"model": Problem} for status in (400, 413, 422, 503)}

    @app.post("/v1/rank", responses=problems)
    def rank(request: RankRequest) -> RankResponse:
        """Rank candidates for a user. Unknown users and items are scored too, by what is known."""
        return service.rank(request) if traffic is None else traffic.rank(request, service)

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
        )

    return guarded(app, serving.max_body_bytes)


class RankingReplica:
    """One process that serves `ranking_api`."""

    def __init__(self, served: Served, serving: Serving, arms: Mapping[str, Served]) -> None:
        torch.set_num_threads(max(1, int(serving.cpus_per_replica)))
        self._service = service = RankingService.open(served, serving)
        self._serving = serving
        other = lambda served: RankingService.open(served, serving, service.behaviors)  # noqa: E731
        self._traffic = Traffic.open(serving, served, arms, other)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return ranking_api(self._service, self._serving, self._traffic)


def bind_ranking(scenario: Scenario, served: Served | None = None) -> Application:
    """The Serve application of what is current; refuses early what a replica would refuse late.

    Args:
        served: something else than `Served.of(scenario)`.

    Raises:
        MimRayError: the run is not finished, versions do not match, or strangers could call.
    """
    serving = scenario.serving
    check_exposure(serving)
    served = Served.of(scenario) if served is None else served
    arms = arms_of(scenario, served)
    for one in (served, *arms.values()):
        _check_model(one)
    deployment = serve.deployment(
        name="Ranking",
        num_replicas=serving.num_replicas,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_queued_requests=serving.max_queued_requests,
        ray_actor_options={"num_cpus": serving.cpus_per_replica},
    )(serve.ingress()(RankingReplica))
    return deployment.bind(served, serving, arms)


def _check_model(served: Served) -> None:
    found = Snapshot.open(served.snapshot, verify=False).encoder_version
    trained_on = artifacts.read_json(f"{served.ctr}/ctr.json").get("encoder_version")
    if trained_on is not None:
        check_versions(trained_on, found, expected_by=f"The CTR model {served.ctr}", found_in=served.snapshot)
