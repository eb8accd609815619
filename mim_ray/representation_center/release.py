"""Which encoder version, snapshot and CTR model are current: a log of releases, the last one is current.

    promote(center, encoder_version="csft-…", snapshot=uri, ctr_model=uri)      # the next release, in one commit
    release = read_release(center)                                             # None before the first promotion
    roll_back(center)                                                          # to the release before
    releases(center)                                                           # all of them, oldest first

    check_versions("csft-a", "csft-b", expected_by="CTR model …", found_in="snapshot …")   # raises, naming both

The log is the small Delta table center/releases: a commit is the one kind of conditional write that works the same on local
disks and object stores. It is rewritten whole by every promotion, so that reading is one file; of two promoters at once the
second builds on the first. Killed before the commit the old release is current, after it the new one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Schema, write_deltalake
from deltalake.exceptions import CommitFailedError, TableNotFoundError

from mim_ray import artifacts
from mim_ray.errors import ArtifactError, StorageError, VersionMismatchError
from mim_ray.object_store import delta_options, require_conditional_writes, storage_errors

MAX_ATTEMPTS = 100
SCHEMA = pa.schema(
    [
        pa.field("number", pa.int64(), nullable=False),
        ("encoder_version", pa.string()),
        ("snapshot", pa.string()),
        ("ctr_model", pa.string()),
        ("encoder", pa.string()),
        ("promoted_at", pa.string()),
        ("same_as", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Release:
    """What serving and offline training should use.

    Attributes:
        snapshot: URI of one immutable state. ctr_model: URI, None where no model is bound to it.
        encoder: URI of the encoder that made the embeddings, None where it was not told.
        number: 1, 2, …; 0 before it is promoted. same_as: the number of the release that a roll-back returned to.
    """

    encoder_version: str
    snapshot: str
    ctr_model: str | None = None
    encoder: str | None = None
    promoted_at: str = ""
    number: int = 0
    same_as: int | None = None


def promote(
    center: str, *, encoder_version: str, snapshot: str, ctr_model: str | None = None, encoder: str | None = None
) -> Release:
    """Make this the current release; those before are kept for `roll_back`.

    Raises:
        StorageError: the object store cannot be reached, or has no conditional writes.
    """
    new = Release(encoder_version, snapshot, ctr_model, encoder)
    return _append(center, lambda _: new)


def read_release(center: str) -> Release | None:
    """The current release, or None when nothing was promoted.

    Raises:
        ArtifactError: the log of releases is damaged.
    """
    known = releases(center)
    return known[-1] if known else None


def releases(center: str) -> list[Release]:
    """All releases, oldest first; the last is current.

    Raises:
        ArtifactError: the log of releases is damaged.
    """
    handle = _open(center)
    return [] if handle is None else _read(handle, center)


def roll_back(center: str, number: int | None = None) -> Release:
    """Make an earlier release current again, as a new one at the log's end.

    Args:
        number: of the release to return to. Default: the one before current, so that a second call returns.

    Raises:
        ArtifactError: there is none; or another promotion came in between, which the caller has to look at first.
    """
    seen = read_release(center)

    def chosen(known: list[Release]) -> Release:
        if known and seen is not None and known[-1].number != seen.number:
            raise ArtifactError(
                f"Meanwhile release {known[-1].number} ({known[-1].encoder_version}) was promoted at {center}. Nothing was "
                "changed; look at it and decide again."
            )
        wanted = known[-2:-1] if number is None else [release for release in known if release.number == number]
        if not wanted:
            what = "no release before the current one" if number is None else f"no release {number}"
            raise ArtifactError(f"{center} knows {what} (it has {len(known)}), so there is no way back.")
        return replace(wanted[0], same_as=wanted[0].same_as or wanted[0].number)

    return _append(center, chosen)


def check_versions(expected: str | None, found: str | None, *, expected_by: str, found_in: str) -> None:
    """
    Raises:
        VersionMismatchError: the two encoder versions differ (None = uses no embeddings).
    """
    if expected != found:
        raise VersionMismatchError(
            f"{expected_by} was made with encoder version {expected}, but {found_in} holds {found}. "
            f"Use embeddings of {expected}, or train the model again with those of {found}."
        )


def _append(center: str, choose: Callable[[list[Release]], Release]) -> Release:
    """Write choose(known releases) as the next one, again if another promoter was faster."""
    uri = _uri(center)
    release, version = None, -1
    for _ in range(MAX_ATTEMPTS):
        handle = _open(center)
        if handle is None:
            _create(uri)
            continue
        known = _read(handle, center)
        if release is not None and release in known:
            return release  # the commit went through, though its answer was lost
        if handle.version() == version:
            raise StorageError(
                f"{uri} refuses a commit, though no other promoter was faster. Look at the store's rights."
            )
        version = handle.version()
        number = known[-1].number + 1 if known else 1
        release = replace(choose(known), number=number, promoted_at=artifacts.now())
        rows = pa.Table.from_pylist([asdict(entry) for entry in [*known, release]], SCHEMA)
        try:
            with storage_errors(uri):
                once = CommitProperties(max_commit_retries=0)
                write_deltalake(handle, rows, mode="overwrite", commit_properties=once)
        except CommitFailedError:
            time.sleep(random.uniform(0, 0.05))
            continue
        return release
    raise ArtifactError(f"{uri}: {MAX_ATTEMPTS} promotions in a row lost against others. Stop one of them.")


def _create(uri: str) -> None:
    require_conditional_writes(uri)
    local = artifacts.local_path(uri)
    if local is not None:
        local.mkdir(parents=True, exist_ok=True)
    with storage_errors(uri):
        DeltaTable.create(uri, Schema.from_arrow(SCHEMA), mode="ignore", storage_options=delta_options(uri))


def _open(center: str) -> DeltaTable | None:
    uri = _uri(center)
    with storage_errors(uri):
        try:
            return DeltaTable(uri, storage_options=delta_options(uri))
        except TableNotFoundError:
            return None


def _read(handle: DeltaTable, center: str) -> list[Release]:
    uri = _uri(center)
    try:
        with storage_errors(uri):
            table = handle.to_pyarrow_table(filesystem=artifacts.folder_filesystem(uri))
        return sorted((Release(**row) for row in table.to_pylist()), key=lambda release: release.number)
    except (TypeError, FileNotFoundError, pa.ArrowInvalid) as error:
        raise ArtifactError(
            f"{uri} is damaged ({error}), so what is current is not known. Move it away and promote a release again."
        ) from None


def _uri(center: str) -> str:
    return f"{center}/releases"
