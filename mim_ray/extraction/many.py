"""A round of many changes: the extraction pipeline over the chosen rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import pyarrow as pa

from mim_ray import artifacts
from mim_ray.config.scenario import Extraction
from mim_ray.extraction.changes import deletion_rows
from mim_ray.extraction.chosen import Change
from mim_ray.extraction.embed import Encode
from mim_ray.extraction.few import Encoded
from mim_ray.extraction.plan import Slice, Unit
from mim_ray.extraction.read import Decoding
from mim_ray.extraction.run import encode_units
from mim_ray.extraction.write import read_rejects_of
from mim_ray.representation_center.known_content import KnownContent
from mim_ray.representation_center.table import EmbeddingTable


def encode_many(
    changes: Sequence[Change],
    known: KnownContent,
    table: EmbeddingTable,
    *,
    encoder: str,
    encoder_version: str,
    decoding: Decoding,
    settings: Extraction,
    rejects: str,
    load: Callable[[str, bool], Encode],
) -> Encoded:
    """Encode the changes into the table, streaming; a shard that a killed round committed is not made again."""
    identity: list[Any] = [encoder_version, asdict(decoding)]
    units = [_unit(change, settings.shard_rows, identity) for change in changes]
    encode_units(
        units,
        table,
        encoder=encoder,
        encoder_version=encoder_version,
        decoding=decoding,
        settings=settings,
        rejects=rejects,
        load=load,
    )
    shards = [piece.shard_id for unit in units for piece in unit.slices]
    unusable = read_rejects_of(shards, table=table, rejects=rejects, encoder_version=encoder_version)
    rows = list(zip(*(unusable[name].to_pylist() for name in ("key", "reason", "detail")), strict=True))
    empty = pa.array([key for key, reason, _ in rows if reason == "no content"], pa.string())
    state = known.look_up(empty)
    lost = np.asarray(state.hashes.is_valid(), bool)
    return Encoded(
        lost=deletion_rows(empty.filter(pa.array(lost)).to_pylist(), state.content_at[lost]),
        rejects=rows,
        num_encoded=sum(unit.num_rows for unit in units) - len(empty),
    )


def _unit(change: Change, shard_rows: int, identity: list[Any]) -> Unit:
    chosen = change.chosen
    digest = hashlib.blake2b(digest_size=16)
    for array in (chosen.rows, chosen.content_at):
        digest.update(b"all" if array is None else np.ascontiguousarray(array).tobytes())
    content = artifacts.fingerprint(
        "refresh", chosen.source, chosen.shard.first_row, chosen.floor, digest.hexdigest(), shard_rows, identity
    )
    slices = tuple(
        Slice(artifacts.fingerprint(content, start), start, min(start + shard_rows, chosen.num_rows))
        for start in range(0, chosen.num_rows, shard_rows)
    )
    return Unit(cast(Any, chosen), slices, np.empty(0, np.int64))
