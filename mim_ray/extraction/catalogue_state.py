"""What the catalogue said at the last refresh: 20 bytes a row, so that the next one knows which *rows* changed.

A file that was written again may hold a million rows of which ten differ (a MERGE, a nightly dump). A record is (hash of the
id, hash of the row's content, row number); the records of a file, sorted by id hash, are a *piece*. Pieces lie one after
another in packs, memory-mapped files below center/refresh/<encoder version>; `state.json` names the pieces of each catalogue
file and is replaced last, when everything of a round is in the table. A lost state costs one comparison of the whole
catalogue with the table, nothing else.

What a change feed tells since then is noted beside it, one record an id, and stands above what the files said; the files' records
stay as they are until files are compared again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mim_ray import artifacts
from mim_ray.extraction.records import Records, newest

FORMAT = 2
_MANY_PACKS = 16


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
        files: when they were last compared. feed: what the change feed told since then, oldest first.
    """

    catalogue: str
    identity: str
    version: int | None
    settings: str
    listed_at: int
    table_version: int
    num_rows: int
    files: Mapping[str, SeenFile] = field(default_factory=dict)
    feed: tuple[Piece, ...] = ()

    @property
    def file_pieces(self) -> Iterable[Piece]:
        return (piece for file in self.files.values() for piece in file.pieces)

    def unusable(self, catalogue: str, settings: str, table_version: int) -> str | None:
        """Why a catalogue must not be compared with this state; None if it may."""
        if self.catalogue != catalogue:
            return f"The catalogue was {self.catalogue}"
        if self.settings != settings:
            return "Settings that decide embeddings changed"
        if table_version < self.table_version:
            return "The table is not the one of the last refresh"
        return None

    @property
    def packs(self) -> set[str]:
        return {piece.pack for piece in (*self.file_pieces, *self.feed)}


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
        feed = tuple(Piece(*piece) for piece in value.pop("feed"))
        return CatalogueState(**value, files=files, feed=feed)

    def write(self, state: CatalogueState) -> None:
        """Switch to this state, then delete packs that it does not name."""
        value: dict[str, Any] = {key: getattr(state, key) for key in CatalogueState.__dataclass_fields__}
        value["files"] = {path: [file.signature, _described(file.pieces)] for path, file in state.files.items()}
        value["feed"] = _described(state.feed)
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

    def rows_of(self, state: CatalogueState, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many rows the catalogue had with each of these id hashes (ascending), and the hash of the content of one."""
        counts, contents = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.uint64)
        for piece in state.file_pieces:
            records = self.records(piece)
            first, end = (np.searchsorted(records.ids, ids, side) for side in ("left", "right"))
            counts += end - first
            contents[end > first] = records.contents[first[end > first]]
        for piece in state.feed:
            records = self.records(piece)
            first, end = (np.searchsorted(records.ids, ids, side) for side in ("left", "right"))
            there = end > first
            counts[there], contents[there] = records.rows[first[there]], records.contents[first[there]]
        return counts, contents

    def with_feed(self, feed: tuple[Piece, ...], records: Records, pack: PackWriter) -> tuple[Piece, ...]:
        """What the feed told, with newer records. Pieces grow as they age, so that there are few and each is copied seldom."""
        kept = list(feed)
        while kept and kept[-1].count <= 2 * len(records.ids):
            records = newest([self.records(kept.pop()), records])
        return (*kept, pack.add(records)) if len(records.ids) else feed


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


def _described(pieces: Iterable[Piece]) -> list[list[Any]]:
    return [[piece.pack, piece.start, piece.count] for piece in pieces]
