import numpy as np
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from mim_ray.config.scenario import Serving
from mim_ray.errors import RequestError
from mim_ray.serving import metrics_hub
from mim_ray.serving.limits import guarded
from mim_ray.serving.metrics import Metrics, Versions, counted
from mim_ray.serving.metrics_hub import Reports, add_metrics_routes, text_of
from mim_ray.serving.ranker import RankingService
from mim_ray.serving.ranking_app import ranking_api
from mim_ray.serving.served import Served


def values(text: str) -> dict[tuple, float]:
    """(sample name, label values in the order of their names) -> value."""
    return {
        (sample.name, *(sample.labels[key] for key in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def service(small_run):
    service = RankingService.open(Served.of(small_run.scenario), small_run.scenario.serving)
    yield service
    service.embeddings.stop()


def test_a_ranking_is_counted_by_route_status_stage_and_what_it_lacked(service, small_run):
    client = TestClient(ranking_api(service, small_run.scenario.serving), raise_server_exceptions=False)
    for candidates in (["i1", "i2", "i35", "secret-item"], ["i3"]):
        assert client.post("/v1/rank", json={"user_id": "secret-user", "candidates": candidates}).status_code == 200
    assert client.post("/v1/rank", json={"user_id": "secret-user"}).status_code == 422
    assert client.post("/v1/rank", content=b"x" * 13_000_000).status_code == 413
    assert client.get("/secret/path").status_code == 404
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = values(answer.text)
    assert found["mim_ray_requests_total", "ranking", "/v1/rank", "2xx"] == 2
    assert found["mim_ray_requests_total", "ranking", "/v1/rank", "4xx"] == 2
    assert found["mim_ray_requests_total", "ranking", "other", "4xx"] == 1
    for stage in ("parse", "lookup", "network"):
        assert found["mim_ray_request_seconds_count", "/v1/rank", stage] == 2
    assert found["mim_ray_request_seconds_count", "/v1/rank", "total"] == 4
    spent = [
        found["mim_ray_request_seconds_sum", "/v1/rank", stage] for stage in ("parse", "lookup", "network", "total")
    ]
    assert 0 < sum(spent[:3]) <= spent[3]
    assert found["mim_ray_candidates_total",] == 5
    assert found["mim_ray_unknown_items_total",] == 2, "i35 has no ID embedding, secret-item nothing"
    assert found["mim_ray_items_without_content_total",] == 1
    assert found["mim_ray_embedding_norm_count",] == 3, "of the first answer: one in eight is looked at"
    assert found["mim_ray_embedding_norm_sum",] == pytest.approx(3, abs=0.01)
    assert found["mim_ray_embedding_cosine_count",] == 2
    assert found["mim_ray_ongoing_requests", "ranking"] == 1, "the one that reads the metrics"
    assert 0 <= found["mim_ray_freshness_seconds", "ranking"] < 60
    version = ("ranking", service.model.encoder_version, service.model_version, "")
    assert found["mim_ray_version_info", *version] == 1
    assert "secret" not in answer.text, "no user, item or path of a stranger in labels"


def test_embedding_health_is_the_mean_length_and_the_mean_cosine_of_neighbors():
    metrics = Metrics("ranking")
    metrics.embeddings(np.array([[3.0, 0], [0, 4], [0, 2], [0, 0], [1, 0]], np.float32))
    metrics.embeddings(np.array([[np.nan, 0]], np.float32))
    metrics.embeddings(np.zeros((0, 2), np.float32))
    found = values(text_of(metrics.families()).decode())
    assert (found["mim_ray_embedding_norm_sum",], found["mim_ray_embedding_norm_count",]) == (10, 5)
    assert (found["mim_ray_embedding_cosine_sum",], found["mim_ray_embedding_cosine_count",]) == (1, 2)


def test_default_features_degraded_answers_and_encoded_items_are_counted():
    metrics = Metrics("ranking")
    metrics.ranked(candidates=1, unknown=0, without_content=0, default_features=["device", "hour"])
    metrics.ranked(candidates=1, unknown=0, without_content=0, default_features=["device"], degraded=("content",))
    metrics.encoded(changed=2, unchanged=3)
    found = values(text_of(metrics.families()).decode())
    assert (found["mim_ray_default_features_total", "device"], found["mim_ray_default_features_total", "hour"]) == (
        2,
        1,
    )
    assert found["mim_ray_degraded_answers_total", "content"] == 1
    assert (found["mim_ray_encoded_items_total",], found["mim_ray_unchanged_items_total",]) == (2, 3)


def test_versions_are_those_of_now_and_what_is_not_known_has_no_sample():
    now, store = [Versions("m1", "e1", 1)], [None]
    metrics = Metrics("ranking", lambda: now[0])
    metrics.watch_embeddings(lambda: store[0])
    found = values(text_of(metrics.families()).decode())
    assert found["mim_ray_version_info", "ranking", "e1", "m1", "1"] == 1
    assert ("mim_ray_freshness_seconds", "ranking") not in found
    now[0] = Versions("m2", "e2", 2)
    text = text_of(metrics.families()).decode()
    assert values(text)["mim_ray_version_info", "ranking", "e2", "m2", "2"] == 1
    assert "m1" not in text


def test_failures_and_refusals_are_counted_as_what_the_caller_saw():
    app, metrics = FastAPI(), Metrics("ranking")

    @app.get("/fails/{how}")
    def fails(how: str) -> None:
        raise {"request": RequestError("no", 404)}.get(how, RuntimeError("bad"))

    client = TestClient(counted(guarded(app, Serving()), app, metrics), raise_server_exceptions=False)
    assert [client.get(f"/fails/{how}").status_code for how in ("request", "ours")] == [404, 500]
    found = values(text_of(metrics.families()).decode())
    assert found["mim_ray_requests_total", "ranking", "/fails/{how}", "4xx"] == 1
    assert found["mim_ray_requests_total", "ranking", "/fails/{how}", "5xx"] == 1
    assert found["mim_ray_ongoing_requests", "ranking"] == 0


def one(app: str, requests: int, freshness: float) -> Metrics:
    metrics = Metrics(app, lambda: Versions(encoder="v1"), capacity=8)
    metrics.watch("mim_ray_freshness_seconds", lambda: freshness)
    metrics.watch("mim_ray_index_recall", lambda: freshness)
    for _ in range(requests):
        with metrics.request("/v1/rank") as outcome:
            outcome["status"] = "2xx"
    return metrics


def test_reports_of_several_processes_are_summed_and_gauges_joined_by_their_kind():
    reports = Reports()
    reports.report("a", one("ranking", 3, 0.5).families(), at=100.0)
    reports.report("b", one("ranking", 4, 2.5).families(), at=100.5)
    reports.report("c", one("new_item_encoder", 5, 1.0).families(), at=100.5)
    found = values(text_of(reports.joined(101.0)).decode())
    assert found["mim_ray_requests_total", "ranking", "/v1/rank", "2xx"] == 7
    assert found["mim_ray_requests_total", "new_item_encoder", "/v1/rank", "2xx"] == 5
    assert found["mim_ray_request_seconds_count", "/v1/rank", "total"] == 12
    assert found["mim_ray_request_seconds_bucket", "+Inf", "/v1/rank", "total"] == 12
    assert found["mim_ray_version_info", "ranking", "v1", "", ""] == 2
    assert found["mim_ray_request_capacity", "ranking"] == 16
    assert found["mim_ray_freshness_seconds", "ranking"] == 2.5, "the worst"
    assert found["mim_ray_index_recall", "ranking"] == 1.5, "the mean"


def test_a_report_replaces_the_one_before_of_the_same_process():
    reports = Reports()
    for num in (3, 5):
        reports.report("a", one("ranking", num, 0.5).families(), at=100.0 + num)
    assert values(text_of(reports.joined(105.0)).decode())["mim_ray_requests_total", "ranking", "/v1/rank", "2xx"] == 5


def test_a_dead_process_keeps_its_counts_in_the_sums_and_leaves_the_gauges(monkeypatch):
    monkeypatch.setattr(metrics_hub, "MAX_DEAD", 3)
    reports = Reports()
    alive = one("ranking", 2, 0.1)
    for number in range(10):
        reports.report(f"dead-{number}", one("ranking", 1, 9.0).families(), at=100.0 + number / 100)
        reports.report("alive", alive.families(), at=100.0 + number / 100)
    later = 101.0 + metrics_hub.SILENT_S
    reports.report("alive", alive.families(), at=later)
    found = values(text_of(reports.joined(later)).decode())
    assert len(reports._last) == 3, "what the others counted is kept as a sum"
    assert found["mim_ray_requests_total", "ranking", "/v1/rank", "2xx"] == 12
    assert found["mim_ray_freshness_seconds", "ranking"] == 0.1
    assert found["mim_ray_version_info", "ranking", "v1", "", ""] == 1


def test_metrics_of_one_process_never_stand_for_those_of_all():
    app, metrics = FastAPI(), one("ranking", 2, 0.5)
    add_metrics_routes(app, metrics)
    found = values(TestClient(app).get("/metrics").text)
    assert found["mim_ray_requests_total", "ranking", "/v1/rank", "2xx"] == 2, "without Ray there is one"

    def gone():
        raise ValueError("no such actor")

    metrics.joined = gone
    answer = TestClient(app).get("/metrics")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1"), "a counter would fall, and leap later"


def test_ray_is_told_that_a_version_is_not_served_any_more(monkeypatch):
    told = {}

    class Told:
        def __init__(self, name, *_):
            self.name = name

        def set(self, value, labels):
            told[self.name, labels.get("release")] = value

        def inc(self, *_):
            pass

    monkeypatch.setattr(metrics_hub, "Gauge", Told)
    monkeypatch.setattr(metrics_hub, "Counter", Told)
    release = [1]
    metrics, ray_metrics = Metrics("ranking", lambda: Versions("m", "e", release[0])), metrics_hub._RayMetrics()
    for number in (1, 2, 1):
        release[0] = number
        ray_metrics.show(metrics.families())
        assert told["mim_ray_version_info", str(number)] == 1
        assert told.get(("mim_ray_version_info", str(3 - number)), 0) == 0
