"""POST /v1/rank: candidates of a user by falling click probability. Knows tables and the CTR network, no encoder.

Plain Python; ranking_app.py puts HTTP and Ray Serve around it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from operator import itemgetter

import numpy as np

from mim_ray.ciubm.export import Ranker
from mim_ray.ciubm.request import Request
from mim_ray.config import Scenario
from mim_ray.config.scenario import ParameterMachines, Serving
from mim_ray.errors import ReleaseGoneError
from mim_ray.representation_center.parameter_store import ParameterStore
from mim_ray.serving.answers import answer
from mim_ray.serving.behavior_store import BehaviorStore
from mim_ray.serving.limits import check_count
from mim_ray.serving.live_behaviors import LiveBehaviors
from mim_ray.serving.loaded import QUERY, Loaded, LocalRows, RequestRows
from mim_ray.serving.messages import RankRequest, RankResponse
from mim_ray.serving.metrics import Metrics, Versions
from mim_ray.serving.query import QueryVector, check_takes_queries, has_query
from mim_ray.serving.request_context import context_table
from mim_ray.serving.rollout import Rollout, open_first
from mim_ray.serving.served import Served

RANK = "/v1/rank"
MAX_ONGOING_REQUESTS = 6  # in one replica; more wait in the queue. At half of the capacity more than 6 are rare
# Threads rank what is not short: two, since of many each operation waits for Python's lock.
THREADS = 2
SHORT_PAIRS = 50_000  # candidates x behaviors: about 4 ms, which the event loop can wait


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
        self._turn = threading.Lock()  # to compute, for requests that wait side by side in between
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
            behaviors = LiveBehaviors.open(served.behaviors, served.center, serving)
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

    @property
    def waits(self) -> bool:
        """Whether `rank` asks other processes: while one of them is away, requests should wait side by side."""
        return self.rollout.current.rows.waits

    def is_short(self, request: RankRequest) -> bool:
        """Whether `rank` computes for a few milliseconds and waits for nobody, so that handing it to a thread costs more."""
        loaded = self.rollout.current
        return not loaded.rows.waits and len(request.candidates) * loaded.model.max_behaviors <= SHORT_PAIRS

    def rank(self, request: RankRequest, query: QueryVector | None = None) -> RankResponse:
        """
        Args:
            query: of the request's query_text or query_image. None where it has one: it could not be read in time.

        Raises:
            RequestError: too many candidates, or a context or a query that does not fit the model.
            UnavailableError: the parameter machines hold another release, and that cannot be opened.
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
        if query is not None and not query.fits(loaded.model):
            query = None
        turn = self._turn if loaded.rows.waits else nullcontext()
        with turn:
            asked, num_future, absent = self._asked(request, loaded.model, query)
        began = time.perf_counter()
        found = loaded.rows.get(asked)
        if query is None and has_query(request):
            found = replace(found, degraded=(*found.degraded, QUERY))
        self.metrics.stage(RANK, "lookup", time.perf_counter() - began)
        with turn:
            began = time.perf_counter()
            prob = loaded.model.predict(found.batch, found.tables)  # (C,)
            self.metrics.stage(RANK, "network", time.perf_counter() - began)
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

    def _asked(self, request: RankRequest, model: Ranker, query: QueryVector | None) -> tuple[Request, int, list[str]]:
        """The request as rows of the model's tables, how many behaviors are later than it, and the features that it lacks."""
        if query is not None or has_query(request):
            check_takes_queries(model)
        place = {item: number for number, item in reversed(list(enumerate(request.candidates)))}
        candidates = list(dict.fromkeys(request.candidates))
        context, absent = context_table(
            model.features,
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
            query_mm=None if query is None else query.vector,
        )
        return asked, num_future, absent

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
        if found.batch.mm is not None and self.metrics.wants_embeddings():
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
