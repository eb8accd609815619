"""/metrics of all processes, whichever of them is asked.

Every process sends its metrics each second to one small named actor, which joins them: counters are summed, gauges joined as
`metrics.GAUGES` says. What a dead process had counted stays in the sums, so that they never fall; its gauges go after
`SILENT_S`. The actor holds nothing else: when it dies the next report makes another one, and to Prometheus that is a counter that began
again. It ends by itself when nobody has reported for `IDLE_S`. Without Ray `/metrics` answers for its own process.

Inside Ray processes the same numbers go to Ray's own metrics too, as ray_mim_ray_… beside Ray's: for clusters that scrape Ray's
agents already. Of histograms Ray gets the sums and counts.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import ray
from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import Metric
from prometheus_client.samples import Sample
from ray.exceptions import RayError
from ray.util.metrics import Counter, Gauge

from mim_ray.serving.messages import Problem
from mim_ray.serving.metrics import GAUGES, Family, Metrics

logger = logging.getLogger("ray.serve")
NAME, NAMESPACE = "mim_ray_metrics", "mim_ray"
REPORT_EVERY_S = 1.0
SILENT_S = 10.0  # then a process counts as dead
IDLE_S = 600.0
ANSWER_S = 2.0  # the actor has, when /metrics is asked
WARN_AFTER = 10  # failed reports: while the actor starts, or is made again, some do
MAX_DEAD = 100  # of which the counters are kept apart, should one of them only have been silent
Labels = tuple[tuple[str, str], ...]


class Reports:
    """What processes reported last, joined. Plain Python."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, list[Family]]] = {}  # of each process: when, and what
        self._gone: dict[tuple[str, Labels], float] = {}  # counters of those that are forgotten

    def report(self, process: str, families: list[Family], at: float) -> None:
        """Args: at: seconds of a monotonic clock."""
        self._last.pop(process, None)
        self._last[process] = (at, families)  # the order is that of the last report
        while len(self._last) > MAX_DEAD and next(iter(self._last.values()))[0] < at - SILENT_S:
            _, oldest = self._last.pop(next(iter(self._last)))
            for family in oldest:
                if family.kind != "gauge":
                    for name, labels, value in family.samples:
                        self._gone[name, labels] = self._gone.get((name, labels), 0.0) + value

    def joined(self, at: float) -> list[Family]:
        """Each metric once, as if all processes were one."""
        found: dict[str, Family] = {}
        values: dict[str, dict[tuple[str, Labels], list[float]]] = {}
        for reported_at, families in self._last.values():
            for family in families:
                if family.kind == "gauge" and reported_at < at - SILENT_S:
                    continue
                found[family.name] = family
                own = values.setdefault(family.name, {})
                for name, labels, value in family.samples:
                    own.setdefault((name, labels), []).append(value)
        return [
            Family(family.name, family.kind, family.text, tuple(self._join(family, own)))
            for family, own in ((found[name], values[name]) for name in sorted(found))
        ]

    def _join(
        self, family: Family, values: dict[tuple[str, Labels], list[float]]
    ) -> Iterable[tuple[str, Labels, float]]:
        how = GAUGES[family.name][1] if family.name in GAUGES else "sum"
        for (name, labels), several in values.items():
            if how == "max":
                yield name, labels, max(several)
            elif how == "mean":
                yield name, labels, sum(several) / len(several)
            else:
                yield name, labels, sum(several) + self._gone.get((name, labels), 0.0)


def text_of(families: Sequence[Family]) -> bytes:
    """Prometheus' text format."""

    class Collected:
        def collect(self) -> Iterable[Metric]:
            for family in families:
                metric = Metric(family.name, family.text, family.kind)
                metric.samples = [Sample(name, dict(labels), value) for name, labels, value in family.samples]
                yield metric

    return generate_latest(Collected())


