"""The OpenAPI page of an app with what the guard adds to every endpoint: keys, and the answers to what it refuses."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from mim_ray.serving.keys import OPEN, PAGE, needed_scope
from mim_ray.serving.messages import Problem

_REFUSALS = {
    "401": "No API key, or one that is not known, where keys are set.",
    "403": "The API key lacks the scope; or the caller is on another machine, where no keys are set.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "422": "The request is not as described here.",
    "503": "The tables or models behind this endpoint cannot be used now, or the queue is full: Retry-After says when to try again.",
}
_WITH_BODY = ("408", "413", "422")
_SCHEMES = {
    "Bearer": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer KEY"},
    "ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def document(app: FastAPI) -> None:
    """Let the page of `app` name them; routes that come later are included."""
    plain = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema is None:
            page = plain()
            parts = page.setdefault("components", {})
            schemas = parts.setdefault("schemas", {})
            schemas.setdefault("Problem", Problem.model_json_schema())
            parts["securitySchemes"] = _SCHEMES
            for path, methods in page.get("paths", {}).items():
                for operation in methods.values():
                    _complete(operation, needed_scope(path))
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            app.openapi_schema = page
        return app.openapi_schema

    app.openapi = complete  # type: ignore[method-assign]


def _complete(operation: dict[str, Any], scope: str) -> None:
    has_input = "requestBody" in operation or bool(operation.get("parameters"))
    answers = operation["responses"]
    for status, description in _REFUSALS.items():
        if (status == "401" and scope in (OPEN, PAGE)) or (status in _WITH_BODY and not has_input):
            continue
        found = answers.setdefault(status, {})
        found["description"] = description
        found["content"] = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    if scope not in (OPEN, PAGE):
        operation["security"] = [{"Bearer": []}, {"ApiKey": []}]
        operation["description"] = (
            f"{operation.get('description', '')}\n\nNeeds a key with the scope `{scope}`, where keys are set."
        )
