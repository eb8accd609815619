"""Incremental MFM (paper Section 3.5): bring table and snapshot up to a catalogue that never stops changing.

    with Refresher(items, center, encoder=…, …) as refresher:
        refresher.round()            # what changed since the last one; call it as often as you like

A round finds changes (changes.py), encodes and commits them with their deletions, builds a snapshot where the table moved,
and notes last what the catalogue said. Killed anywhere, the next round finds what is left: what was committed is known, so it
is not encoded again. Few changes go through actors that stay alive (warm_pool.py), many through the pipeline of run.py.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from types import TracebackType

import numpy as np
import pyarrow as pa

from mim_ray import artifacts
from mim_ray.config.scenario import Extraction, Refresh, Scenario
from mim_ray.data.ids import hash_ids
from mim_ray.data.listing import Listing, list_table, table_version
from mim_ray.data.rejects import read_rejects, reject_rows, write_rejects
from mim_ray.data.sources import require_table
from mim_ray.errors import DataError
from mim_ray.extraction.catalogue_state import CatalogueState, PackWriter, StateStore, contained
from mim_ray.extraction.changes import Changes, find_changes
from mim_ray.extraction.embed import Encode, load_encoder
from mim_ray.extraction.few import Encoded, deletion_table, encode_few
from mim_ray.extraction.many import encode_many
from mim_ray.extraction.read import Decoding
from mim_ray.extraction.run import cpu_shares, decoding_of, describe_encoder
from mim_ray.extraction.warm_pool import WarmPool
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.data_files import write_fragment
from mim_ray.representation_center.known_content import KnownContent
from mim_ray.representation_center.snapshot_line import POINTER, current_snapshot
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.runtime.lease import Lease

STAGE = "refresh"
MANY_DELETIONS = 100


@dataclass(frozen=True)
class Round:
    """What a round found and did.

    Attributes:
        unchanged: items of the catalogue that needed nothing. older: changes that are older than what is known of the item.
        copied: items whose content was known from another one. rejected: of this round's rows, by reason.
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
        self._pool: WarmPool | None = None
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
        done = Round()
        if state is None or not self._is_same(state):
            listing = list_table(self.items, "items")
            done = self._apply(listing, state, now)
        else:
            done = Round(unchanged=state.num_rows)
        snapshot, built = self._snapshot()
        seconds = time.monotonic() - start
        return Round(**asdict(done) | {"seconds": seconds, "snapshot": snapshot, "built": built, "notes": notes})

    def _usable_state(self, full: bool) -> tuple[CatalogueState | None, tuple[str, ...]]:
        """The last state, if the catalogue may be compared with it, and why not."""
        state = self._state
        if state is None:
            return None, ("No refresh before: the whole catalogue is compared with the table.",)
        if full:
            return None, ("The whole catalogue is compared with the table, as asked for.",)
        if state.catalogue != self.items:
            return None, (f"The catalogue was {state.catalogue}: all of the new one is compared with the table.",)
        if state.settings != self._identity:
            return None, ("Settings that decide embeddings changed: the whole catalogue is compared with the table.",)
        if self.table.version < state.table_version:
            return None, ("The table is not the one of the last refresh: the whole catalogue is compared with it.",)
        return state, ()

    def _is_same(self, state: CatalogueState) -> bool:
        """Whether the catalogue is a Delta table that has no new version."""
        return table_version(self.items) == (state.identity, state.version)

    def _apply(self, listing: Listing, state: CatalogueState | None, now: int) -> Round:
        if state is not None and state.identity != listing.identity:
            state = None  # dropped and made again under the same name
        self._snapshot(only_first=True)  # so that what is known is mapped, not loaded
        known = KnownContent(self.table, f"{self._center}/window", self.encoder_version, line=self.line)
        earlier = read_rejects(self._rejects, STAGE)
        pack = PackWriter(self._store)
        _, task_cpus = cpu_shares(self._settings)
        changes = find_changes(
            listing,
            state,
            self._store,
            pack,
            self.table,
            known,
            self._decoding,
            rejected=np.unique(hash_ids(earlier["key"])),
            now=now,
            warm_rows=self._refresh.warm_rows,
            scan_cpus=task_cpus,
        )
        self._check_deletions(changes, known)
        encoded = self._encode(changes, known)
        rejects = reject_rows(STAGE, "items", [*changes.rejects, *encoded.rejects])
        self._write_rejects(earlier if state is not None else earlier.slice(0, 0), rejects, changes)
        self._state = CatalogueState(
            catalogue=self.items,
            identity=listing.identity,
            version=listing.version,
            settings=self._identity,
            listed_at=now,
            table_version=self.table.version,
            num_rows=changes.num_rows,
            files=changes.files,
        )
        self._lease.check()
        self._store.write(self._state)
        num_changed = changes.num_changed - encoded.num_same
        return Round(
            new=changes.num_new,
            changed=num_changed,
            deleted=changes.deletions.num_rows + encoded.lost.num_rows,
            unchanged=changes.num_rows - changes.num_new - num_changed - changes.num_older,
            older=changes.num_older,
            encoded=encoded.num_encoded,
            copied=encoded.num_copied,
            rejected=dict(Counter(rejects["reason"].to_pylist())),
        )

    def _check_deletions(self, changes: Changes, known: KnownContent) -> None:
        gone = changes.deletions.num_rows
        shown = known.snapshot.num_rows if known.snapshot is not None else 0
        if gone > max(MANY_DELETIONS, self._refresh.max_deleted_ratio * shown):
            raise DataError(
                f"{self.items} lacks {gone:,} of {shown:,} known items, more than refresh.max_deleted_ratio = "
                f"{self._refresh.max_deleted_ratio}. Nothing was changed. If they are really gone, run it once with "
                "refresh.max_deleted_ratio=1."
            )

    def _encode(self, changes: Changes, known: KnownContent) -> Encoded:
        """Encode and commit upserts and deletions."""
        if changes.num_to_encode > self._refresh.warm_rows:
            self._cool()
            self._lease.check()
            encoded = encode_many(
                changes.changes,
                known,
                self.table,
                encoder=self._encoder,
                encoder_version=self.encoder_version,
                decoding=self._decoding,
                settings=self._settings,
                rejects=f"{self._center}/rejects/{self.encoder_version}",
                load=self._load,
            )
        else:
            _, task_cpus = cpu_shares(self._settings)
            encoded = encode_few(
                changes.changes, known.snapshot, self._warm_pool, self._decoding, self._settings, task_cpus
            )
        gone = pa.concat_tables([changes.deletions, encoded.lost])
        if gone.num_rows:
            assert known.snapshot is not None  # of nothing nothing is deleted
            encoded.tables.append(deletion_table(gone, known.snapshot.width))
        if encoded.tables:
            self._commit(pa.concat_tables(encoded.tables))
        return encoded

    def _commit(self, rows: pa.Table) -> None:
        """One commit, under an id that follows from the rows: a round made again adds nothing twice."""
        keys = rows.select(["item_id", "content_hash", "content_at", "deleted"]).sort_by("item_id")
        shard_id = artifacts.fingerprint(self.encoder_version, [str(column.to_pylist()) for column in keys.columns])
        fragment = write_fragment(self.table.uri, rows, encoder_version=self.encoder_version, shard_id=shard_id)
        self._lease.check()
        self.table.commit([fragment])

    def _write_rejects(self, earlier: pa.Table, rejects: pa.Table, changes: Changes) -> None:
        """What is rejected now: what was, less what changed or vanished, and this round's."""
        void = np.unique(np.concatenate([np.empty(0, np.uint64), *changes.void_rejects]))
        keep = ~contained(hash_ids(earlier["key"]), void)
        for row, (key, reason) in enumerate(
            zip(earlier["key"].to_pylist(), earlier["reason"].to_pylist(), strict=True)
        ):
            if reason == "no item id":
                keep[row] = key.rpartition(": row ")[0] in changes.kept
        left = pa.concat_tables([earlier.filter(pa.array(keep)), rejects])
        if left.num_rows != earlier.num_rows or rejects.num_rows or not keep.all():
            write_rejects(self._rejects, STAGE, left)

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

    def _warm_pool(self) -> WarmPool:
        if self._pool is None:
            actor_cpus, _ = cpu_shares(self._settings)
            size = self._decoding.picture.size
            self._pool = WarmPool(self._settings, actor_cpus, self._encoder, size, self._load)
        return self._pool

    def _cool(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None
