"""What a stage leaves at a URI: safetensors, JSON, the resolved scenario, metrics and the versions of its parents.

An artifact is a folder. `artifact.json` is written last and makes it complete; a folder without it is an attempt that
did not finish and is done again. Nothing here pickles. URIs are absolute: a local path, file://, s3://, gs:// (pyarrow.fs).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from mim_ray.config import Scenario
from mim_ray.errors import ArtifactError, ConfigError
from mim_ray.local_cache import cache_folder, drop_unused, note_use
from mim_ray.object_store import check_uri, s3_filesystem, storage_errors

if TYPE_CHECKING:  # torch is imported where tensors are read or written: data tasks start in half the time without it
    import torch

MANIFEST = "artifact.json"
REQUESTS_AT_ONCE = 16  # to an object store, by one call
T = TypeVar("T")


@dataclass(frozen=True)
class Manifest:
    """Content of artifact.json.

    Attributes:
        fingerprint: hash of the stage's settings and of its parents' fingerprints; equal means "need not run again".
        parents: stage name -> fingerprint of what it was made from.
        metrics: figures of the run. summary: (label, text) rows as printed.
    """

    stage: str
    fingerprint: str
    created_at: str
    seconds: float
    parents: Mapping[str, str]
    metrics: Mapping[str, Any]
    summary: Sequence[Sequence[str]]
    rejects: Mapping[str, int]
    scenario: Mapping[str, Any]


def absolute_uri(root: str) -> str:
    """`root` as an absolute URI; a relative path is taken from the current folder.

    Raises:
        ConfigError: a relative path inside a submitted Ray job, which runs in an uploaded copy of the folder; a URI with
            credentials in it.
    """
    if "://" in root:
        check_uri(root)
        return root.rstrip("/")
    path = Path(root).expanduser()
    if not path.is_absolute() and in_submitted_job():
        raise ConfigError(
            f"{root} is a relative path, but a submitted job runs in an uploaded copy of your folder, so it would be "
            f"lost. Give an absolute path or a URI that every node reaches, such as s3://bucket/{path.name}."
        )
    return str(path.resolve())


def in_submitted_job() -> bool:
    """Whether this process is the entry point of `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """pyarrow filesystem and path inside it.

    Raises:
        ArtifactError: no filesystem for this kind of URI. ConfigError: it holds credentials.
    """
    if uri.startswith("s3://"):
        return s3_filesystem(uri)
    check_uri(uri)
    try:
        return pafs.FileSystem.from_uri(uri if "://" in uri else Path(uri).absolute().as_uri())
    except (pa.ArrowInvalid, ValueError) as error:
        raise ArtifactError(
            f"{uri} is no URI that can be used ({error}). Use a path, file://, s3:// or gs://."
        ) from None


def folder_filesystem(uri: str) -> pafs.FileSystem:
    """Filesystem of the paths below a folder; for deltalake's datasets, whose own calls back into Python from Arrow's
    threads and so now and then aborts a process that is about to end."""
    fs, path = filesystem(uri)
    return pafs.SubTreeFileSystem(path, fs)


def local_path(uri: str) -> Path | None:
    """The path when the URI is on this machine's file system, else None."""
    if "://" not in uri:
        return Path(uri)
    if uri.startswith("s3://"):
        return None
    fs, path = filesystem(uri)
    return Path(path) if isinstance(fs, pafs.LocalFileSystem) else None


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    with storage_errors(uri):
        return bool(fs.get_file_info(path).type != pafs.FileType.NotFound)


def remove(uri: str) -> None:
    """Delete a file or a folder with all it holds, if it is there; another process may do the same."""
    fs, path = filesystem(uri)
    with storage_errors(uri), contextlib.suppress(FileNotFoundError):
        kind = fs.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            fs.delete_dir(path)
        elif kind == pafs.FileType.File:
            fs.delete_file(path)


def for_each(function: Callable[[str], T], uris: Sequence[str]) -> list[T]:
    """Results of function(uri) in order; remotely several at once, since each waits for requests."""
    if len(uris) < 2 or local_path(uris[0]) is not None:
        return [function(uri) for uri in uris]
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return list(pool.map(function, uris))


def list_files(uri: str, suffix: str = "") -> list[str]:
    """URIs of the files below a folder (or the file itself), sorted. Remotely one request per 1,000 files."""
    fs, path = filesystem(uri)
    path = path.rstrip("/")
    with storage_errors(uri):
        try:
            found = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
        except NotADirectoryError:
            found = []
        base = uri.rstrip("/")
        files = [
            base + entry.path[len(path) :]
            for entry in found
            if entry.type == pafs.FileType.File and entry.path.endswith(suffix)
        ]
        if not found and fs.get_file_info(path).type == pafs.FileType.File:
            files = [uri]
    return sorted(files)


def write_bytes(uri: str, content: bytes) -> None:
    """Write a file so that readers see all of it or nothing: on local disks by rename, elsewhere by one object PUT."""
    write_pieces(uri, [content])


def write_pieces(uri: str, pieces: Iterable[bytes | memoryview]) -> None:
    """`write_bytes` of content that is never in memory as a whole."""
    fs, path = filesystem(uri)
    parent = path.rpartition("/")[0]
    if isinstance(fs, pafs.LocalFileSystem):
        os.makedirs(parent, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=parent, prefix=".tmp-")
        try:
            with os.fdopen(handle, "wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # a full disk gets no fuller with each try
            raise
    else:
        with storage_errors(uri), fs.open_output_stream(path) as stream:
            for piece in pieces:
                stream.write(piece)


def sync(path: str | Path) -> None:
    """Make a file's content, or a folder's entries, safe against a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_bytes(uri: str) -> bytes:
    """
    Raises:
        ArtifactError: there is no such file.
    """
    fs, path = filesystem(uri)
    try:
        with storage_errors(uri), fs.open_input_stream(path) as stream:
            return stream.read()
    except FileNotFoundError:
        raise ArtifactError(f"{uri} is not there. Run the stage that makes it first.") from None


def download(uri: str, target: Path) -> None:
    """Copy a file to a local path, in pieces.

    Raises:
        ArtifactError: there is no such file.
    """
    fs, path = filesystem(uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with storage_errors(uri), fs.open_input_stream(path) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 2**24)
    except FileNotFoundError:
        raise ArtifactError(f"{uri} is not there. Run the stage that makes it first.") from None


def upload(path: Path, uri: str) -> None:
    """Copy a local file to an object store, in pieces; readers see all of it or nothing."""
    fs, target = filesystem(uri)
    with storage_errors(uri), path.open("rb") as source, fs.open_output_stream(target) as stream:
        shutil.copyfileobj(source, stream, 2**24)


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode())


def read_json(uri: str) -> Any:
    """
    Raises:
        ArtifactError: the file is missing or no JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{uri} is damaged ({error}). Delete its folder and run the stage again.") from None


def write_tensors(uri: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """All state is flat safetensors, written tensor by tensor: a large table on the CPU is not copied."""
    from mim_ray.tensor_format import safetensors_pieces

    write_pieces(uri, safetensors_pieces(tensors))


def read_tensors(uri: str) -> dict[str, torch.Tensor]:
    """
    Raises:
        ArtifactError: the file is missing or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(read_bytes(uri))
    except SafetensorError as error:
        raise ArtifactError(f"{uri} is damaged ({error}). Delete its folder and run the stage again.") from None


def read_manifest(uri: str) -> Manifest | None:
    """The manifest of the artifact at `uri`, or None when there is no complete one."""
    path = f"{uri}/{MANIFEST}"
    if not exists(path):
        return None
    try:
        return Manifest(**read_json(path))
    except (ArtifactError, TypeError):
        return None


def write_manifest(uri: str, manifest: Manifest) -> None:
    """Mark the artifact complete. Call last."""
    write_json(f"{uri}/{MANIFEST}", asdict(manifest))


def fingerprint(*parts: Any) -> str:
    """Short stable hash of JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def source_fingerprint(uri: str) -> str:
    """Hash of names, sizes and times of the files below `uri`: changes when a user's table changes."""
    fs, path = filesystem(uri)
    with storage_errors(uri):
        info = fs.get_file_info(path)
        selector = pafs.FileSelector(path, recursive=True)
        entries = [info] if info.type == pafs.FileType.File else fs.get_file_info(selector)
    files = [(entry.path, entry.size, entry.mtime_ns) for entry in entries if entry.type == pafs.FileType.File]
    return fingerprint(sorted(files))


def local_copy(uri: str) -> Path:
    """A local folder or file with the content of `uri`: itself when local, else a download kept by its fingerprint."""
    path = local_path(uri)
    if path is not None:
        return path
    cache = cache_folder() / "copies" / source_fingerprint(uri)
    files = list_files(uri)
    names = [file[len(uri) :].lstrip("/") or uri.rpartition("/")[2] for file in files]
    if not cache.exists():
        partial = Path(tempfile.mkdtemp(dir=_made(cache.parent)))
        target = dict(zip(files, names, strict=True))
        for_each(lambda file: download(file, partial / target[file]), files)
        try:
            partial.rename(cache)
        except OSError:  # another process was first
            shutil.rmtree(partial)
        drop_unused(cache.parent.iterdir())
    note_use(cache)
    return cache / names[0] if files == [uri] else cache


def now() -> str:
    """UTC time as text."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def run_root(scenario: Scenario) -> str:
    """Absolute URI under which the scenario's stages leave their artifacts."""
    if scenario.run.root is not None:
        return absolute_uri(scenario.run.root)
    if in_submitted_job():
        return str(Path.home() / "mim_ray_runs" / scenario.name)
    return absolute_uri(f"runs/{scenario.name}")


def center_root(scenario: Scenario) -> str:
    """Absolute URI of the scenario's representation center."""
    return f"{run_root(scenario)}/center" if scenario.run.center is None else absolute_uri(scenario.run.center)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
