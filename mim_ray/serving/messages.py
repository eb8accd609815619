"""What the HTTP endpoints take and give, with the examples that the OpenAPI pages show.

Everything that a caller sends is checked here for form: ids are short and not blank, base64 is base64, lists are not
too long to be meant. What depends on the scenario (candidates per request, bytes, pixels) is in limits.py.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

MAX_ID_CHARS = 256
MAX_BEHAVIORS = 10_000
MAX_ITEMS_PER_REQUEST = 256


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("an id must not be blank")
    if "\0" in value:
        raise ValueError("an id must not hold a NUL character")
    return value


def _decode_base64(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value
    if text.startswith("data:"):  # what browsers give: data:image/png;base64,....
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters outside ASCII
        raise ValueError("this is no base64 text; encode the image file's bytes with base64") from None


Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS), AfterValidator(_not_blank)]
Base64Bytes = Annotated[bytes, BeforeValidator(_decode_base64, json_schema_input_type=str)]


class Message(BaseModel):
    """Unknown keys are refused, so that a misspelt one is noticed."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class RankRequest(Message):
    """Candidates to rank for a user."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"user_id": "u17", "candidates": ["i3", "i1", "i2"], "top_k": 2}]}
    )

    user_id: Id
    candidates: Annotated[list[Id], Field(min_length=1)]
    """Item ids; one that is given twice is ranked once."""
    behaviors: Annotated[list[Id], Field(max_length=MAX_BEHAVIORS)] | None = None
    """Ids of the user's past items, oldest first. Default: those in the behavior store."""
    behavior_times: Annotated[list[AwareDatetime], Field(max_length=MAX_BEHAVIORS)] | None = None
    """When each of `behaviors` happened, with a time zone. Behaviors from `timestamp` on are left out, the others are
    sorted by time. Default: not known."""
    timestamp: AwareDatetime | None = None
    """When the user asked, with a time zone. Default: now."""
    context: dict[str, Any] = {}
    """Values of the model's declared features, equal for all candidates: {"device": "phone"}. Those that are left out, or are
    null, have the model's default and are named in the answer."""
    item_context: dict[str, list[Any]] = {}
    """The same for features that differ between candidates: a list with one value for each of `candidates`."""
    query_text: Annotated[str, Field(min_length=1, max_length=100_000)] | None = None
    """What the user searched with, for a model that was trained with queries: a text,"""
    query_image: Base64Bytes | None = None
    """or the bytes of a picture (JPEG, PNG, WebP or GIF), as base64. With both the picture is the query, as in training."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Answer with this many items only. Default: all."""
    explain: bool = False
    """Say for each item in the answer which past items drove its score."""

    @model_validator(mode="after")
    def _times_of_behaviors(self) -> RankRequest:
        if self.behavior_times is not None and len(self.behavior_times) != len(self.behaviors or ()):
            raise ValueError(
                f"behavior_times holds {len(self.behavior_times):,} times for {len(self.behaviors or ()):,} behaviors; "
                "send one for each of behaviors, in the same order"
            )
        return self


class Reason(Message):
    """One past item behind a score."""

    item_id: str
    id_relevance: float | None
    """How much the model's attention looks at it for this candidate; null where the model has no attention."""
    content_relevance: float | None
    """Cosine of the two items' MM embeddings; null for a model without content, 0 where one of them has none."""


class RankedItem(Message):
    """One candidate with its click probability."""

    item_id: str
    prob: float
    """Click probability in [0, 1]."""
    unknown_item: bool = False
    """The CTR model has no ID embedding of its own for the item: it is too new (or no item of this shop)."""
    no_content: bool = False
    """No MM embedding is known: the item was scored without content."""
    reasons: list[Reason] | None = None
    """With `explain`: the past items with the largest relevance of either kind, the larger first."""