class _Hub:
    """The actor."""

    def __init__(self) -> None:
        self._reports, self._at = Reports(), time.monotonic()
        self._self = ray.get_runtime_context().current_actor
        threading.Thread(target=self._end_when_idle, daemon=True).start()

    def report(self, process: str, families: list[Family]) -> None:
        self._at = time.monotonic()
        self._reports.report(process, families, self._at)

    def joined(self) -> list[Family]:
        return self._reports.joined(time.monotonic())

    def _end_when_idle(self) -> None:
        while time.monotonic() - self._at < IDLE_S:
            time.sleep(IDLE_S / 10)
        ray.kill(self._self)


class Reporter:
    """A thread that sends a process's metrics to the actor, and to Ray's own. From then on `metrics.joined` asks the actor."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        metrics.joined = self.joined
        self._process = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._hub: Any = None
        self._ray = _RayMetrics()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True, name="metrics")
        self._thread.start()

    def stop(self) -> None:
        """Send what was counted last, and no more."""
        self._stop.set()
        self._thread.join()

    def joined(self) -> list[Family]:
        """Of all processes, this one as it is now.

        Raises:
            RayError: the actor does not answer.
        """
        self._send()
        return list(ray.get(self._hub.joined.remote(), timeout=ANSWER_S))

    def _send(self) -> None:
        with self._lock:
            try:
                if self._hub is None:
                    actor: Any = ray.remote(_Hub)
                    self._hub = actor.options(
                        name=NAME, namespace=NAMESPACE, lifetime="detached", get_if_exists=True, num_cpus=0
                    ).remote()
                families = self._metrics.families()
                ray.get(self._hub.report.remote(self._process, families), timeout=ANSWER_S)
            except (RayError, ValueError):  # it died, or is just being made by another process
                self._hub = None
                raise
            self._ray.show(families)

    def _run(self) -> None:
        failed, stopping = 0, False
        while not stopping:
            stopping = self._stop.wait(REPORT_EVERY_S)
            try:
                self._send()
                failed = 0
            except (RayError, ValueError) as error:
                failed += 1
                if failed == WARN_AFTER or stopping:
                    logger.warning("metrics of other processes cannot be joined: %s", type(error).__name__)


class _RayMetrics:
    """The same numbers through ray.util.metrics."""

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._shown: dict[tuple[str, Labels], float] = {}
        self._last: set[tuple[str, Labels]] = set()

    def show(self, families: Sequence[Family]) -> None:
        """What is not there any more, such as the version before this one, becomes 0: Ray goes on showing what it was told."""
        now = {(name, labels) for one in families if one.kind == "gauge" for name, labels, _ in one.samples}
        for name, labels in self._last - now:
            self._gauges[name].set(0.0, dict(labels))
        self._last = now
        for family in families:
            for name, labels, value in family.samples:
                if name.endswith("_bucket"):
                    continue
                keys = tuple(key for key, _ in labels)
                if family.kind == "gauge":
                    if name not in self._gauges:
                        self._gauges[name] = Gauge(name, family.text, keys)
                    self._gauges[name].set(value, dict(labels))
                    continue
                if name not in self._counters:
                    self._counters[name] = Counter(name.removesuffix("_total"), family.text, keys)
                more = value - self._shown.get((name, labels), 0.0)
                if more > 0:
                    self._counters[name].inc(more, dict(labels))
                    self._shown[name, labels] = value


def add_metrics_routes(app: FastAPI, metrics: Metrics, *, path: str = "/metrics") -> None:
    """`path` answers for all processes where a `Reporter` runs, and 503 while the actor is away: counters of this process alone
    would look like a fall, and the next ones like a leap. Without a Reporter it answers for this process."""

    @app.get(path, response_class=PlainTextResponse, responses={503: {"model": Problem}})
    def read_metrics() -> Response:
        """Metrics of all replicas, in Prometheus' text format."""
        try:
            families = metrics.joined()
        except (RayError, ValueError) as error:
            logger.warning("%s cannot join the metrics of all processes: %s", path, type(error).__name__)
            raise HTTPException(
                503, "The metrics of all replicas cannot be joined now. Try again.", {"Retry-After": "1"}
            ) from None
        return Response(text_of(families), media_type=CONTENT_TYPE_LATEST)
