"""What the apps count, with prometheus-client: one `Metrics` in each process, the same names in all of them.

    metrics = Metrics("ranking", lambda: Versions("sim-mim-…", "csft-…"))
    metrics.watch_embeddings(lambda: store)
    api = counted(guarded(app, …), app, metrics)         # requests by route and status, latency, requests in work
    add_metrics_routes(app, metrics)                      # /metrics of all processes (metrics_hub.py), or of this one

Without Ray (bare uvicorn, tests) it is complete for its one process. Labels hold routes, stages, versions and names of
declared features: never a user, an item or a token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count
from math import isnan, nan
from typing import Literal

import numpy as np
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mim_ray.representation_center.parameter_store import ParameterStore

LATENCY_BUCKETS_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
HEALTH_ROWS = 256  # of an answer, that the health of embeddings is measured with
HEALTH_EVERY = 8  # answers
Stage = Literal["parse", "lookup", "network", "total"]
Joined = Literal["sum", "max", "mean"]
GAUGES: dict[str, tuple[str, Joined]] = {
    "mim_ray_ongoing_requests": ("Requests in work.", "sum"),
    "mim_ray_request_capacity": ("Requests that may be in work at once; more wait in Serve's queue.", "sum"),
    "mim_ray_freshness_seconds": ("Since the last successful look for new items: what came before is ranked.", "max"),
    "mim_ray_newest_item_age_seconds": ("Since an item came after the snapshot; 0 before the first.", "max"),
    "mim_ray_overlay_items": ("Items that came after the snapshot.", "max"),
    "mim_ray_fold_age_seconds": ("Since the window was last folded into the table.", "max"),
    "mim_ray_live_behaviors": ("Behaviors from posted events in memory.", "max"),
    "mim_ray_exposures_dropped": ("Answers since the process started that were not logged as shown.", "sum"),
    "mim_ray_release_refused": ("1 while a promoted release cannot be served.", "max"),
    "mim_ray_arms_missing": ("Arms of the A/B test that a replica cannot serve; their users are in no arm.", "max"),
    "mim_ray_index_recall": ("Share of the true nearest items that similar items finds; 0 while it is built.", "mean"),
}
"""Values of now: name -> what it is, and how those of several processes become one."""
_started: ContextVar[float] = ContextVar("started")


@dataclass(frozen=True)
class Versions:
    """What a process serves; release: its number, if one was promoted."""

    model: str | None = None
    encoder: str | None = None
    release: int | None = None


@dataclass(frozen=True)
class Family:
    """One metric with its samples, as processes send it to each other."""

    name: str
    kind: str
    text: str
    samples: tuple[tuple[str, tuple[tuple[str, str], ...], float], ...]  # (name, labels, value)


class Metrics:
    """
    Args:
        app: "ranking" or "new_item_encoder".
        versions: what is served now.
        capacity: requests that this process works on at once.

    Attributes:
        joined: gives the metrics of all processes; of this one until a `Reporter` is there.
    """

    def __init__(self, app: str, versions: Callable[[], Versions] = Versions, capacity: int = 0) -> None:
        self.app = app
        self.joined: Callable[[], list[Family]] = self.families
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "mim_ray_requests", "Requests by route and status class.", ["app", "route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "mim_ray_request_seconds",
            "Latency by route and stage: parse, lookup (vectors), network (CTR model), total.",
            ["route", "stage"],
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._degraded = Counter(
            "mim_ray_degraded_answers", "Rankings that lacked what could not be read.", ["missing"], registry=registry
        )
        self._candidates = Counter("mim_ray_candidates", "Candidates ranked.", registry=registry)
        self._unknown = Counter("mim_ray_unknown_items", "Candidates without an ID embedding.", registry=registry)
        self._no_content = Counter("mim_ray_items_without_content", "Candidates without MM vector.", registry=registry)
        self._defaults = Counter(
            "mim_ray_default_features", "Rankings that lacked a declared feature.", ["feature"], registry=registry
        )
        self._encoded = Counter("mim_ray_encoded_items", "New items encoded and stored.", registry=registry)
        self._unchanged = Counter("mim_ray_unchanged_items", "Posted items whose content was known.", registry=registry)
        self._norm = Summary("mim_ray_embedding_norm", "Length of candidates' MM vectors.", registry=registry)
        self._cosine = Summary(
            "mim_ray_embedding_cosine", "Cosine of MM vectors of candidates that follow each other.", registry=registry
        )
        self._gauges = {
            name: Gauge(name, text, ["app"], registry=registry) for name, (text, _) in GAUGES.items()
        }  # all of them: one without a value is named still
        self._versions = versions
        self._answers = count()
        self._version_info = Gauge(
            "mim_ray_version_info",
            "Processes that serve these versions.",
            ["app", "model_version", "encoder_version", "release"],
            registry=registry,
        )
        self._ongoing = self._gauges["mim_ray_ongoing_requests"]
        self._gauges["mim_ray_request_capacity"].labels(app).set(capacity)

    def watch(self, name: str, value: Callable[[], float]) -> None:
        """Ask for the value of one of `GAUGES` whenever metrics are read."""
        self._gauges[name].labels(self.app).set_function(value)

    def watch_embeddings(self, store: Callable[[], ParameterStore | None]) -> None:
        """How fresh the embeddings are that are read in this process; where it reads none there is no such sample."""

        def ask(value: Callable[[ParameterStore], float]) -> Callable[[], float]:
            return lambda: nan if (now := store()) is None else value(now)

        self.watch("mim_ray_freshness_seconds", ask(lambda store: store.lookup.behind_s))
        self.watch("mim_ray_overlay_items", ask(lambda store: store.num_overlay_rows))
        self.watch("mim_ray_newest_item_age_seconds", ask(lambda store: _age_s(store.lookup.newest_ns)))

    def stage(self, route: str, stage: Stage, seconds: float) -> None:
        """Time that one request spent in a stage."""
        self._seconds.labels(route, stage).observe(seconds)

    def parsed(self, route: str) -> None:
        """A request was read and checked, and its work begins."""
        started = _started.get(None)
        if started is not None:  # not called by hand
            self.stage(route, "parse", time.perf_counter() - started)

    def ranked(
        self,
        *,
        candidates: int,
        unknown: int,
        without_content: int,
        default_features: Iterable[str],
        degraded: Sequence[str] = (),
    ) -> None:
        """One answer's counts of candidates, the features that it lacked, and what could not be read for it."""
        self._candidates.inc(candidates)
        self._unknown.inc(unknown)
        self._no_content.inc(without_content)
        for feature in default_features:
            self._defaults.labels(feature).inc()
        if degraded:
            self._degraded.labels(",".join(degraded)).inc()

    def encoded(self, *, changed: int, unchanged: int) -> None:
        """One answer of the new-item encoder."""
        self._encoded.inc(changed)
        self._unchanged.inc(unchanged)

    def wants_embeddings(self) -> bool:
        """Whether this answer's vectors are to be given to `embeddings`: one in `HEALTH_EVERY` is enough, and costs less."""
        return next(self._answers) % HEALTH_EVERY == 0

    def embeddings(self, vectors: np.ndarray) -> None:
        """Health of (n, D) candidates' vectors: their lengths, and how alike those are that follow each other.

        The mean cosine of unrelated items stays where it is as long as encoder and tables fit; it rises when embeddings collapse.
        """
        vectors = vectors[:HEALTH_ROWS]
        lengths = np.linalg.norm(vectors, axis=1)
        _add(self._norm, lengths)
        pairs = lengths[:-1] * lengths[1:]
        whole = pairs > 0
        _add(self._cosine, np.einsum("nd,nd->n", vectors[:-1], vectors[1:])[whole] / pairs[whole])

    @contextmanager
    def request(self, route: str) -> Iterator[dict[str, str]]:
        """Count a request; its block sets ["status"]: 2xx, 4xx, …"""
        outcome = {"status": "closed"}  # by the caller, before an answer
        started = time.perf_counter()
        token = _started.set(started)
        ongoing = self._ongoing.labels(self.app)
        ongoing.inc()
        try:
            yield outcome
        except Exception:
            outcome["status"] = "5xx"
            raise
        finally:
            ongoing.dec()
            _started.reset(token)
            self._requests.labels(self.app, route, outcome["status"]).inc()
            self.stage(route, "total", time.perf_counter() - started)

    def families(self) -> list[Family]:
        """All metrics with their values of now."""
        now = self._versions()
        release = "" if now.release is None else str(now.release)
        self._version_info.clear()
        self._version_info.labels(self.app, now.model or "", now.encoder or "", release).set(1)
        return [
            Family(
                found.name,
                found.type,
                found.documentation,
                tuple(
                    (sample.name, tuple(sorted(sample.labels.items())), float(sample.value))
                    for sample in found.samples
                    if not sample.name.endswith("_created") and not isnan(sample.value)
                ),
            )
            for found in self._registry.collect()
        ]


def counted(api: ASGIApp, app: FastAPI, metrics: Metrics) -> ASGIApp:
    """`api`, which ends in `app`, with its requests counted: those too that are refused before they reach the app."""

    async def count(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await api(scope, receive, send)
            return
        with metrics.request(_route(app, scope)) as outcome:

            async def watched(message: Message) -> None:
                if message["type"] == "http.response.start":
                    outcome["status"] = f"{message['status'] // 100}xx"
                await send(message)

            await api(scope, receive, watched)

    return count


def _route(app: FastAPI, scope: Scope) -> str:
    """The route's template, /v1/similar/{item_id:path}; "other" for a path that is none: strangers make no labels."""
    whole = {**scope, "root_path": ""}
    for route in app.routes:
        if route.matches(whole)[0] is not Match.NONE:
            return str(getattr(route, "path", "other"))
    return "other"


def _age_s(at_ns: int) -> float:
    return max(0.0, (time.time_ns() - at_ns) / 1e9) if at_ns else 0.0


def _add(summary: Summary, values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    summary._count.inc(len(values))  # as many observations at once: one call for each costs more than a ranking
    summary._sum.inc(float(values.sum()))
