"""What the catalogue said at the last refresh: 20 bytes a row, so that the next one knows which *rows* changed.

A file that was written again may hold a million rows of which ten differ (a MERGE, a nightly dump). A record is (hash of the
id, hash of the row's content, row number); the records of a file, sorted by id hash, are a *piece*. Pieces lie one after
another in packs, memory-mapped files below center/refresh/<encoder version>; `state.json` names the pieces of each catalogue
file and is replaced last, when everything of a round is in the table. A lost state costs one comparison of the whole
catalogue with the table, nothing else.

Comparisons go range by range of the hash space, `RECORDS_AT_ONCE` at a time, whatever the catalogue's size.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mim_ray import artifacts
from mim_ray.data.ids import mix

RECORDS_AT_ONCE = 8_000_000
FORMAT = 1
_MANY_PACKS = 16


class Records(NamedTuple):
    """Rows of a catalogue file: uint64 hash of the id (ascending), uint64 hash of the content, uint32 row number."""

    ids: np.ndarray
    contents: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, ids: np.ndarray, contents: np.ndarray, rows: np.ndarray) -> Records:
        """Sorted by id hash, equal ones in the order given."""
        order = np.argsort(ids, kind="stable")
        return cls(ids[order], contents[order], rows[order].astype(np.uint32))

    @property
    def pairs(self) -> np.ndarray:
        """(n,) uint64: one hash of (id, content)."""
        return mix(self.ids ^ mix(self.contents))

    def cut(self, low: int, high: int) -> Records:
        """Those whose id hash is in low … high."""
        first = np.searchsorted(self.ids, np.uint64(low))
        end = len(self.ids) if high == 2**64 else np.searchsorted(self.ids, np.uint64(high))
        return Records(*(column[first:end] for column in self))


@dataclass(frozen=True)
class Piece:
    """`count` records from byte `start` of a pack on: of one file, or of a part of it."""

    pack: str
    start: int
    count: int


@dataclass(frozen=True)
class SeenFile:
    """A catalogue file as it was when its rows were looked at."""

    signature: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class CatalogueState:
    """The state after a round.

    Attributes:
        catalogue, identity, version: as data.listing says them. settings: hash of what else decides embeddings.
        listed_at: when the catalogue was listed (microseconds): what it says since then changed after that.
        table_version: of the embedding table; an older table is not the one that this state belongs to.
        num_rows: of the catalogue, with an id.
    """

    catalogue: str
    identity: str
    version: int | None
    settings: str
    listed_at: int
    table_version: int
    num_rows: int
    files: Mapping[str, SeenFile] = field(default_factory=dict)

    @property
    def packs(self) -> set[str]:
        return {piece.pack for file in self.files.values() for piece in file.pieces}


class StateStore:
    """The state and its packs below `uri`. One writer: the holder of the refresh's lease."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._maps: dict[str, np.ndarray] = {}

    def read(self) -> CatalogueState | None:
        """The last state; None if there is none that can be used."""
        uri = f"{self.uri}/state.json"
        if not artifacts.exists(uri):
            return None
        value = artifacts.read_json(uri)
        if value.pop("format", None) != FORMAT:
            return None
        files = {
            path: SeenFile(signature, tuple(Piece(*piece) for piece in pieces))
            for path, (signature, pieces) in value.pop("files").items()
        }
        return CatalogueState(**value, files=files)

    def write(self, state: CatalogueState) -> None:
        """Switch to this state, then delete packs that it does not name."""
        value: dict[str, Any] = {key: getattr(state, key) for key in CatalogueState.__dataclass_fields__}
        value["files"] = {
            path: [file.signature, [[piece.pack, piece.start, piece.count] for piece in file.pieces]]
            for path, file in state.files.items()
        }
        artifacts.write_json(f"{self.uri}/state.json", value | {"format": FORMAT})
        for file in artifacts.list_files(self.uri, ".records"):
            name = file.rpartition("/")[2]
            if name not in state.packs:
                self._maps.pop(name, None)
                artifacts.remove(file)

    def records(self, piece: Piece) -> Records:
        """The piece's records, memory mapped."""
        if piece.pack not in self._maps and piece.count:
            path = artifacts.local_copy(f"{self.uri}/{piece.pack}")
            self._maps[piece.pack] = np.asarray(np.memmap(path, np.uint8, mode="r"))
        data = self._maps[piece.pack] if piece.count else np.empty(0, np.uint8)
        bounds = piece.start + piece.count * np.array([0, 8, 16, 20])
        kinds = (np.uint64, np.uint64, np.uint32)
        return Records(*(data[bounds[i] : bounds[i + 1]].view(kind) for i, kind in enumerate(kinds)))

    def compacted(self, files: Mapping[str, SeenFile], pack: PackWriter) -> dict[str, SeenFile]:
        """The same files; where they lie in many packs, the pieces of small packs are copied into the new one."""
        sizes: dict[str, int] = {}
        for file in files.values():
            for piece in file.pieces:
                sizes[piece.pack] = sizes.get(piece.pack, 0) + piece.count
        if len(sizes) < _MANY_PACKS:
            return dict(files)
        small = {name for name, size in sizes.items() if 2 * size <= max(sizes.values())}

        def moved(piece: Piece) -> Piece:
            return pack.add(self.records(piece)) if piece.pack in small else piece

        return {
            path: SeenFile(file.signature, tuple(moved(piece) for piece in file.pieces)) for path, file in files.items()
        }


