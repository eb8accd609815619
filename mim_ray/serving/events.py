"""POST /v1/events: clicks, purchases and revenue as they happen. Acknowledged means durable; the next ranking sees them.

    add_event_routes(app, live)                       # live_behaviors.py: what rankers know of users
    read_events(center, since=yesterday)              # each event once, as it was acknowledged
    interactions(rows)                                # as rows of the table that jobs/build_samples.py reads

Id, user, item and event together say which event it is (`identities`): readers drop a row of which all four came before. The id
alone does not: two callers may both number theirs from 1. It is the caller's `event_id`; else, with an Idempotency-Key, a hash of
the key, the event and its place in the request, so that the same post gives the same ids and the same answer on any replica at
any time, without asking what was stored; else a random one.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from fastapi import FastAPI, Header
from pydantic import AfterValidator, AwareDatetime, ConfigDict, Field, model_validator

from mim_ray.data.schema import INTERACTIONS, TIME
from mim_ray.errors import RequestError
from mim_ray.serving.messages import Id, Message, Problem
from mim_ray.serving.row_log import RowLog
from mim_ray.serving.row_log_files import SEGMENT

MAX_EVENTS_PER_REQUEST = 1_000
MAX_CLOCK_SKEW = timedelta(minutes=5)
REMEMBERED = timedelta(days=1)  # an event that is posted again within this time counts once in what is exported
_EARLIEST = datetime(1970, 1, 2, tzinfo=UTC)
SCHEMA = pa.schema(
    [
        ("event_id", pa.string()),
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("event", pa.string()),
        ("timestamp", TIME),
        ("request_id", pa.string()),
        ("revenue", pa.float64()),
        ("rating", pa.float64()),
    ]
)
IDENTITY = ["event_id", "user_id", "item_id", "event"]
"""Columns that say together which event a row is; none of them holds a NUL."""
Number = Annotated[float, Field(allow_inf_nan=False)]


def _printable(value: str) -> str:
    if not value.isprintable() or not value.strip():
        raise ValueError("this must be a word of printable characters")
    return value


class Event(Message):
    """Something that a user did with an item."""

    user_id: Id
    item_id: Id
    event: Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_printable)]
    """What the user did: click, purchase, or any other word. Those of samples.positive_events build the user's behaviors."""
    timestamp: AwareDatetime | None = None
    """When it happened, with a time zone. Default: now. Up to 5 minutes ahead (clocks differ) it is stored as now."""
    request_id: Id | None = None
    """The answer of /v1/rank that showed the item: clicks and revenue of experiments are counted by it."""
    revenue: Number | None = None
    """What it earned; negative for a refund."""
    rating: Number | None = None
    event_id: Id | None = None
    """The caller's own id of this event: posted again with the same user, item and event, it counts once."""


class EventsRequest(Message):
    """One event, or a batch under `events`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": "u17", "item_id": "i3", "event": "click", "request_id": "6f2d8f5c7c1e4a0f9b0e4a3f4c0d2b11"},
                {"events": [{"user_id": "u17", "item_id": "i3", "event": "purchase", "revenue": 12.5}]},
            ]
        }
    )

    events: Annotated[list[Event], Field(min_length=1, max_length=MAX_EVENTS_PER_REQUEST)]

    @model_validator(mode="before")
    @classmethod
    def _one_event(cls, value: Any) -> Any:
        if isinstance(value, dict) and "events" not in value:
            return {"events": [value]}
        return value


class EventsResponse(Message):
    """The events are safely stored."""

    num_events: int
    event_ids: list[str]
    """One for each event, in the order of the request. The same post with the same Idempotency-Key gets the same ones."""


class EventStore(Protocol):
    """What the route needs: store rows of SCHEMA durably, each event once."""

    def store(self, rows: pa.Table) -> None: ...


def add_event_routes(app: FastAPI, store: EventStore) -> None:
    """POST /v1/events of an app."""
    problems: dict[int | str, dict[str, Any]] = {status: {"model": Problem} for status in (400, 413, 422, 503)}

    @app.post("/v1/events", responses=problems)
    def events(
        request: EventsRequest,
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=256)] = None,
    ) -> EventsResponse:
        """Store one event, or a batch under `events`. Answers when they are durable; posted again with the same
        Idempotency-Key, or with the same event ids, they count once and the answer is the same."""
        rows = event_rows(request.events, idempotency_key, datetime.now(UTC))
        store.store(rows)
        return EventsResponse(num_events=rows.num_rows, event_ids=rows["event_id"].to_pylist())


def event_rows(events: Sequence[Event], idempotency_key: str | None, now: datetime) -> pa.Table:
    """Events as rows of SCHEMA.

    Raises:
        RequestError: (422) a time that cannot be, or an event twice.
    """
    rows = []
    for place, event in enumerate(events):
        at = now if event.timestamp is None else event.timestamp
        if at > now + MAX_CLOCK_SKEW:
            raise RequestError(f"events[{place}].timestamp lies in the future. Send the time when it happened.", 422)
        if at < _EARLIEST:
            raise RequestError(f"events[{place}].timestamp is before 1970. Send the time when it happened.", 422)
        known = event.model_dump(exclude={"event_id", "timestamp"})
        rows.append({**known, "event_id": _event_id(event, idempotency_key, place), "timestamp": min(at, now)})
    table = pa.Table.from_pylist(rows, SCHEMA)
    if pc.count_distinct(identities(table)).as_py() < len(rows):
        same = "with the same user, item and event"
        raise RequestError(f"An event_id occurs twice in this request {same}. Send each event once.", 422)
    return table


def event_log(center: str) -> RowLog:
    """The log of events below a representation center."""
    return RowLog(f"{center}/events", SCHEMA)


def read_events(center: str, since: datetime | None = None, until: datetime | None = None) -> pa.Table:
    """The events that were received from `since` to before `until`, each once, in the order of receipt.

    Raises:
        ArtifactError: a file is damaged.
    """
    return without_repeated(event_log(center).read(since, until).drop([SEGMENT]))


def identities(rows: pa.Table) -> pa.ChunkedArray:
    """(n,) string: which event each row is. Two rows of one event, sent again, have the same; two events never have."""
    return pc.binary_join_element_wise(*(rows[name] for name in IDENTITY), "\0", null_handling="replace")


def without_repeated(rows: pa.Table) -> pa.Table:
    """Of rows of the same event the first."""
    numbered = rows.select(IDENTITY).append_column("row", pa.array(np.arange(rows.num_rows)))
    first = numbered.group_by(IDENTITY).aggregate([("row", "min")])["row_min"]
    return rows if len(first) == rows.num_rows else rows.take(first.combine_chunks().sort())


def interactions(rows: pa.Table) -> pa.Table:
    """Events as rows of the table `interactions`. The request that showed an item becomes the impression id."""
    columns = {"impression_id": rows["request_id"]}
    columns |= {name: rows[name] for name in ("user_id", "item_id", "event", "rating", "timestamp", "revenue")}
    return pa.table({name: columns[name] for name in INTERACTIONS.schema.names if name in columns})


def _event_id(event: Event, idempotency_key: str | None, place: int) -> str:
    if event.event_id is not None:
        return event.event_id
    if idempotency_key is None:
        return uuid.uuid4().hex
    told = event.model_dump_json(exclude_none=True)
    return hashlib.blake2b(json.dumps([idempotency_key, place, told]).encode(), digest_size=16).hexdigest()
