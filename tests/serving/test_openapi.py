"""The OpenAPI pages against the apps: schemathesis makes requests from them, good and bad, and compares each answer.

Some 300 requests here; `make chaos` sends ten thousand.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyStrategyDefinition
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

from mim_ray.config.scenario import Serving
from mim_ray.errors import RequestError
from mim_ray.serving.keys import new_key
from mim_ray.serving.limits import guarded
from mim_ray.serving.messages import RankRequest

PAGES = {"ranking": "/openapi.json", "items": "/v1/items/openapi.json"}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
KEY, LINE = new_key("shop", ["rank", "write", "admin"])


@pytest.fixture(scope="module")
def apps(both_apis, tmp_path_factory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(LINE)
    return both_apis(Serving(keys_file=str(path)))


def make_usable(body: Any) -> None:
    """Most strings are no picture, no declared feature and no time: without them requests come through to the models."""
    if not isinstance(body, dict):
        return
    for key in ("context", "item_context", "behavior_times", "timestamp"):
        body.pop(key, None)
    items = body.get("items", [body] if "item_id" in body else [])
    for number, item in enumerate(items if isinstance(items, list) else []):
        if isinstance(item, dict):
            for key in ("image", "image_url", "content_at"):
                item.pop(key, None)
            item.update(item_id=f"made-up-{number}", title="a thing")


def explore(app: Any, page: str, num_requests: int, *, first_seed: int) -> Counter[str]:
    """At least `num_requests` to the operations that take input, about equally many, and a few to the others.

    Returns:
        how many got which status.
    """
    schema = schemathesis.openapi.from_asgi(page, app)
    client = TestClient(app, raise_server_exceptions=False)
    statuses: Counter[str] = Counter()
    failures: list[BaseException] = []
    operations = [found.ok() for found in schema.get_all_operations()]
    with_input = [one for one in operations if one.body or one.path_parameters or one.query]
    for operation in operations:
        strategy = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode))
        num_examples = math.ceil(num_requests / len(with_input)) if operation in with_input else 5
        line = f"{operation.method.upper()} {operation.path}"

        @settings(
            max_examples=num_examples,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(case=strategy, with_key=st.sampled_from([True, True, True, False]), usable=st.booleans())
        def send(case: schemathesis.Case, with_key: bool, usable: bool) -> None:
            if usable:
                make_usable(case.body)
            if with_key:
                case.headers = {**(case.headers or {}), "X-API-Key": KEY}
                case.headers.pop("Authorization", None)
            response = case.call(session=client, base_url="http://testserver")
            statuses[f"{case.method} {case.operation.path} {response.status_code}"] += 1
            try:
                case.validate_response(response, checks=CHECKS)
            except (AssertionError, FailureGroup) as failure:
                failures.append(failure)

        for number in range(
            100
        ):  # schemathesis' strategies of bad requests are not always repeatable, which ends a round
            with contextlib.suppress(FlakyStrategyDefinition):
                seed(first_seed + number)(send)()
            if failures:
                raise failures[0]
            if operation not in with_input or num_sent(statuses, line) >= num_examples:
                break
        assert operation not in with_input or num_sent(statuses, line) >= num_examples
    return statuses


def num_sent(statuses: Counter[str], line: str) -> int:
    return sum(count for key, count in statuses.items() if key.rpartition(" ")[0] == line)


def test_an_answer_that_the_page_does_not_name_is_found():
    app = FastAPI()

    @app.post("/v1/rank")
    def rank(request: RankRequest) -> dict[str, int]:
        raise RequestError("no such thing.", 418)

    with pytest.raises((AssertionError, FailureGroup), match="418"):
        explore(guarded(app, Serving()), "/openapi.json", 20, first_seed=0)


@pytest.mark.parametrize("name", PAGES)
def test_answers_to_made_up_requests_are_as_the_page_says(apps, name):
    statuses = explore(apps[name], PAGES[name], 160, first_seed=0)
    route = {"ranking": "POST /v1/rank", "items": "POST /v1/items"}[name]
    assert {status for status in (200, 401, 422) if statuses[f"{route} {status}"]} == {200, 401, 422}, statuses


@pytest.mark.chaos
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("name", PAGES)
def test_ten_thousand_made_up_requests_find_no_failure(apps, name):
    statuses = explore(apps[name], PAGES[name], 5_000, first_seed=time.time_ns())
    assert statuses.total() >= 5_000


def test_the_page_shows_one_item_and_a_batch(apps):
    schemas = TestClient(apps["items"]).get(PAGES["items"]).json()["components"]["schemas"]
    one, batch = schemas["NewItemsRequest"]["anyOf"]
    assert one["title"] == "NewItem"
    assert batch["required"] == ["items"]


def test_every_endpoint_says_who_may_call_and_how_it_refuses(apps):
    for name, path in PAGES.items():
        page = TestClient(apps[name]).get(path).json()
        assert set(page["components"]["securitySchemes"]) == {"Bearer", "ApiKey"}
        assert "HTTPValidationError" not in page["components"]["schemas"]
        for methods in page["paths"].values():
            for method, operation in methods.items():
                statuses = set(operation["responses"])
                if method == "post":
                    assert {"200", "401", "403", "408", "413", "422", "503"} <= statuses
                    assert operation["security"]
                refusals = [answer for status, answer in operation["responses"].items() if status != "200"]
                for answer in refusals:
                    assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/Problem")
