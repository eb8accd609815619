"""The files of a row log (row_log.py): segments as Arrow, folded ones as Parquet that names its segments."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mim_ray import artifacts
from mim_ray.errors import ArtifactError

SEGMENT = "segment_id"  # column of a folded file
MAX_FOLDED_BYTES = 64 * 2**20  # in one Parquet file, about
READ_AT_ONCE = 64
_MARK = b"mim_ray.segments"


def read_in_pieces(uris: Mapping[str, str]) -> Iterator[tuple[dict[str, pa.Table], dict[str, ArtifactError]]]:
    """All of them, in pieces of about MAX_FOLDED_BYTES."""
    names, num_bytes = list(uris), 0
    found: dict[str, pa.Table] = {}
    damaged: dict[str, ArtifactError] = {}
    for start in range(0, len(names), READ_AT_ONCE):
        some, bad = read_segments({name: uris[name] for name in names[start : start + READ_AT_ONCE]})
        found |= some
        damaged |= bad
        num_bytes += sum(rows.nbytes for rows in some.values())
        if num_bytes >= MAX_FOLDED_BYTES:
            yield found, damaged
            found, damaged, num_bytes = {}, {}, 0
    yield found, damaged


def read_segments(uris: Mapping[str, str]) -> tuple[dict[str, pa.Table], dict[str, ArtifactError]]:
    """(rows by id, errors of damaged ones by id). What another process folded and deleted by now is in neither."""
    found: dict[str, pa.Table] = {}
    damaged: dict[str, ArtifactError] = {}
    for name, result in zip(uris, artifacts.for_each(_read_or_error, list(uris.values())), strict=True):
        if isinstance(result, pa.Table):
            found[name] = result
        elif result is not None:
            damaged[name] = result
    return found, damaged


def _read_or_error(uri: str) -> pa.Table | ArtifactError | None:
    try:
        content = artifacts.read_bytes(uri)
    except ArtifactError as error:
        return error if artifacts.exists(uri) else None
    try:
        return pa.ipc.open_file(pa.BufferReader(content)).read_all()
    except pa.ArrowInvalid as error:
        return ArtifactError(f"{uri} is damaged ({error}). Move it out of the folder; its rows are lost.")


def read_folded(uri: str) -> tuple[pa.Table, set[str]]:
    """Rows of a Parquet file, and the segments that it holds."""
    try:
        rows = pq.read_table(pa.BufferReader(artifacts.read_bytes(uri)))
    except pa.ArrowInvalid as error:
        raise ArtifactError(
            f"{uri} is damaged ({error}). Move it out of the folder, and bring it back from a copy."
        ) from None
    return rows.replace_schema_metadata(None), set(json.loads(rows.schema.metadata[_MARK]))


def segments_of(uri: str) -> set[str]:
    fs, path = artifacts.filesystem(uri)
    try:
        metadata = pq.read_metadata(path, filesystem=fs).metadata
    except pa.ArrowInvalid as error:
        raise ArtifactError(
            f"{uri} is damaged ({error}). Move it out of the folder, and bring it back from a copy."
        ) from None
    return set(json.loads(metadata[_MARK]))


def only_segments(rows: pa.Table, names: set[str], wanted: set[str]) -> pa.Table:
    if wanted == names:
        return rows
    return rows.filter(pc.is_in(rows[SEGMENT], pa.array(sorted(wanted))))


def with_segment(rows: pa.Table, name: str) -> pa.Table:
    return rows.append_column(SEGMENT, pa.repeat(pa.scalar(name), rows.num_rows))


def write_folded(folder: str, segments: Mapping[str, pa.Table]) -> int:
    """One Parquet file with these segments, durable when this returns; its number of rows."""
    names = sorted(segments)
    rows = pa.concat_tables([with_segment(segments[name], name) for name in names])
    sink = pa.BufferOutputStream()
    pq.write_table(rows.replace_schema_metadata({_MARK: json.dumps(names).encode()}), sink, compression="zstd")
    digest = hashlib.sha256(",".join(names).encode()).hexdigest()[:12]
    uri = f"{folder}/{names[0]}-{digest}.parquet"
    artifacts.write_bytes(uri, sink.getvalue().to_pybytes())
    path = artifacts.local_path(uri)
    if path is not None:
        for parent in list(path.parents)[:3]:  # the folders' own names too
            artifacts.sync(parent)
    return rows.num_rows
