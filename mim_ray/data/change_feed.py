"""Rows that the commits of a Delta table changed, from its change data feed.

Where `delta.enableChangeDataFeed` is set, a commit that rewrites files also writes the rows that it changed, as they were and as
they are, into files of their own, which its log entry names (`cdc`). A commit without such files changed what the files say that
it added or removed, unless they are marked as only moving rows (OPTIMIZE).

These files are read as slices, like a table's own: in a fixed order, so that a round that is made again sees the same slices, and
by any process. `DeltaTable.load_cdf` says the same (a test compares them), but as one stream in one process, in no fixed order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as pafs

from mim_ray import artifacts
from mim_ray.data.listing import Head
from mim_ray.data.schema import TABLES
from mim_ray.data.sources import Shard, cut
from mim_ray.errors import ArtifactError, DataError

CHANGE_TYPE = "_change_type"
MAX_COMMITS = 1_000
MAX_ROWS = 4_000_000  # 100 bytes of memory each; with more, comparing files costs no more
_REMOVED = pa.array(["delete", "update_preimage"])


class FeedUnusableError(Exception):
    """The feed does not tell all that changed; the message says why, to be followed by a full stop."""


@dataclass(frozen=True)
class FeedSlice:
    """Some rows of a commit's feed.

    Attributes:
        committed_at: microseconds. came: whether all of them came (True) or went (False); None: each row says it.
        rows: what they are, or were.
    """

    version: int
    committed_at: int
    came: bool | None
    rows: Shard

    def ids(self) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
        """(item ids, bool: whether the row came), in order."""
        if self.came is None:
            table = self.rows.read(["item_id", CHANGE_TYPE])
            return table["item_id"], pc.invert(pc.is_in(table[CHANGE_TYPE], _REMOVED))
        ids = self.rows.read(["item_id"])["item_id"]
        return ids, pa.chunked_array([pa.repeat(pa.scalar(self.came), len(ids))])


def read_feed(uri: str, head: Head, after: int, rows: int, max_rows: int = MAX_ROWS) -> tuple[list[FeedSlice], int]:
    """What the commits after version `after` changed, up to the head, in slices of about `rows` rows.

    Returns:
        the slices, in the order of the commits, and when the last commit was made (microseconds).

    Raises:
        FeedUnusableError: the feed is off, was off or is incomplete for some of these versions, the table's schema changed
            between them, or it has more than `max_rows` rows.
    """
    if not head.has_feed:
        raise FeedUnusableError("the catalogue's change data feed is off (delta.enableChangeDataFeed)")
    versions = range(after + 1, head.version + 1)
    if not 0 < len(versions) <= MAX_COMMITS:
        raise FeedUnusableError(f"its version went from {after} to {head.version}")
    names = [f"{uri}/_delta_log/{version:020}.json" for version in versions]
    try:
        commits = artifacts.for_each(artifacts.read_bytes, names)
    except ArtifactError:
        raise FeedUnusableError(f"its log does not reach back to version {after}") from None
    slices: list[FeedSlice] = []
    committed_at, num_rows = 0, 0
    for version, content in zip(versions, commits, strict=True):
        actions = [json.loads(line) for line in content.splitlines() if line.strip()]
        if any("metaData" in action or "protocol" in action for action in actions):
            raise FeedUnusableError(
                f"version {version} changed the table's schema or properties, or restored an older one"
            )
        committed_at = _committed_at(version, actions)
        for came, action in _changed_files(actions):
            for part in _slices(uri, head, version, action, rows):
                num_rows += part.num_rows
                if num_rows > max_rows:
                    raise FeedUnusableError(
                        f"its change data feed has more than {max_rows:,} rows since version {after}"
                    )
                slices.append(FeedSlice(version, committed_at, came, part))
    return slices, committed_at


def _committed_at(version: int, actions: list[dict[str, Any]]) -> int:
    for action in actions:
        info = action.get("commitInfo") or {}
        at = info.get("inCommitTimestamp", info.get("timestamp"))
        if at is not None:
            return 1_000 * int(at)
    raise FeedUnusableError(f"version {version} does not say when it was committed")


def _changed_files(actions: list[dict[str, Any]]) -> Iterator[tuple[bool | None, dict[str, Any]]]:
    """(whether its rows came, the action), as `FeedSlice.came`."""
    feed = [action["cdc"] for action in actions if "cdc" in action]
    if feed:
        yield from ((None, action) for action in feed)
        return
    for kind, came in (("remove", False), ("add", True)):
        yield from ((came, action[kind]) for action in actions if kind in action and action[kind]["dataChange"])


def _slices(uri: str, head: Head, version: int, action: Mapping[str, Any], rows: int) -> Iterator[Shard]:
    path = unquote(action["path"])
    if "://" in path or path.startswith("/") or action.get("deletionVector"):
        raise FeedUnusableError(f"version {version} has files outside the table or deletion vectors")
    filesystem = artifacts.folder_filesystem(uri)
    file_format = ds.ParquetFileFormat()
    fragment = file_format.make_fragment(path, filesystem, _partition(head, version, action))
    schema = head.schema.append(pa.field(CHANGE_TYPE, pa.string()))
    try:
        found = filesystem.get_file_info(path).type != pafs.FileType.NotFound
        dataset = ds.FileSystemDataset([fragment], schema, file_format, filesystem)
        shards = list(cut(dataset, "items", rows=rows)) if found else []
    except DataError:
        found = False
    if not found:
        raise FeedUnusableError(f"files of version {version} are gone (vacuumed) or damaged")
    items = TABLES["items"]
    with_kind = replace(items, schema=items.schema.append(schema.field(CHANGE_TYPE)))
    yield from (replace(shard, table=with_kind) for shard in shards)


def _partition(head: Head, version: int, action: Mapping[str, Any]) -> ds.Expression | None:
    """What the file's place says about its rows."""
    expression = None
    values = action.get("partitionValues") or {}
    for name in head.partitions:
        if name not in values:
            raise FeedUnusableError(f"version {version} does not say to which partition its files belong")
        value, field = values[name], ds.field(name)
        if value is None or value == "":
            one = field.is_null()
        else:
            try:
                one = field == pa.scalar(value).cast(head.schema.field(name).type)
            except pa.ArrowInvalid:
                raise FeedUnusableError(f"version {version} has a partition {name}={value}") from None
        expression = one if expression is None else expression & one
    return expression
