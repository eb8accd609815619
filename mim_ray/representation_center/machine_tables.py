"""One shard of a release, open: what a parameter machine holds in memory, without Ray.

part = ReleasePart.open(serial, release, shard=(0, 2), folder=…)
part.follow()                                    # new messages and commits; call it often
matrix, found, named, categories = part.lookup("mm", keys)
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

from mim_ray import artifacts
from mim_ray.data.ids import hash_ids
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.key_index import shard_of
from mim_ray.representation_center.lookup import STORAGE_PROBLEMS, EmbeddingLookup
from mim_ray.representation_center.machine_release import MachineRelease
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.table import EmbeddingTable

logger = logging.getLogger(__name__)
Vectors: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]
"""(n, D) vectors, (n,) bool found, positions with a category, those categories."""


OTHER_RELEASE, NOT_THERE = "it has another release", "its release does not hold that"


class Reply(NamedTuple):
    """What a machine answers. `problem` is empty where `content` is what was asked for; `serial` 0: no release yet."""

    serial: int
    release_id: str
    problem: str
    content: Any


def split_reply(reply: Reply, num_pieces: int) -> tuple[Any, ...]:
    """The reply to a lookup in one table, then its vectors in pieces: Ray sends small results at once, large ones by its
    object store, which takes a millisecond longer."""
    if reply.problem:
        return (reply, *[None] * num_pieces)
    ((matrix, *rest),) = reply.content
    return (reply._replace(content=[rest]), *np.array_split(matrix, num_pieces))


def joined_reply(reply: Reply, pieces: Sequence[np.ndarray]) -> Reply:
    """The reply that was split."""
    (rest,) = reply.content
    return reply._replace(content=[(np.concatenate(pieces), *rest)])


@dataclass
class ReleasePart:
    """The rows of one shard of every table of a release, and the dense parameters whose names fall into it.

    Attributes:
        folder: holds the overlays, each in a folder with its table's name.
    """

    serial: int
    release: MachineRelease
    folder: Path
    tables: dict[str, EmbeddingLookup]
    dense: dict[str, bytes]
    last_problem: str = ""

    @classmethod
    def open(cls, serial: int, release: MachineRelease, *, shard: tuple[int, int], folder: Path) -> ReleasePart:
        """
        Args:
            folder: is made; must not be there.

        Raises:
            ArtifactError: a snapshot or file is missing or damaged.
        """
        folder.mkdir(parents=True, mode=0o700)
        tables = {}
        for number, (name, source) in enumerate(release.tables.items()):
            tables[name] = EmbeddingLookup(
                Snapshot.open(source.snapshot, shard=shard),
                table=None if source.table is None else EmbeddingTable(source.table),
                window=source.window,
                shard=shard,
                folder=folder / f"table-{number}",
            )
        dense = {
            name: _read_dense(uri) for name, uri in release.dense.items() if shard_of_name(name, shard[1]) == shard[0]
        }
        part = cls(serial, release, folder, tables, dense)
        for name in tables:  # loads what a lookup loads the first time
            part.lookup(name, pa.array([""], pa.large_string()))
        return part

    @property
    def behind_s(self) -> float:
        """Seconds for which this part may lack what was stored meanwhile."""
        return max((table.behind_s for table in self.tables.values()), default=0.0)

    def follow(self) -> None:
        """Take in what is new. A table that cannot be followed now is logged, once, and tried again by the next call."""
        for name, table in self.tables.items():
            try:
                table.refresh()
                self.last_problem = ""
            except STORAGE_PROBLEMS as error:  # storage away for a moment, or a damaged segment
                if str(error) != self.last_problem:
                    logger.warning("New rows of table %s are not read at the moment: %s", name, error)
                self.last_problem = str(error)

    def push(self, encoder_version: str, segment_id: str, rows: pa.Table) -> bool:
        """Take in a stored segment, in every table of that encoder version; whether there is one."""
        taken = False
        for name, table in self.tables.items():
            if table.encoder_version == encoder_version and self.release.tables[name].window is not None:
                table.push(segment_id, rows)
                taken = True
        return taken

    def lookup(self, table: str, keys: pa.LargeStringArray) -> Vectors:
        """Vectors as they travel: float16 where the snapshot stores that, else float32; nothing is lost either way.

        Raises:
            KeyError: the release has no such table.
        """
        rows = self.tables[table]
        dtype = np.float16 if rows.overlay.dtype == "float16" else np.float32
        result = rows.get(keys, dtype=dtype)
        named = np.flatnonzero(np.asarray(result.category.is_valid(), bool))
        return result.matrix, result.found, named, result.category.take(pa.array(named)).to_pylist()

    def close(self) -> None:
        """Tell readers in other processes to look elsewhere, and leave. Rows that are still mapped stay readable."""
        for table in self.tables.values():
            table.overlay.retire()
        shutil.rmtree(self.folder, ignore_errors=True)


def shard_of_name(name: str, num_shards: int) -> int:
    """The shard that holds the dense parameters of this name."""
    return int(shard_of(hash_ids([name]), num_shards)[0])


def _read_dense(uri: str) -> bytes:
    from safetensors import SafetensorError, deserialize

    content = artifacts.read_bytes(uri)
    try:
        deserialize(content)
    except SafetensorError as error:
        raise ArtifactError(f"{uri} is damaged ({error}). Write it again.") from None
    return content
