"""MFM's reading side (paper Section 3.5): the current embeddings as an immutable memory-mapped matrix with its keys.

    write_snapshot(uri, ids, matrix, encoder_version="csft-…", delta_version=7)
    snapshot = Snapshot.open(uri)
    rows = snapshot.lookup(ids)          # (n,) int64, -1 unknown; hash once, reuse the row numbers
    vectors = snapshot.gather(rows)      # rows.shape + (D,) float32, zeros for -1

Layout of the folder `uri`:

    manifest.json          what is shown (encoder version, Delta version, rows, width, dtype), files, sizes, checksums
    data-<id>/hashes.bin   (N,) uint64 ascending          offsets.bin  (N + 1,) int64       keys.bin  ids in UTF-8
              matrix.bin   (N, D) float32 or float16      content_at.bin  (N,) int64, microseconds, only from the table

A new state is built in a new data folder beside the old one; replacing manifest.json (one rename, or one object PUT)
switches to it. Who has the old one mapped keeps it; it stays on disk until the next but one is built.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mim_ray import artifacts
from mim_ray.data.ids import Ids
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.key_index import KeyIndex, build_key_index

FORMAT = 1
DTYPES = {"float32": np.float32, "float16": np.float16}
NO_TIME = np.iinfo(np.int64).min  # content_at of a row whose content has no time: older than everything


class Snapshot:
    """An open snapshot. All arrays are memory mapped: opening is cheap, processes of one machine share the pages."""

    def __init__(self, uri: str, manifest: dict[str, Any], folder: Path) -> None:
        """Use `Snapshot.open`."""
        self.uri = uri
        self.encoder_version: str = manifest["encoder_version"]
        self.delta_version: int = manifest["delta_version"]
        self.width: int = manifest["width"]
        self.dtype: str = manifest["dtype"]
        self.num_rows: int = manifest["rows"]
        self._index = KeyIndex(
            _map(folder / "hashes.bin", np.uint64, (self.num_rows,)),
            _map(folder / "offsets.bin", np.int64, (self.num_rows + 1,)),
            _map(folder / "keys.bin", np.uint8, (manifest["files"]["keys.bin"]["bytes"],)),
        )
        self.matrix = _map(folder / "matrix.bin", DTYPES[self.dtype], (self.num_rows, self.width))
        """(N, D) memory-mapped rows in the stored dtype."""
        has_times = "content_at.bin" in manifest["files"]
        self.content_at: np.ndarray | None = (
            _map(folder / "content_at.bin", np.int64, (self.num_rows,)) if has_times else None
        )
        """(N,) int64 microseconds of each row's content, or None where the snapshot was written without."""

    @classmethod
    def open(cls, uri: str, *, verify: bool = True) -> Snapshot:
        """Map the snapshot at `uri` (a remote one is downloaded to a local cache first).

        Args:
            verify: compare checksums, which reads every byte once; sizes are always compared.

        Raises:
            ArtifactError: missing, incomplete or damaged.
        """
        manifest = _read_manifest(uri)
        try:
            folder = artifacts.local_copy(f"{uri}/{manifest['data']}")
            _check_files(uri, folder, manifest, verify=verify)
        except (ArtifactError, FileNotFoundError):
            newer = _read_manifest(uri)
            if newer["data"] == manifest["data"]:
                raise
            return cls.open(uri, verify=verify)  # it was replaced between the two reads
        return cls(uri, manifest, folder)

    @property
    def ids(self) -> pa.LargeStringArray:
        """(N,) item ids in row order."""
        return self._index.ids

    def lookup(self, ids: Ids) -> np.ndarray:
        """(n,) int64 row of each id, -1 where unknown or null. Exact: the ids are compared, not only their hashes."""
        return self._index.find(ids)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of row numbers of any shape: rows.shape + (D,) float32; zeros where the row is -1."""
        flat = np.asarray(rows, np.int64).ravel()
        unknown = flat < 0
        if self.num_rows == 0 or unknown.all():
            result = np.zeros((len(flat), self.width), np.float32)
        else:
            result = np.take(self.matrix, np.where(unknown, 0, flat), axis=0).astype(np.float32, copy=False)
            result[unknown] = 0.0
        return result.reshape((*np.shape(rows), self.width))


def write_snapshot(
    uri: str,
    ids: Ids,
    matrix: np.ndarray | Iterable[np.ndarray],
    *,
    encoder_version: str,
    delta_version: int = -1,
    width: int | None = None,
    dtype: str = "float32",
    content_at: np.ndarray | None = None,
) -> None:
    """Build a snapshot and switch `uri` to it. One writer at a time.

    Args:
        ids: (N,) item ids, each once, in any order.
        matrix: (N, D) in the order of the ids, whole or as batches of rows that follow each other (so that the embeddings
            need not be in memory together; `width` is needed then).
        encoder_version: the encoder that made the vectors. delta_version: the table's version shown, -1 if no table.
        content_at: (N,) int64 microseconds; `snapshot.NO_TIME` for unknown.

    Raises:
        ArtifactError: an id null or there twice, rows of another number or width, or a value that is not finite.
    """
    try:
        index, order = build_key_index(ids)
    except ValueError as error:
        raise ArtifactError(f"Snapshot {uri}: {error}. Each item needs one row.") from None
    batches: Iterable[np.ndarray] = [matrix] if isinstance(matrix, np.ndarray) else matrix
    if width is None:
        if not isinstance(matrix, np.ndarray):
            raise ArtifactError(f"Snapshot {uri}: `width` is missing, which batches of rows need.")
        width = matrix.shape[1]
    local = artifacts.local_path(uri)
    parent = local if local is not None else None
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=parent))
    try:
        _write_array(building / "hashes.bin", index.hashes.astype(np.uint64, copy=False))
        _write_array(building / "offsets.bin", index.offsets)
        _write_array(building / "keys.bin", index.key_bytes)
        if content_at is not None:
            _write_array(building / "content_at.bin", np.asarray(content_at, np.int64)[order])
        target = np.empty(len(order), np.int64)
        target[order] = np.arange(len(order))
        _write_matrix(building / "matrix.bin", batches, target, width, DTYPES[dtype], uri)
        manifest = {
            "format": FORMAT,
            "encoder_version": encoder_version,
            "delta_version": int(delta_version),
            "rows": len(order),
            "width": width,
            "dtype": dtype,
            "created_at": artifacts.now(),
            "data": f"data-{uuid.uuid4().hex[:12]}",
            "files": {path.name: _describe(path) for path in sorted(building.iterdir())},
        }
        _publish(uri, building, manifest)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _read_manifest(uri: str) -> dict[str, Any]:
    manifest = artifacts.read_json(f"{uri}/manifest.json")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise ArtifactError(f"{uri}/manifest.json has format {found!r}, this version reads {FORMAT}. Build it again.")
    return manifest


def _check_files(uri: str, folder: Path, manifest: dict[str, Any], *, verify: bool) -> None:
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"Snapshot {uri} is damaged: {path} is missing. Build it again from the table.")
        found = _describe(path) if verify else {"bytes": path.stat().st_size}
        wrong = [key for key, value in found.items() if value != expected[key]]
        if wrong:
            raise ArtifactError(
                f"Snapshot {uri} is damaged: {path} has {wrong[0]} {found[wrong[0]]}, its manifest says "
                f"{expected[wrong[0]]}. Build it again from the table."
            )


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return {"bytes": path.stat().st_size, "checksum": digest}


def _map(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    if 0 in shape:
        return np.empty(shape, dtype)
    # A plain array over the mapping: np.memmap's own subclass makes every gather slower.
    return np.asarray(np.memmap(path, dtype, mode="r", shape=shape))


def _write_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.ascontiguousarray(array).tofile(file)
        file.flush()
        os.fsync(file.fileno())


def _write_matrix(
    path: Path, batches: Iterable[np.ndarray], target: np.ndarray, width: int, dtype: Any, uri: str
) -> None:
    """Write row i of the joined batches to row target[i]."""
    done = 0
    if not len(target):
        path.touch()
        return
    out = np.memmap(path, dtype, mode="w+", shape=(len(target), width))
    for batch in batches:
        if batch.ndim != 2 or batch.shape[1] != width or done + len(batch) > len(target):
            raise ArtifactError(
                f"Snapshot {uri}: rows of shape {batch.shape} at row {done}; expected {len(target)} rows of width {width}."
            )
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, which is refused below
            rows = batch.astype(dtype)
        if not np.isfinite(rows).all():
            raise ArtifactError(f"Snapshot {uri}: an embedding near row {done} is not finite in {np.dtype(dtype)}.")
        out[target[done : done + len(batch)]] = rows
        done += len(batch)
    if done != len(target):
        raise ArtifactError(f"Snapshot {uri}: {done} rows for {len(target)} ids.")
    out.flush()


def _publish(uri: str, building: Path, manifest: dict[str, Any]) -> None:
    """Put the files in place, switch the manifest, delete what neither the new nor the last manifest names."""
    manifest_uri = f"{uri}/manifest.json"
    previous = artifacts.read_json(manifest_uri).get("data") if artifacts.exists(manifest_uri) else None
    local = artifacts.local_path(uri)
    if local is not None:
        building.chmod(0o755)
        building.rename(local / manifest["data"])
    else:
        fs, path = artifacts.filesystem(f"{uri}/{manifest['data']}")
        for file in sorted(building.iterdir()):
            with file.open("rb") as source, fs.open_output_stream(f"{path}/{file.name}") as sink:
                shutil.copyfileobj(source, sink, 2**24)
    artifacts.write_json(manifest_uri, manifest)
    keep = {manifest["data"], previous}
    folders = {entry[len(uri) + 1 :].partition("/")[0] for entry in artifacts.list_files(uri)}
    for folder in sorted(folders):
        if folder.startswith(("data-", ".building-")) and folder not in keep:
            artifacts.remove(f"{uri}/{folder}")
