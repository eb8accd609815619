"""The files of one snapshot state: its manifest, checksums of blocks, and mapping a range of a file.

    manifest = read_manifest(uri)                                    # refused when damaged or of another format
    with BlockWriter(path, hashing) as file: file.write(array)       # manifest entry afterwards: file.entry
    source = SnapshotFiles(uri, manifest, verify=True)
    array = source.map("matrix.bin", first_byte, end_byte)           # uint8; a remote file's blocks are downloaded

A file's checksums are those of its blocks of `BLOCK_BYTES`, so that a shard checks, and downloads, the blocks that its rows
lie in and no others. The manifest holds a checksum of itself.

*Cache.* Blocks of a remote snapshot lie in $MIM_RAY_CACHE (default ~/.cache/mim_ray), shared by the processes of a machine; of each line
the states used last are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mim_ray import artifacts
from mim_ray.errors import ArtifactError
from mim_ray.local_cache import cache_folder, drop_unused, note_use
from mim_ray.object_store import storage_errors

FORMAT = 2
MANIFEST = "manifest.json"
BLOCK_BYTES = 2**24
CACHED_STATES = 3
_READ_BYTES = 2**20
_UNHASHED_WRITES = 2  # of a file, that wait for their checksum: what is waiting is in memory
_SYNCS_AT_ONCE = 8


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write manifest.json with its own checksum."""
    (folder / MANIFEST).write_text(json.dumps({**manifest, "checksum": _manifest_checksum(manifest)}, indent=1))


def sync_folder(folder: Path) -> None:
    """Make a folder's files safe against a power cut, together: so the disk is waited for once."""
    with ThreadPoolExecutor(_SYNCS_AT_ONCE) as pool:
        list(pool.map(artifacts.sync, [*_data_files(folder), folder / MANIFEST]))
    artifacts.sync(folder)


def read_manifest(uri: str) -> dict[str, Any]:
    """
    Raises:
        ArtifactError: missing, damaged, or of another format.
    """
    path = f"{uri}/{MANIFEST}"
    content = artifacts.read_bytes(path)
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise ArtifactError(_damaged(uri, f"{path} is no JSON ({error})")) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise ArtifactError(f"{path} has format {found!r}, this version reads {FORMAT}. Build the snapshot again.")
    expected = manifest.pop("checksum", None)
    if expected != _manifest_checksum(manifest):
        raise ArtifactError(_damaged(uri, f"{path} was changed after it was written (its checksum differs)"))
    return manifest


class BlockWriter:
    """Writes a file from its beginning to its end and keeps the checksums of its blocks.

    Args:
        hashing: one thread, which computes the checksums beside the writing.
    """

    def __init__(self, path: Path, hashing: ThreadPoolExecutor) -> None:
        self._file = path.open("wb")
        self._hashing = hashing
        self._unhashed: deque[Future[None]] = deque()
        self._digest = _digest()
        self._in_block = 0
        self.num_bytes = 0
        self._checksums: list[str] = []

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, array: np.ndarray) -> None:
        """Add an array, which must stay as it is until `entry` was asked for."""
        view = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        if len(self._unhashed) == _UNHASHED_WRITES:
            self._unhashed.popleft().result()
        self._unhashed.append(self._hashing.submit(self._hash, view))
        self._file.write(view)
        self.num_bytes += len(view)

    def _hash(self, view: memoryview) -> None:
        while len(view):
            piece = view[: BLOCK_BYTES - self._in_block]
            self._digest.update(piece)
            self._in_block += len(piece)
            view = view[len(piece) :]
            if self._in_block == BLOCK_BYTES:
                self._end_block()

    def flush(self) -> None:
        """Let readers of the file see what was written."""
        self._file.flush()

    @property
    def entry(self) -> dict[str, Any]:
        """The file's entry in the manifest, when all is written."""
        while self._unhashed:
            self._unhashed.popleft().result()
        if self._in_block:
            self._end_block()
        return {"bytes": self.num_bytes, "checksums": self._checksums}

    def _end_block(self) -> None:
        self._checksums.append(self._digest.hexdigest())
        self._digest, self._in_block = _digest(), 0