class PackWriter:
    """Writes the pieces of a round one after another; `close` makes them readable."""

    def __init__(self, store: StateStore) -> None:
        self.name = f"{uuid.uuid4().hex}.records"
        self._uri = f"{store.uri}/{self.name}"
        self._remote = artifacts.local_path(self._uri) is None
        local = artifacts.local_path(self._uri)
        self._path = Path(tempfile.mkdtemp(prefix="mim-ray-refresh-")) / self.name if local is None else local
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = self._path.open("wb")
        self._size = 0

    def add(self, records: Records) -> Piece:
        """Append records."""
        start = self._size
        for column in records:
            self._size += self._file.write(np.ascontiguousarray(column).data)
        self._size += self._file.write(bytes(-self._size % 8))
        return Piece(self.name, start, len(records.ids))

    def close(self) -> None:
        """What was added is stored."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._remote:
            artifacts.upload(self._path, self._uri)
            shutil.rmtree(self._path.parent, ignore_errors=True)


def vanished(old: Sequence[Records], new: Sequence[Records], kept: Sequence[Records]) -> Iterator[np.ndarray]:
    """Id hashes that are in `old` and in neither of the others; ascending, in parts."""
    for low, high in _ranges([*old, *new]):
        gone = np.setdiff1d(_ids(old, low, high), _ids(new, low, high))
        for records in kept:
            gone = gone[~contained(gone, records.ids)]
        if len(gone):
            yield gone


def repeated(new: Sequence[Records], kept: Sequence[Records]) -> list[np.ndarray]:
    """For each of `new` the ascending numbers of rows whose id an earlier row of `new`, or one of `kept`, has.

    Equal hashes count as equal ids.
    """
    found: list[list[np.ndarray]] = [[] for _ in new]
    for low, high in _ranges(new):
        parts = [records.cut(low, high) for records in new]
        owners = np.repeat(np.arange(len(parts)), [len(part.ids) for part in parts])
        ids, rows = np.concatenate([part.ids for part in parts]), np.concatenate([part.rows for part in parts])
        order = np.argsort(ids, kind="stable")
        ids, owners, rows = ids[order], owners[order], rows[order]
        again = np.zeros(len(ids), bool)
        again[1:] = ids[1:] == ids[:-1]
        for records in kept:
            others = records.cut(low, high).ids
            again |= contained(ids, others[contained(others, ids)] if len(others) < len(ids) else others)
        for number in np.unique(owners[again]):
            found[number].append(rows[again & (owners == number)])
    return [np.sort(np.concatenate(parts)) if parts else np.empty(0, np.uint32) for parts in found]


def contained(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """(n,) bool: which values are in the sorted array."""
    if not len(ascending):
        return np.zeros(len(values), bool)
    place = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return np.asarray(ascending[place] == values)


def _ids(pieces: Sequence[Records], low: int, high: int) -> np.ndarray:
    parts = [records.cut(low, high).ids for records in pieces]
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint64)


def _ranges(pieces: Sequence[Records]) -> Iterator[tuple[int, int]]:
    """The hash space in equal ranges of about RECORDS_AT_ONCE records."""
    total = sum(len(piece.ids) for piece in pieces)
    num = 1 + total // RECORDS_AT_ONCE
    for number in range(num if total else 0):
        yield number * 2**64 // num, (number + 1) * 2**64 // num