class RankResponse(Message):
    """Candidates by falling click probability; equal ones keep the order of the request."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "request_id": "6f2d8f5c7c1e4a0f9b0e4a3f4c0d2b11",
                    "items": [
                        {"item_id": "i1", "prob": 0.31, "unknown_item": False, "no_content": False},
                        {"item_id": "i3", "prob": 0.12, "unknown_item": True, "no_content": False},
                    ],
                    "num_behaviors": 12,
                    "model_version": "sim-mim-3f1c9a0b7d2e",
                    "encoder_version": "csft-0a1b2c3d4e5f",
                }
            ]
        }
    )

    request_id: str
    arm: str | None = None
    """The user's arm of the A/B test; null where there is none, or where the replica cannot serve it now."""
    items: list[RankedItem]
    num_behaviors: int
    """Past items that the ranking looked at."""
    num_future_behaviors: int = 0
    """Behaviors that were left out because they are not from before the request."""
    default_features: list[str] = []
    """Declared features that the request lacked, for one candidate or more: the model's defaults stood for them."""
    degraded: list[str] = []
    """What could not be read in time: "content" (all items were scored as if they had none), "tables" (some items, the user
    or features count as unknown), "query" (scored as if the request had none). Empty for a full answer."""
    release: int | None = None
    """Number of the release that made all of these scores; null where nothing was promoted."""
    model_version: str
    encoder_version: str | None
    """Version of the MM embeddings behind the scores; null for a model without content."""


class NewItem(Message):
    """An item to encode: an image, a title, or both."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"item_id": "i900", "title": "striped blue mug", "image": "iVBORw0KGgo=", "category": "mugs"}]
        }
    )

    item_id: Id
    title: Annotated[str, Field(max_length=100_000)] | None = None
    image: Base64Bytes | None = None
    """Bytes of a JPEG, PNG, WebP or GIF file, as base64."""
    image_url: Annotated[str, Field(max_length=2_048)] | None = None
    """Where the image is to be fetched from, instead of `image`; only below the prefixes that the service is set to fetch from,
    by default none."""
    category: Annotated[str, Field(max_length=MAX_ID_CHARS)] | None = None
    """Several values may be joined by "|"; the first is the category."""
    content_at: AwareDatetime | None = None
    """Catalogue time of this content, with a time zone. Default: the time of the request."""


class NewItemsRequest(Message):
    """One item, or a batch under `items`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"item_id": "i900", "title": "striped blue mug", "image": "iVBORw0KGgo=", "category": "mugs"},
                {
                    "items": [
                        {"item_id": "i901", "title": "plain red mug"},
                        {"item_id": "i902", "image": "iVBORw0KGgo="},
                    ]
                },
            ]
        }
    )

    items: Annotated[list[NewItem], Field(min_length=1, max_length=MAX_ITEMS_PER_REQUEST)]

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Either form, for the OpenAPI page."""
        reference = handler(core)
        schema = handler.resolve_ref_schema(reference)
        batch = {key: schema.pop(key) for key in ("type", "properties", "required", "additionalProperties")}
        schema["anyOf"] = [handler(NewItem.__pydantic_core_schema__), batch]
        return reference

    @model_validator(mode="before")
    @classmethod
    def _one_item(cls, value: Any) -> Any:
        if isinstance(value, dict) and "items" not in value:
            return {"items": [value]}
        return value


class EncodedItem(Message):
    """What became of one new item."""

    item_id: str
    encoder_version: str
    content_hash: str
    changed: bool
    """False: the same content under the same category, or newer content, was already there, and nothing was done."""
    rankable: bool
    """It is on all parameter machines; or there are none, and rankers read it within a fraction of a second. False: not all of
    them have confirmed it in time. It is durable, and they find it by themselves."""


class NewItemsResponse(Message):
    """One entry per item, in the order of the request."""

    items: list[EncodedItem]


class Problem(Message):
    """Why a request was not answered."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"error": "candidates holds 5,000 items; at most 2,000 are ranked at once."}]}
    )

    error: str
    """A sentence: what is wrong, and what to do."""


class Health(Message):
    """The process answers."""

    status: str = "ok"


class Ready(Message):
    """What this replica serves."""

    status: str
    model_version: str | None = None
    encoder_version: str | None = None
    num_items: int | None = None
    """Items whose MM embedding is known."""
    default_features: dict[str, int] = {}
    """Requests since this replica started that lacked a declared feature, by feature; of all arms of an A/B test."""
    degraded: dict[str, int] = {}
    """Answers since this replica started that lacked something, by what; of all arms."""
    release: int | None = None
    """Number of the release that serves; null where nothing was promoted."""
    refused: str | None = None
    """What sort of problem keeps a release that was promoted from being served; null when there is none such."""
    arms_missing: int = 0
    """Arms of the A/B test that this replica cannot serve, and tries again about every minute; their users are in no arm
    meanwhile."""
