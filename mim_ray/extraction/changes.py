"""What changed in the catalogue since the last refresh, from its files.

A row is a candidate when the files that changed hold it and the files they replace did not (catalogue_state.py): a file that was
written again may hold a million rows of which ten differ. comparison.py says what of the candidates is encoded.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pyarrow as pa

from mim_ray.data.ids import hash_ids
from mim_ray.data.listing import Listing
from mim_ray.extraction.catalogue_state import CatalogueState, PackWriter, Piece, SeenFile, StateStore
from mim_ray.extraction.comparison import SCAN_ROWS, Changes, Clock, Looking, compare, delete
from mim_ray.extraction.records import Records, contained, newest, repeated, vanished
from mim_ray.extraction.scanners import Looked
from mim_ray.representation_center.known_content import KnownContent
from mim_ray.representation_center.snapshot import NO_TIME
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.runtime.progress import Progress

MAX_PAIRS = 16_000_000  # 128 MB for each node; when more rows were replaced, all of them are compared with the table
SHOWN_ROWS = 200_000  # a shorter comparison shows no progress


def find_changes(
    listing: Listing,
    state: CatalogueState | None,
    store: StateStore,
    pack: PackWriter,
    table: EmbeddingTable,
    known: KnownContent,
    looking: Looking,
) -> Changes:
    """Compare the catalogue with the last state, and what differs with what is known.

    Args:
        state: None: compare the whole catalogue with the table.
    """
    before = {} if state is None else state.files
    told = newest([store.records(piece) for piece in state.feed] if state is not None else [])

    def is_kept(path: str, file: SeenFile) -> bool:
        there = path in listing.files and listing.files[path].signature == file.signature
        return there and not any(contained(store.records(piece).ids, told.ids).any() for piece in file.pieces)

    kept = {} if looking.full else {path: file for path, file in before.items() if is_kept(path, file)}
    fresh = listing.files.keys() - kept.keys()
    clock = Clock(looking.now, NO_TIME if state is None else state.listed_at)
    found = Changes(store.compacted(kept, pack), frozenset(kept))
    replaced = [store.records(piece) for path, file in before.items() if path not in kept for piece in file.pieces]
    old = [*(records.without(told.ids) for records in replaced), told.where(told.rows == 1)]
    pairs = None
    if state is not None and not looking.full and sum(len(records.ids) for records in old) <= MAX_PAIRS:
        pairs = np.sort(np.concatenate([np.empty(0, np.uint64), *(records.pairs for records in old)]))
    rejected = looking.rejected
    shards = listing.shards(fresh, SCAN_ROWS) if fresh else []
    pieces: list[Piece] = []
    starts: dict[str, int] = {}
    read_again = 0
    if shards:
        with contextlib.ExitStack() as stack:
            total = sum(shard.num_rows for shard in shards)
            progress = Progress("compare", total=total, unit="rows")
            if total > SHOWN_ROWS:
                stack.enter_context(progress)
            slices = [Looked(shard) for shard in shards]
            for shard, scanned, carried in looking.scanners.scan(slices, pairs, looking.decoding, looking.warm_rows):
                pieces.append(pack.add(scanned.records))
                found.void_rejects.append(rejected[np.isin(rejected, hash_ids(scanned.ids))])
                starts.setdefault(shard.source, shard.first_row)
                changed_at = listing.files[shard.source].changed_at
                compare(
                    shard, starts[shard.source], changed_at, scanned, carried, known, looking.decoding, clock, found
                )
                read_again = found.limit_content(read_again, looking.warm_rows)
                if total > SHOWN_ROWS:
                    progress.add(scanned.num_rows)
    pack.close()
    for path in fresh:
        own = tuple(piece for shard, piece in zip(shards, pieces, strict=True) if shard.source == path)
        found.files[path] = SeenFile(listing.files[path].signature, own)
    stay = [store.records(piece) for file in kept.values() for piece in file.pieces]
    new = [store.records(piece) for piece in pieces]
    found.num_rows = sum(len(records.ids) for records in [*stay, *new])
    if found.changes:
        _drop_repeated(found, known, {id(shard): rows for shard, rows in zip(shards, repeated(new, stay), strict=True)})
    if state is not None:
        gone = vanished(old, new, stay)
        came = [file.changed_at for path, file in listing.files.items() if path in fresh]
        deleted_at = clock.floor(max([NO_TIME, *came]) if listing.committed_at is None else listing.committed_at)
    else:
        gone = vanished([_as_records(known.id_hashes())], new, stay)
        deleted_at = looking.now
    for hashes in gone:
        found.void_rejects.append(rejected[contained(rejected, hashes)])
        delete(hashes, None if state is not None else table, known, deleted_at, clock, found)
    return found


def _drop_repeated(found: Changes, known: KnownContent, repeated_rows: dict[int, np.ndarray]) -> None:
    """Take out rows whose item another row of the catalogue is used for."""
    left = []
    for chosen in found.changes:
        again = repeated_rows[id(chosen.shard)]
        rows = np.arange(chosen.num_rows) if chosen.rows is None else chosen.rows
        drop = np.isin(rows, again) if len(again) else np.zeros(len(rows), bool)
        if drop.any():
            ids = chosen.shard.read(["item_id"])["item_id"].take(pa.array(rows[drop]))
            found.rejects += [
                (item, "duplicate item id", "another row with this id is used") for item in ids.to_pylist()
            ]
            existed = len(ids) - known.look_up(ids).hashes.null_count
            found.num_changed -= existed
            found.num_new -= len(ids) - existed
        if not drop.all():
            left.append(chosen.keep(~drop) if drop.any() else chosen)
    found.changes = left


def _as_records(id_hashes: np.ndarray) -> Records:
    return Records(id_hashes, id_hashes[:0], id_hashes[:0])
