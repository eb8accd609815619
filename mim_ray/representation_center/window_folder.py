"""Where window segments lie: center/window/<encoder_version>/<ten seconds>/<segment_id>.arrow.

A folder for every ten seconds keeps each listing short, however many segments wait to be folded. A segment id begins with
its time (20 digits of nanoseconds, the first 10 of which are the folder's name), so ids sort by time and name their folder.
A segment that lies directly in the encoder version's folder counts too: put it there by hand to have it folded.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

from mim_ray import artifacts
from mim_ray.representation_center.data_files import segment_time

SUFFIX = ".arrow"
EMPTY_FOLDERS_S = 600.0  # an empty folder is deleted when it is that old: no writer makes files in it any more
SETTLED_NS = 1_000_000_000
RECENT_S = 120  # what is older is looked at less often: only a writer that was held up adds to it
OLDER_EVERY_S = 1.0  # locally: a stat for each folder
FEW_FILES = 2_000  # remotely: the most that are always listed
EVERYTHING_EVERY_S = 30.0

_last_name = 0
_name_lock = threading.Lock()
_synced: set[str] = set()


def new_segment_id() -> str:
    """Sorts by time; unique across processes; increasing within one."""
    global _last_name
    with _name_lock:
        _last_name = max(time.time_ns(), _last_name + 1)
        return f"{_last_name:020d}-{uuid.uuid4().hex[:8]}"


def segment_uri(window: str, encoder_version: str, segment_id: str) -> str:
    return f"{window}/{encoder_version}/{_part(segment_time(segment_id))}/{segment_id}{SUFFIX}"


def write_segment(window: str, encoder_version: str, segment_id: str, content: bytes) -> None:
    """Store a segment so that it survives the process and, locally, a power cut."""
    uri = segment_uri(window, encoder_version, segment_id)
    artifacts.write_bytes(uri, content)
    path = artifacts.local_path(uri)
    if path is not None:
        artifacts.sync(path.parent)
        if str(path.parent) not in _synced:  # the folders' own names
            for folder in list(path.parents)[1:4]:
                artifacts.sync(folder)
            _synced.clear()
            _synced.add(str(path.parent))


def find_segments(window: str, encoder_version: str) -> dict[str, str]:
    """Segment id -> URI of all segments there, oldest first."""
    root = f"{window}/{encoder_version}"
    folder = artifacts.local_path(root)
    if folder is None:
        uris = artifacts.list_files(root, SUFFIX)
    else:
        parts = ["", *_subfolders(folder)]
        uris = [f"{_join(root, part)}/{name}" for part in parts for name in _segment_files(folder / part)]
    return {_segment_id(uri): uri for uri in sorted(uris, key=_segment_id)}


def encoder_versions(window: str) -> list[str]:
    """Encoder versions that have, or had, segments."""
    folder = artifacts.local_path(window)
    if folder is not None:
        return sorted(_subfolders(folder))
    return sorted({uri[len(window) + 1 :].partition("/")[0] for uri in artifacts.list_files(window, SUFFIX)})


def remove_empty_folders(window: str, encoder_version: str) -> None:
    """Delete the folders of times long ago that hold nothing."""
    root = artifacts.local_path(f"{window}/{encoder_version}")
    if root is not None:
        oldest = _part(time.time_ns() - int(EMPTY_FOLDERS_S * 1e9))
        for name in _subfolders(root):
            if name < oldest:
                with suppress(OSError):  # not empty, or gone already
                    (root / name).rmdir()


class WindowListing:
    """New segments of one encoder version since the last look. Only folders that changed are listed."""

    def __init__(self, window: str, encoder_version: str) -> None:
        self._root = f"{window}/{encoder_version}"
        self._folder = artifacts.local_path(self._root)
        self._parts: dict[str, _Part] = {}
        self._parts_since: int | None = None
        self._seen: set[str] = set()
        self._everything_at = float("-inf")  # monotonic time at which all folders were looked at

    def new(self) -> dict[str, str]:
        """Segment id -> URI of those that came since the last call, oldest first."""
        found = self._new_remote() if self._folder is None else self._new_local(self._folder)
        return {_segment_id(uri): uri for uri in sorted(found, key=_segment_id)}

    def _new_local(self, folder: Path) -> list[str]:
        try:
            changed_at = os.stat(folder).st_mtime_ns
        except FileNotFoundError:
            return []
        if changed_at != self._parts_since:
            names = {"", *_subfolders(folder)}
            self._parts = {name: self._parts.get(name) or _Part(folder / name) for name in names}
            self._parts_since = _if_settled(changed_at)
        if time.monotonic() - self._everything_at > OLDER_EVERY_S:
            parts, self._everything_at = list(self._parts), time.monotonic()
        else:
            oldest = _part(time.time_ns() - RECENT_S * 10**9)
            parts = [name for name in self._parts if name >= oldest]
        return [f"{_join(self._root, name)}/{file}" for name in parts for file in self._parts[name].new()]

    def _new_remote(self) -> list[str]:
        """All of it while it is little or some time passed; else the last two minutes' folders."""
        if len(self._seen) <= FEW_FILES or time.monotonic() - self._everything_at > EVERYTHING_EVERY_S:
            uris = set(artifacts.list_files(self._root, SUFFIX))
            fresh, self._seen = uris - self._seen, uris
            self._everything_at = time.monotonic()
        else:
            now = time.time_ns()
            parts = [_part(now + seconds * 10**9) for seconds in range(-RECENT_S, 20, 10)]
            fresh = {uri for part in parts for uri in artifacts.list_files(f"{self._root}/{part}", SUFFIX)} - self._seen
            self._seen |= fresh
        return list(fresh)


class _Part:
    """One local folder of segments."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: set[str] = set()
        self._quiet_since: int | None = None

    def new(self) -> list[str]:
        """Names of the files that came since the last call; costs one stat where nothing changed."""
        try:
            changed_at = os.stat(self._folder).st_mtime_ns
            if changed_at == self._quiet_since:
                return []
            names = set(_segment_files(self._folder))
        except FileNotFoundError:
            return []
        fresh, self._seen = names - self._seen, names
        self._quiet_since = _if_settled(changed_at)
        return list(fresh)


def _if_settled(changed_at: int) -> int | None:
    """A file that comes within the clock tick of this listing would not change the folder's time: then look again later."""
    return changed_at if time.time_ns() - changed_at > SETTLED_NS else None


def _part(time_ns: int) -> str:
    """Name of the folder of the ten seconds around that time."""
    return f"{time_ns:020d}"[:10]


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except FileNotFoundError:
        return []


def _segment_files(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if name.endswith(SUFFIX)]
    except FileNotFoundError:
        return []


def _join(root: str, part: str) -> str:
    return f"{root}/{part}" if part else root


def _segment_id(uri: str) -> str:
    return uri.rpartition("/")[2].removesuffix(SUFFIX)
