"""s3:// for both libraries that reach it: pyarrow (files) and delta-rs (commits) obey the same environment.

    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN     read by both themselves; else a role or a profile
    AWS_REGION (or AWS_DEFAULT_REGION)                              else the bucket's own is asked for
    AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL                         another store than AWS; http:// is allowed by naming it

Credentials are never part of a URI, a setting or a pickled object: a process that reads or writes has them in its own
environment, Ray's workers too (docs/representation_center.md, "Object storage").

Commits to a Delta table are conditional writes (`If-None-Match: *`), so that of two writers of one version one is refused;
`require_conditional_writes` finds out whether a store keeps that promise.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pyarrow as pa
import pyarrow.fs as pafs

from mim_ray.errors import ArtifactError, ConfigError, StorageError

CREDENTIALS = re.compile(
    r"^\w+://[^/?#]*@|[?&][^=]*(key|secret|token|signature|credential|password)[^=]*=", re.IGNORECASE
)
"""A URI that carries a secret: a user part (s3://KEY:SECRET@bucket), or a parameter such as ?secret_key=…"""
_WRITERS, _ROUNDS = 6, 2
_TRUE = {"true", "1", "yes", "on", "t", "y"}


def carries_credentials(uri: str) -> bool:
    """Whether a URI holds a secret, which belongs into the environment."""
    return "://" in uri and CREDENTIALS.search(uri) is not None


def check_uri(uri: str) -> None:
    """
    Raises:
        ConfigError: the URI holds credentials or other parameters. The message does not repeat them.
    """
    if carries_credentials(uri):
        raise ConfigError(
            f"A {uri.partition('://')[0]}:// address holds credentials. Addresses are written into artifacts and logs: "
            "take them out and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment."
        )
    if uri.startswith("s3://") and "?" in uri:
        raise ConfigError(
            f"{uri.partition('?')[0]} is followed by parameters after a ?, which are not read. Set AWS_REGION and "
            "AWS_ENDPOINT_URL in the environment."
        )


def s3_filesystem(uri: str) -> tuple[pafs.S3FileSystem, str]:
    """pyarrow filesystem and path of an s3:// URI. A small file is written with one PUT.

    Raises:
        ConfigError: as check_uri. StorageError: the bucket's region cannot be found out.
    """
    check_uri(uri)
    path = uri.removeprefix("s3://")
    return _client(path.partition("/")[0], _endpoint(), _region(), os.getpid()), path


def delta_options(uri: str) -> dict[str, str] | None:
    """`storage_options` for delta-rs: what pyarrow does by itself and delta-rs has to be told. None where nothing.

    Raises:
        ConfigError: as check_uri; also where the environment switches conditional writes off.
    """
    if not uri.startswith("s3://"):
        return None
    if os.environ.get("AWS_S3_ALLOW_UNSAFE_RENAME", "").lower() in _TRUE or _conditional_put() == "disabled":
        raise ConfigError(
            "AWS_S3_ALLOW_UNSAFE_RENAME or AWS_CONDITIONAL_PUT=disabled is set: two jobs that write at once would lose "
            "rows without a word. Unset it; S3 and most S3-compatible stores know conditional writes."
        )
    filesystem, _ = s3_filesystem(uri)
    options = {"AWS_REGION": filesystem.region}
    if (_endpoint() or "").startswith("http://"):
        options["AWS_ALLOW_HTTP"] = "true"
    return options


def require_conditional_writes(uri: str) -> None:
    """Check that of several writers of one object the store below `uri` lets one through: some write the same version of a
    small table at once. About a hundred requests; asked when a table is made.

    Raises:
        StorageError: it lets several through, so that jobs would overwrite each other's commits; or it cannot be reached.
    """
    if not uri.startswith("s3://") or os.environ.get("AWS_S3_LOCKING_PROVIDER"):
        return
    probe = f"{uri}.probe-{uuid.uuid4().hex[:12]}"
    try:
        with storage_errors(uri):
            winners = _race(probe)
        if all(number == 1 for number in winners):
            return
        reason = f"{max(winners)} of {_WRITERS} writers of the same object were told that they wrote it"
    except StorageError as error:
        if "NotImplemented" not in str(error) and "501" not in str(error):
            raise
        reason = "it does not know the header If-None-Match"
    finally:
        filesystem, path = s3_filesystem(probe)
        with contextlib.suppress(OSError):
            filesystem.delete_dir(path)
    raise StorageError(
        f"The object store of {uri} has no conditional writes ({reason}), so two jobs that write at once would lose rows. "
        "Use a store that has them (AWS S3, current versions of MinIO, Ceph, Cloudflare R2), or a lock table: "
        "AWS_S3_LOCKING_PROVIDER=dynamodb."
    )


@contextlib.contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """What the libraries say of a remote store that does not answer or refuses, as one sentence.

    Raises:
        StorageError: instead of OSError and delta-rs' errors of the store; a missing file stays FileNotFoundError.
    """
    try:
        yield
    except Exception as error:
        told = storage_error(error, uri)
        if told is None:
            raise
        raise told from None


def storage_error(error: BaseException, uri: str = "") -> StorageError | None:
    """The sentence for an error of a remote store, None for any other error."""
    text = str(error)
    remote = uri.startswith(("s3://", "gs://", "gcs://")) or "S3 error" in text or "AWS Error" in text
    if not remote or isinstance(error, FileNotFoundError | ArtifactError | StorageError | ConfigError):
        return None
    kind = type(error)
    if not (isinstance(error, OSError) or kind.__module__.startswith("deltalake")):
        return None
    if "S3 error" not in text and "AWS Error" not in text and not isinstance(error, OSError):
        return None
    return StorageError(
        f"{uri or 'The object store'} cannot be reached or refuses: {_said(error)}. Check the bucket's name and, in "
        f"the environment of this process (Ray's workers have that of their node): {_described_environment()}."
    )


@cache
def _client(bucket: str, endpoint: str | None, region: str | None, pid: int) -> pafs.S3FileSystem:
    """One client per bucket and process: its connections are kept. Credentials are looked up by the client itself."""
    if region is None and endpoint is None:
        try:
            region = pafs.resolve_s3_region(bucket)
        except OSError as error:
            raise StorageError(
                f"The region of bucket {bucket} cannot be found out ({_said(error)}). Check the bucket's name, and "
                "set AWS_REGION, or AWS_ENDPOINT_URL for another store than AWS."
            ) from None
    return pafs.S3FileSystem(region=region, endpoint_override=endpoint, allow_delayed_open=True)


def _race(probe: str) -> list[int]:
    """How many of `_WRITERS` simultaneous writers of a table's next version succeeded, for each of `_ROUNDS`."""
    from deltalake import CommitProperties, DeltaTable, Schema
    from deltalake.exceptions import CommitFailedError

    options = delta_options(probe)
    schema = Schema.from_arrow(pa.schema([("writer", pa.int8())]))
    DeltaTable.create(probe, schema, storage_options=options)
    start = threading.Barrier(_WRITERS)

    def load(_: int) -> DeltaTable:
        return DeltaTable(probe, storage_options=options)

    def write(handle: DeltaTable) -> bool:
        start.wait()
        try:
            once = CommitProperties(max_commit_retries=0)
            handle.create_write_transaction([], "append", schema, commit_properties=once)
        except CommitFailedError:
            return False
        return True

    with ThreadPoolExecutor(_WRITERS) as pool:
        return [sum(pool.map(write, list(pool.map(load, range(_WRITERS))))) for _ in range(_ROUNDS)]


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _region() -> str | None:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None


def _conditional_put() -> str:
    return os.environ.get("AWS_CONDITIONAL_PUT", os.environ.get("CONDITIONAL_PUT", "etag")).lower()


def _described_environment() -> str:
    """Which variables are set; values only of those that are no secret."""
    shown = [f"{name}={os.environ.get(name) or 'not set'}" for name in ("AWS_ENDPOINT_URL", "AWS_REGION")]
    secret = [
        f"{name} {'is set' if os.environ.get(name) else 'is not set'}"
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    ]
    return re.sub(r"//[^/@]*@", "//…@", ", ".join([*shown, *secret]))


def _said(error: BaseException) -> str:
    """What an error says, without colors and line breaks; of one that a Ray worker raised, what its traceback ends with."""
    traced = re.findall(r"^[\w.]*(?:Error|Exception): (.+)$", str(error), flags=re.MULTILINE)
    if "Traceback" in str(error) or "ray::" in str(error):
        return _shortened(traced[-1] if traced else str(error))
    return _shortened(str(error))


def _shortened(text: str) -> str:
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())
    return text[:300].rstrip(". ")
