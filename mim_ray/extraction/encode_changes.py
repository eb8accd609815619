"""What a refresh hands to the encoder pool and writes into the log: units of chosen rows, deletions, and what came of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import ray

from mim_ray import artifacts
from mim_ray.extraction.changes import deletion_rows
from mim_ray.extraction.chosen import ChosenRows, Gathered
from mim_ray.extraction.plan import Unit
from mim_ray.extraction.write import ShardFile, read_rejects_file
from mim_ray.representation_center.data_files import Fragment, write_fragment
from mim_ray.representation_center.known_content import KnownContent


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


def _described(part: ChosenRows) -> list[object]:
    digest = hashlib.blake2b(digest_size=16)
    for array in (part.rows, part.content_at):
        digest.update(b"all" if array is None else np.ascontiguousarray(array).tobytes())
    return [part.shard.source, part.shard.first_row, part.floor, digest.hexdigest()]


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
