"""RIM's library half (paper Section 3.5): vectors of new items, durable first, then at once on the parameter machines.

    stored = store_new_items(window, rows, encoder_version="csft-…", push=client.push)   # durable when it returns
    fold(window, table)                                                                    # every window_s, updates.py

`rows` come from `updates.segment_rows`. What the push does not reach, such as a machine that is just restarted, finds the
segment in the window. Killed at any moment: a segment is there whole, with its items acknowledged or not, or not at all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import pyarrow as pa

from mim_ray.representation_center.updates import append_segment

Push: TypeAlias = Callable[[str, str, pa.Table], bool]
"""(encoder version, segment id, rows) -> all machines have them; `ParameterClient.push`."""
logger = logging.getLogger(__name__)


class Stored(NamedTuple):
    """on_machines: all parameter machines have it; None: there are none."""

    segment_id: str
    on_machines: bool | None


def store_new_items(window: str, rows: pa.Table, *, encoder_version: str, push: Push | None = None) -> Stored:
    """Store a message safely, then send it on. After this the items may be acknowledged.

    A push that fails is logged: the machines read the window themselves.

    Raises:
        OSError, ArtifactError: it could not be stored; nothing was sent.
    """
    segment_id = append_segment(window, rows, encoder_version=encoder_version)
    on_machines = None
    if push is not None:
        try:
            on_machines = push(encoder_version, segment_id, rows)
        except Exception:
            on_machines = False
            logger.exception(
                "segment %s was stored but not pushed; parameter machines find it in the window", segment_id
            )
    return Stored(segment_id, on_machines)
