"""Incremental MFM (paper Section 3.5): bring table and snapshot up to a catalogue that never stops changing.

    with Refresher(items, center, encoder=…, …) as refresher:
        refresher.round()            # what changed since the last one; call it as often as you like

A round finds changes (feed_changes.py, changes.py), encodes and commits them with their deletions, builds a snapshot where the table moved,
and notes last what the catalogue said. Killed anywhere, the next round finds what is left: what was committed is known, so it
is not encoded again. The encoder's actors (pool.py) stay alive between rounds.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from types import TracebackType

import numpy as np
import pyarrow as pa
import ray

from mim_ray import artifacts
from mim_ray.config.scenario import Extraction, Refresh, Scenario
from mim_ray.data.change_feed import FeedUnusableError
from mim_ray.data.ids import hash_ids
from mim_ray.data.listing import Head, delta_head, list_table
from mim_ray.data.rejects import read_rejects, reject_rows, write_rejects
from mim_ray.data.sources import require_table
from mim_ray.extraction.catalogue_state import CatalogueState, PackWriter, StateStore
from mim_ray.extraction.changes import find_changes
from mim_ray.extraction.comparison import Changes, Looking
from mim_ray.extraction.embed import Encode, Work, load_encoder
from mim_ray.extraction.encode_changes import encode_changes, rejects_left
from mim_ray.extraction.feed_changes import find_feed_changes
from mim_ray.extraction.plan import Unit
from mim_ray.extraction.pool import EncoderPool
from mim_ray.extraction.read import Decoding
from mim_ray.extraction.run import decoding_of, describe_encoder, encoder_pool
from mim_ray.extraction.scanners import Scanners
from mim_ray.extraction.write import ShardFile
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.known_content import KnownContent
from mim_ray.representation_center.snapshot_line import POINTER, current_snapshot
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.runtime.cluster import user_error
from mim_ray.runtime.lease import Lease

STAGE = "refresh"


@dataclass(frozen=True)
class Round:
    """What a round found and did.

    Attributes:
        unchanged: items of the catalogue that needed nothing. older: changes that are older than what is known of the item.
        copied: items whose content was known from another one. rejected: of this round's rows, by reason.
        seconds: of the whole round; snapshot_s: of them for a snapshot.
        snapshot: id of the newest one, None where there is none. built: whether this round made it.
        notes: sentences for a person.
    """

    new: int = 0
    changed: int = 0
    deleted: int = 0
    unchanged: int = 0
    older: int = 0
    encoded: int = 0
    copied: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    snapshot: str | None = None
    built: bool = False
    snapshot_s: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def found_changes(self) -> bool:
        return bool(self.new or self.changed or self.deleted)


def open_refresher(scenario: Scenario, *, data_root: str, encoder: str, center: str, rejects: str) -> Refresher:
    """The refresher of a scenario's run, for the encoder saved at `encoder`.

    Raises:
        DataError: there is no items table. ArtifactError: there is no usable encoder.
    """
    version, picture = describe_encoder(encoder)
    settings = scenario.extraction
    return Refresher(
        require_table(data_root, "items"),
        center,
        encoder=encoder,
        encoder_version=version,
        decoding=decoding_of(scenario.data, data_root, picture),
        settings=settings,
        refresh=scenario.refresh,
        rejects=rejects,
        load=partial(load_encoder, precision=settings.precision, compile=settings.compile),
    )


class Refresher:
    """Refreshes one encoder version in one representation center. Ray must be running.

    Args:
        items: URI of the items table, Parquet or Delta.
        encoder: URI that `load` understands. rejects: URI of the table of rejects.
        pool, scanners: of actors that are running (and hold this encoder) already; without, they are started when a round
            first needs them.

    Raises:
        LeaseTakenError: on entry, another refresh of this encoder version is at work.
    """

    def __init__(
        self,
        items: str,
        center: str,
        *,
        encoder: str,
        encoder_version: str,
        decoding: Decoding,
        settings: Extraction,
        refresh: Refresh,
        rejects: str,
        load: Callable[[str, bool], Encode] = load_encoder,
        pool: EncoderPool | None = None,
        scanners: Scanners | None = None,
    ) -> None:
        self.items, self._center = items, center
        self.encoder_version, self._encoder, self._load = encoder_version, encoder, load
        self._decoding = decoding
        self._settings, self._refresh, self._rejects = settings, refresh, rejects
        self.table = EmbeddingTable(f"{center}/table")
        self.line = f"{center}/snapshots/{encoder_version}"
        folder = f"{center}/refresh/{encoder_version}"
        self._store = StateStore(f"{folder}/catalogue")
        self._state: CatalogueState | None = None
        self._lease = Lease(f"{folder}/lease", what="refresh")
        self._pool, self._own_pool = pool, pool is None
        self._scanners, self._own_scanners = scanners or Scanners(), scanners is None
        self._identity = artifacts.fingerprint(encoder_version, asdict(decoding))
        self._built_at = float("-inf")

    def __enter__(self) -> Refresher:
        self._lease.__enter__()
        try:
            self.table.create()
            self._state = self._store.read()
        except BaseException:
            self._lease.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._cool()
        if self._own_scanners:
            self._scanners.close()
        self._lease.__exit__(kind, error, tb)

    def round(self, *, full: bool = False) -> Round:
        """One refresh.

        Args:
            full: compare the whole catalogue with the table, whatever was noted; for pictures that changed behind their
                image_uri, and for doubts.

        Raises:
            DataError: the catalogue cannot be used, or lost too much at once. LeaseTakenError: the lease was lost.
        """
        start, now = time.monotonic(), time.time_ns() // 1_000
        state, notes = self._usable_state(full)
        head = delta_head(self.items)
        if full or state is None or head is None or (head.identity, head.version) != (state.identity, state.version):
            done = self._apply(head, state, now, full, notes)
        else:
            done = Round(unchanged=state.num_rows)
        before = time.monotonic()
        snapshot, built = self._snapshot()
        end = time.monotonic()
        return replace(
            done, seconds=end - start, snapshot=snapshot, built=built, snapshot_s=end - before, notes=tuple(notes)
        )

    def _usable_state(self, full: bool) -> tuple[CatalogueState | None, list[str]]:
        """The last state, if the catalogue may be compared with it, and why not."""
        if self._state is None:
            return None, ["No refresh before: the whole catalogue is compared with the table."]
        reason = self._state.unusable(self.items, self._identity, self.table.version)
        if reason is not None:
            return None, [f"{reason}: the whole catalogue is compared with the table."]
        return self._state, ["The whole catalogue is compared with the table, as asked for."] if full else []

    def _apply(self, head: Head | None, state: CatalogueState | None, now: int, full: bool, notes: list[str]) -> Round:
        if state is not None and head is not None and state.identity != head.identity:
            state = None  # dropped and made again under the same name
        self._snapshot(only_first=True)  # so that what is known is mapped, not loaded
        known = KnownContent(self.table, f"{self._center}/window", self.encoder_version, line=self.line)
        earlier = read_rejects(self._rejects, STAGE)
        rejected = np.unique(hash_ids(earlier["key"]))
        looking = Looking(self._decoding, rejected, now, self._refresh.warm_rows, self._scanners, full)
        changes, next_state = self._find(head, state, known, looking, notes)
        changes.check_deletions(self.items, known, self._refresh.max_deleted_ratio)
        encoded = encode_changes(
            changes,
            known,
            self.table,
            self._run,
            rejects=f"{self._center}/refresh/{self.encoder_version}/rejects",
            decoding=self._decoding,
            settings=self._settings,
            warm_rows=self._refresh.warm_rows,
            identity=self._identity,
            check=self._lease.check,
        )
        rejects = reject_rows(STAGE, "items", [*changes.rejects, *encoded.rejects])
        left = rejects_left(earlier if state is not None and not full else earlier.slice(0, 0), changes)
        if left.num_rows != earlier.num_rows or rejects.num_rows:
            write_rejects(self._rejects, STAGE, pa.concat_tables([left, rejects]))
        self._state = replace(next_state, table_version=self.table.version)
        self._lease.check()
        self._store.write(self._state)
        return Round(
            new=changes.num_new,
            changed=changes.num_changed,
            deleted=changes.deletions.num_rows + encoded.lost.num_rows,
            unchanged=changes.num_rows - changes.num_new - changes.num_changed - changes.num_older,
            older=changes.num_older,
            encoded=encoded.num_encoded,
            copied=encoded.num_copied,
            rejected=dict(Counter(rejects["reason"].to_pylist())),
        )

    def _find(
        self, head: Head | None, state: CatalogueState | None, known: KnownContent, looking: Looking, notes: list[str]
    ) -> tuple[Changes, CatalogueState]:
        """What changed, by the change feed if it tells, else by the files; and what to note at the end."""
        pack = PackWriter(self._store)
        if head is not None and state is not None and not looking.full:
            try:
                changes = find_feed_changes(head, state, self._store, pack, known, looking)
                state = replace(state, version=head.version, listed_at=looking.now)
                return changes, replace(state, num_rows=changes.num_rows, feed=changes.feed)
            except FeedUnusableError as error:
                notes.append(f"The catalogue's files are compared: {error}.")
        listing = list_table(self.items, "items")
        changes = find_changes(listing, state, self._store, pack, self.table, known, looking)
        return changes, CatalogueState(
            catalogue=self.items,
            identity=listing.identity,
            version=listing.version,
            settings=self._identity,
            listed_at=looking.now,
            table_version=self.table.version,
            num_rows=changes.num_rows,
            files=changes.files,
        )

    def _run(self, units: Iterator[Unit], work: Work) -> Iterator[ShardFile]:
        try:
            if self._pool is None:
                self._pool = encoder_pool(self._encoder, self._settings, self._load).__enter__()
            yield from self._pool.run(units, work)
        except Exception as error:  # Ray wraps what its workers raise; tell the user's own mistake plainly
            self._cool()
            cause = user_error(error)
            if cause is None:
                raise
            raise cause from None

    def _snapshot(self, *, only_first: bool = False) -> tuple[str | None, bool]:
        """(id of the newest snapshot, whether it was built now), which is done where the table has newer rows."""
        current = current_snapshot(self.line)
        after = -1 if current is None else int(artifacts.read_json(f"{self.line}/{POINTER}")["delta_version"])
        if current is not None and only_first:
            return current, False
        _, files = self.table.scan(self.encoder_version, newer_than=after)
        early = current is not None and time.monotonic() - self._built_at < self._refresh.snapshot_every_s
        if early or not any(file.num_rows for file in files):
            return current, False
        self._lease.check()
        settings = self._settings
        built = build_snapshot(
            self.table, self.encoder_version, self.line, dtype=settings.snapshot_dtype, keep=settings.snapshot_keep
        )
        self._built_at = time.monotonic()
        return built.snapshot_id, True

    def _cool(self) -> None:
        if self._pool is not None and self._own_pool and ray.is_initialized():
            self._pool.__exit__(None, None, None)
            self._pool = None
