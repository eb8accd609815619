"""How a client on a parameter machine's node reads its mappings: a control file per machine, and views of what it names.

    control = Control.create(folder); control.publish(part)       # the machine, whenever it switches releases
    view = View.open([folder of shard 0, …])                        # the client
    view.fresh_shards(table, freshness_s); view.get(table, keys)      # not there: ask a machine

A machine's folder holds `control` (mapped: a generation number and a heartbeat), `view-<generation>.json` (serial and release, and the
overlays' folders) and those overlays. A view is one release throughout.
"""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mim_ray import artifacts
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.layered_rows import Embeddings, LayeredRows
from mim_ray.representation_center.machine_release import MachineRelease
from mim_ray.representation_center.machine_tables import ReleasePart
from mim_ray.representation_center.overlay import Overlay
from mim_ray.representation_center.snapshot import Snapshot


class Control:
    """Two mapped numbers of one machine: the generation, which grows with every release it switches to, and its last beat."""

    def __init__(self, folder: Path, buffer: mmap.mmap) -> None:
        self.folder = folder
        self._numbers = np.frombuffer(buffer, np.int64, 2)

    @classmethod
    def create(cls, folder: Path) -> Control:
        """The machine's side. One that a machine before left goes on from its number."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(folder / "control", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(handle, 0, mmap.PAGESIZE)
            return cls(folder, mmap.mmap(handle, mmap.PAGESIZE))
        finally:
            os.close(handle)

    @classmethod
    def open(cls, folder: Path) -> Control:
        """The reader's side.

        Raises:
            ArtifactError: there is none.
        """
        try:
            with (folder / "control").open("rb") as file:
                return cls(folder, mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{folder} holds no parameter machine's files ({error}).") from None

    @property
    def generation(self) -> int:
        return int(self._numbers[0])

    @property
    def last_beat_ns(self) -> int:
        """System-wide monotonic time at which the machine was alive."""
        return int(self._numbers[1])

    def beat(self) -> None:
        self._numbers[1] = time.monotonic_ns()

    def publish(self, part: ReleasePart) -> None:
        """Let readers switch to this part."""
        generation = self.generation + 1
        overlays = {name: str(table.overlay.folder) for name, table in part.tables.items()}
        value = {"serial": part.serial, "release": part.release.to_json(), "overlays": overlays}
        artifacts.write_bytes(str(self.folder / f"view-{generation}.json"), json.dumps(value).encode())
        self.beat()
        self._numbers[0] = generation
        (self.folder / f"view-{generation - 1}.json").unlink(missing_ok=True)


@dataclass(frozen=True)
class View:
    """One release as mapped by this process: the shards whose machines on this node have published it.

    Attributes:
        generations: of the machines' controls when the view was opened.
    """

    serial: int
    release: MachineRelease
    generations: Sequence[tuple[Control, int]]
    tables: dict[str, LayeredRows]

    @classmethod
    def open(cls, controls: Sequence[Control | None]) -> View | None:
        """
        Args:
            controls: of a machine of each shard; None where there is none on this node.

        Returns:
            a view of the newest release that any of them has published; None if nothing can be read.
        """
        found: dict[int, tuple[Control, int, dict[str, Any]]] = {}
        for number, control in enumerate(controls):
            if control is not None:
                generation = control.generation
                try:
                    value = json.loads((control.folder / f"view-{generation}.json").read_text())
                except (OSError, ValueError):
                    continue  # the machine is away, or has just switched again
                found[number] = (control, generation, value)
        if not found:
            return None
        serial = max(value["serial"] for _, _, value in found.values())
        found = {shard: entry for shard, entry in found.items() if entry[2]["serial"] == serial}
        release = MachineRelease.from_json(next(iter(found.values()))[2]["release"])
        tables = {}
        try:
            for name, source in release.tables.items():
                overlays: list[Overlay | None] = [None] * len(controls)
                for shard, (_, _, value) in found.items():
                    overlays[shard] = Overlay.open(Path(value["overlays"][name]))
                if len(found) < len(controls) and artifacts.local_path(source.snapshot) is None:
                    return None  # this node has a part of the snapshot only, and would download the rest
                tables[name] = LayeredRows(Snapshot.open(source.snapshot, verify=False), overlays)
        except ArtifactError:
            return None  # retired meanwhile: the next call sees the newer one
        return cls(serial, release, [(control, generation) for control, generation, _ in found.values()], tables)

    @property
    def outdated(self) -> bool:
        """Whether one of its machines has published another release, or has come back, since."""
        return any(control.generation != generation for control, generation in self.generations)

    def fresh_shards(self, table: str, freshness_s: float) -> list[bool]:
        """(S,) whether each shard can be read here and its machine has looked for new rows within that time.

        Raises:
            KeyError: the release has no such table.
        """
        oldest = time.monotonic_ns() - int(freshness_s * 1e9)
        return [
            overlay is not None and overlay.synced_ns >= oldest and not overlay.retired
            for overlay in self.tables[table].overlays
        ]

    def is_fresh(self, table: str, freshness_s: float) -> bool:
        """Whether the release has the table, and all of its shards are."""
        return table in self.tables and all(self.fresh_shards(table, freshness_s))

    def get(self, table: str, keys: pa.LargeStringArray) -> Embeddings:
        """As `LayeredRows.get`, with all rows published until now; for keys of shards that can be read here."""
        rows = self.tables[table]
        for overlay in rows.overlays:
            if overlay is not None:
                overlay.poll()
        return rows.get(keys)
