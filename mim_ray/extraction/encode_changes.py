"""What a refresh hands to the encoder pool and writes into the log: units of chosen rows, deletions, and what came of them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import ray

from mim_ray import artifacts
from mim_ray.config.scenario import Extraction
from mim_ray.data.ids import hash_ids
from mim_ray.extraction.chosen import ChosenRows, Gathered
from mim_ray.extraction.comparison import Changes, deletion_rows
from mim_ray.extraction.embed import Work
from mim_ray.extraction.plan import Unit
from mim_ray.extraction.read import Decoding
from mim_ray.extraction.records import contained
from mim_ray.extraction.write import Committer, ShardFile, read_rejects_file
from mim_ray.representation_center.data_files import Fragment, write_fragment
from mim_ray.representation_center.known_content import KnownContent
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.runtime.progress import Progress


@dataclass
class Encoded:
    """What became of a round's rows.

    Attributes:
        rejects: (key, reason, detail). lost: deletion rows of items that have no usable content any more.
    """

    num_encoded: int = 0
    num_copied: int = 0
    rejects: list[tuple[str, str, str]] = field(default_factory=list)
    lost: pa.Table = field(default_factory=lambda: deletion_rows([], []))

    def add(self, file: ShardFile) -> None:
        """Count a finished shard, and take its rejects in."""
        self.num_copied += file.num_copied
        self.num_encoded += file.fragment.num_rows - file.num_copied
        if file.rejects is not None:
            rows = read_rejects_file(file.rejects)
            self.rejects += zip(*(rows[name].to_pylist() for name in ("key", "reason", "detail")), strict=True)
            artifacts.remove(file.rejects)

    def find_lost(self, known: KnownContent) -> None:
        """Items that are known, but of which nothing can be shown now."""
        ids = pa.array([key for key, reason, _ in self.rejects if reason == "no content"], pa.string())
        state = known.look_up(ids)
        there = np.asarray(state.hashes.is_valid(), bool)
        self.lost = deletion_rows(ids.filter(pa.array(there)).to_pylist(), state.content_at[there])


def encode_changes(
    changes: Changes,
    known: KnownContent,
    table: EmbeddingTable,
    run: Callable[[Iterator[Unit], Work], Iterator[ShardFile]],
    *,
    rejects: str,
    decoding: Decoding,
    settings: Extraction,
    warm_rows: int,
    identity: str,
    check: Callable[[], None],
) -> Encoded:
    """Encode and commit upserts and deletions: few changes in one commit, many as they are finished.

    Args:
        run: the encoder pool's. rejects: folder for files of rejects. identity: of what decides embeddings.
        check: raises when commits are no longer allowed.
    """
    result = Encoded()
    few = changes.num_to_encode <= warm_rows
    fragments: list[Fragment] = []
    if changes.changes:
        snapshot = known.snapshot
        exact = snapshot is not None and snapshot.dtype == "float32" and settings.reuse_snapshot
        work = Work(
            encoder_version=known.encoder_version,
            decoding=decoding,
            batch_size=settings.batch_size,
            table=table.uri,
            rejects=rejects,
            snapshot=snapshot.uri if snapshot is not None and exact else None,
        )
        check()
        with contextlib.ExitStack() as stack:
            if not few:
                committer = stack.enter_context(Committer(table, settings.commit_every_s))
                progress = stack.enter_context(Progress("refresh", total=changes.num_to_encode, unit="items"))
            for file in run(units(changes.changes, few, settings.shard_rows, identity), work):
                result.add(file)
                if few:
                    fragments.append(file.fragment)
                else:
                    committer.add([file.fragment])
                    progress.add(file.num_rows)
    result.find_lost(known)
    gone = pa.concat_tables([changes.deletions, result.lost])
    if gone.num_rows and known.snapshot is not None:  # of nothing nothing is deleted
        fragments.append(write_deletions(table.uri, known.encoder_version, gone, known.snapshot.width))
    if fragments:
        check()
        table.commit(fragments)
    return result


def rejects_left(earlier: pa.Table, changes: Changes) -> pa.Table:
    """Of the rejects of earlier rounds those whose rows did not change or vanish."""
    void = np.unique(np.concatenate([np.empty(0, np.uint64), *changes.void_rejects]))
    keep = ~contained(hash_ids(earlier["key"]), void)
    for row, (key, reason) in enumerate(zip(earlier["key"].to_pylist(), earlier["reason"].to_pylist(), strict=True)):
        if reason == "no item id":
            keep[row] = key.rpartition(": row ")[0] in changes.kept
    return earlier.filter(pa.array(keep))


def units(changes: Sequence[ChosenRows], few: bool, max_shard_rows: int, identity: str) -> Iterator[Unit]:
    """Units whose shards' ids follow from the rows: what a killed round committed is not committed again."""
    num_rows = sum(chosen.num_rows for chosen in changes)
    groups = [tuple(changes)] if few else [(chosen,) for chosen in changes]
    shard_rows = max_shard_rows
    if few:  # all actors get some
        at_once = int(ray.cluster_resources().get("CPU", 1)) or 1
        shard_rows = min(shard_rows, max(16, -(-num_rows // (2 * at_once))))
    for parts in groups:
        rows = Gathered(parts)
        content = artifacts.fingerprint(identity, shard_rows, [_described(part) for part in parts])
        yield Unit(rows, content, shard_rows, np.arange(0, rows.num_rows, shard_rows), np.empty(0, np.int64))


def _described(part: ChosenRows) -> list[object]:
    digest = hashlib.blake2b(digest_size=16)
    for array in (part.rows, part.content_at):
        digest.update(b"all" if array is None else np.ascontiguousarray(array).tobytes())
    return [part.shard.source, part.shard.first_row, part.floor, digest.hexdigest()]


def write_deletions(table: str, encoder_version: str, gone: pa.Table, width: int) -> Fragment:
    """A file of deletions. Their vectors are zeros: a row has its encoder version's width, whatever it says."""
    num = gone.num_rows
    keys = gone.sort_by("item_id")
    zeros = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(num * width, np.float32)), width)
    rows = pa.table(
        {
            "item_id": keys["item_id"],
            "embedding": zeros,
            "content_hash": pa.nulls(num, pa.string()),
            "content_at": keys["content_at"],
            "deleted": pa.repeat(pa.scalar(True), num),
        }
    )
    shard_id = artifacts.fingerprint(encoder_version, [str(column.to_pylist()) for column in keys.columns])
    return write_fragment(table, rows, encoder_version=encoder_version, shard_id=shard_id)