class SnapshotFiles:
    """Read-only mappings of a snapshot's files.

    Args:
        verify: compare the checksums of what is mapped, which reads it once. Sizes, and what is downloaded, are always compared.
    """

    def __init__(self, uri: str, manifest: Mapping[str, Any], *, verify: bool) -> None:
        self.uri = uri
        self._files: Mapping[str, Any] = manifest["files"]
        self._block_bytes: int = manifest["block_bytes"]
        self._verify = verify
        self._local = artifacts.local_path(uri)
        self.num_mapped_bytes = 0

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def num_bytes(self, name: str) -> int:
        """Size of the whole file."""
        return int(self._files[name]["bytes"])

    def map(self, name: str, first: int = 0, end: int | None = None, *, verify: bool | None = None) -> np.ndarray:
        """(end - first,) uint8 of those bytes of a file.

        Raises:
            ArtifactError: the file is missing or damaged.
        """
        size = self.num_bytes(name)
        end = size if end is None else end
        if end > size:
            raise ArtifactError(_damaged(self.uri, f"{name} ends before byte {end}, where a row's data ends"))
        verify = self._verify if verify is None else verify
        if self._local is not None:
            path = self._local / name
            self._check_size(path, size)
            if verify:
                self._check_blocks(path, name, range(first // self._block_bytes, -(-end // self._block_bytes)), 0)
            start = 0
        else:
            path, start = self._download(name, first, end, verify)
        if first >= end:
            return np.empty(0, np.uint8)
        self.num_mapped_bytes += end - first
        # A plain array over the mapping: np.memmap's own subclass makes every gather slower.
        return np.asarray(np.memmap(path, np.uint8, mode="r", offset=first - start, shape=(end - first,)))

    def _check_size(self, path: Path, size: int) -> None:
        if not path.is_file():
            raise ArtifactError(_damaged(self.uri, f"{path} is missing"))
        if path.stat().st_size != size:
            raise ArtifactError(_damaged(self.uri, f"{path} has {path.stat().st_size} bytes, its manifest says {size}"))

    def _check_blocks(self, path: Path, name: str, blocks: range, start: int) -> None:
        """Compare checksums; `start` is the place of the local file's first byte in the whole file."""
        expected = self._files[name]["checksums"]
        size = self.num_bytes(name)

        def found(block: int) -> str:
            first = block * self._block_bytes
            digest = _digest()
            with path.open("rb") as file:
                file.seek(first - start)
                left = min(self._block_bytes, size - first)
                while left > 0 and (piece := file.read(min(left, _READ_BYTES))):
                    digest.update(piece)
                    left -= len(piece)
            return digest.hexdigest()

        with ThreadPoolExecutor(min(len(blocks), os.cpu_count() or 1) or 1) as pool:
            for block, checksum in zip(blocks, pool.map(found, blocks), strict=True):
                if checksum != expected[block]:
                    raise ArtifactError(
                        _damaged(self.uri, f"{path} has another checksum than its manifest in block {block}")
                    )

    def _download(self, name: str, first: int, end: int, verify: bool) -> tuple[Path, int]:
        """Local file with the blocks of that range, and the place of its first byte in the whole file."""
        blocks = range(first // self._block_bytes, -(-end // self._block_bytes))
        start, stop = blocks.start * self._block_bytes, min(blocks.stop * self._block_bytes, self.num_bytes(name))
        path = self._cache() / f"{name}.{blocks.start}-{blocks.stop}"
        for attempt in range(2):
            fresh = not path.is_file() or path.stat().st_size != stop - start
            if fresh:
                self._fetch(name, start, stop, path)
            try:
                if fresh or verify:
                    self._check_blocks(path, name, blocks, start)
                return path, start
            except ArtifactError:
                path.unlink(missing_ok=True)  # the copy may be damaged where the original is not
                if fresh or attempt:
                    raise
        raise AssertionError("unreachable")

    def _fetch(self, name: str, start: int, stop: int, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        fs, remote = artifacts.filesystem(f"{self.uri}/{name}")
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".part-")
        try:
            with os.fdopen(handle, "wb") as sink, storage_errors(self.uri), fs.open_input_file(remote) as source:
                if source.size() != self.num_bytes(name):
                    text = f"{name} has {source.size()} bytes, its manifest says {self.num_bytes(name)}"
                    raise ArtifactError(_damaged(self.uri, text))
                source.seek(start)
                while (left := stop - start) > 0:
                    piece = source.read(min(left, self._block_bytes))
                    if not piece:
                        raise ArtifactError(_damaged(self.uri, f"{name} ends before its time"))
                    sink.write(piece)
                    start += len(piece)
            os.replace(partial, path)
        except FileNotFoundError:
            raise ArtifactError(_damaged(self.uri, f"{name} is missing")) from None
        finally:
            Path(partial).unlink(missing_ok=True)

    def _cache(self) -> Path:
        root = cache_folder() / "snapshots"
        line, _, state = self.uri.rpartition("/")
        return root / hashlib.sha256(line.encode()).hexdigest()[:16] / state

    def tidy_cache(self) -> None:
        """Note that this state was used, and drop the states of its line that were not among the last ones used, and the lines
        that nobody uses any more."""
        if self._local is not None or not self._cache().is_dir():
            return
        line = self._cache().parent
        note_use(self._cache())
        note_use(line)
        states = sorted(line.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in states[CACHED_STATES:]:
            shutil.rmtree(old, ignore_errors=True)  # who has it mapped keeps it
        drop_unused(line.parent.iterdir())


def upload(folder: Path, uri: str) -> None:
    """Copy a local snapshot folder to a remote URI, the manifest last, so that it is not there before all else is."""
    for file in [*sorted(_data_files(folder)), folder / MANIFEST]:
        fs, path = artifacts.filesystem(f"{uri}/{file.name}")
        with file.open("rb") as source, storage_errors(uri), fs.open_output_stream(path) as sink:
            shutil.copyfileobj(source, sink, _READ_BYTES * 8)


def _data_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.suffix == ".bin")


def _damaged(uri: str, what: str) -> str:
    return f"Snapshot {uri} is damaged: {what}. Switch to an older one, or build it again from the table."


def _digest() -> Any:
    return hashlib.blake2b(digest_size=16)


def _manifest_checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16).hexdigest()
