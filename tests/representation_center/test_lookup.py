"""mim_ray/representation_center/lookup.py: whatever comes in whatever way, a lookup shows what the table's rule says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mim_ray.data.ids import hash_ids
from mim_ray.errors import ArtifactError
from mim_ray.representation_center import lookup as lookup_module
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.compaction import compact
from mim_ray.representation_center.key_index import shard_of
from mim_ray.representation_center.lookup import EmbeddingLookup
from mim_ray.representation_center.overlay import Overlay
from mim_ray.representation_center.snapshot import Snapshot, write_snapshot
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import append_segment, fold

from .messages import message


@pytest.fixture
def center(tmp_path: Path) -> str:
    table = EmbeddingTable(f"{tmp_path}/table").create()
    table.append(message([f"i{number}" for number in range(20)], 1, 5), encoder_version="v1", shard_id="s")
    build_snapshot(table, "v1", f"{tmp_path}/snapshots/v1")
    return str(tmp_path)


def open_lookup(center: str, **options: object) -> EmbeddingLookup:
    snapshot = Snapshot.open(f"{center}/snapshots/v1", shard=options.get("shard"))  # type: ignore[arg-type]
    table = EmbeddingTable(f"{center}/table")
    return EmbeddingLookup(snapshot, table=table, window=f"{center}/window", table_every_s=0, **options)  # type: ignore[arg-type]


def shown(lookup: EmbeddingLookup, ids: list[str]) -> dict[str, float]:
    result = lookup.get(ids)
    return {key: float(row[0]) for key, row, there in zip(ids, result.matrix, result.found, strict=True) if there}


def truth(center: str) -> dict[str, float]:
    return {
        row["item_id"]: row["embedding"][0] for row in EmbeddingTable(f"{center}/table").current_rows("v1").to_pylist()
    }


@pytest.mark.parametrize("seed", range(3))
def test_random_histories_end_where_the_table_ends(center: str, seed: int) -> None:
    """Messages pushed or found, folds, refreshes of the catalogue, deletions, compactions, snapshots, restarts."""
    rng = np.random.default_rng(seed)
    table, window = EmbeddingTable(f"{center}/table"), f"{center}/window"
    ids = [f"i{number}" for number in range(40)]
    lookups = [open_lookup(center), *(open_lookup(center, shard=(shard, 3)) for shard in range(3))]
    for step in range(2, 60):
        some = [ids[number] for number in rng.choice(40, 4, replace=False)]
        gone = (rng.random(4) < 0.25).tolist()
        rows = message(some, step, int(rng.integers(4, 8)), deleted=gone)
        action = rng.choice(
            ["segment", "push", "refresh", "fold", "compact", "reopen"], p=[0.35, 0.25, 0.15, 0.1, 0.05, 0.1]
        )
        if action in ("segment", "push"):
            name = append_segment(window, rows, encoder_version="v1")
            for lookup in lookups if action == "push" else ():
                lookup.push(name, rows)
        elif action == "refresh":
            table.append(rows, encoder_version="v1", shard_id=f"refresh-{step}")
        elif action == "fold":
            fold(window, table, keep_s=float(rng.choice([0.0, 60.0])))
        elif action == "compact":
            compact(table, "v1")
        else:
            if rng.random() < 0.5:
                build_snapshot(table, "v1", f"{center}/snapshots/v1")
            lookups = [open_lookup(center), *(open_lookup(center, shard=(shard, 3)) for shard in range(3))]
        if rng.random() < 0.5:
            for lookup in lookups:
                lookup.refresh()
            joined = {key: value for lookup in lookups[1:] for key, value in shown(lookup, ids).items()}
            assert joined == shown(lookups[0], ids), "shards together are the whole"
    fold(window, table)
    expected = truth(center)
    for lookup in (*lookups[:1], open_lookup(center)):
        lookup.refresh()
        assert shown(lookup, ids) == expected
    held = [set(shown(lookup, ids)) for lookup in lookups[1:]]
    for shard, keys in enumerate(held):
        assert (shard_of(hash_ids(list(keys)), 3) == shard).all()


def test_rows_that_a_refresh_commits_are_seen(center: str) -> None:
    lookup = open_lookup(center)
    EmbeddingTable(f"{center}/table").append(message(["i1", "new"], 2, 6), encoder_version="v1", shard_id="refresh-1")
    assert lookup.refresh() == 2
    assert shown(lookup, ["i0", "i1", "new"]) == {"i0": 1, "i1": 2, "new": 2}
    assert lookup.refresh() == 0


def test_a_folded_segment_is_not_read_again_but_counts_as_committed(
    center: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookup, table = open_lookup(center), EmbeddingTable(f"{center}/table")
    append_segment(f"{center}/window", message(["i1"], 2, 6), encoder_version="v1")
    assert lookup.refresh() == 1
    fold(f"{center}/window", table)
    with monkeypatch.context() as patch:
        patch.setattr(lookup_module.EmbeddingLookup, "_take", lambda *_: pytest.fail("rows were read"))
        assert lookup.refresh() == 0
    table.append(message(["i1"], 3, 6), encoder_version="v1", shard_id="same-time-later-commit")
    lookup.refresh()
    assert shown(lookup, ["i1"]) == {"i1": 3.0} == {"i1": truth(center)["i1"]}


def test_a_compaction_after_the_snapshot_brings_no_row_twice(center: str) -> None:
    table = EmbeddingTable(f"{center}/table")
    for step in range(8):
        table.append(message([f"n{step}"], 2, 6), encoder_version="v1", shard_id=f"refresh-{step}")
    assert compact(table, "v1") is not None
    lookup = open_lookup(center)
    assert lookup.num_overlay_rows == 8, "what the snapshot shows stays out of the overlay"
    assert shown(lookup, ["i3", "n5"]) == {"i3": 1, "n5": 2}


def test_a_row_that_is_older_than_a_deletion_stays_hidden(center: str) -> None:
    window, lookup = f"{center}/window", open_lookup(center)
    for ids, day, gone in ((["x"], 8, True), (["x"], 7, False), (["i2"], 8, True), (["i2"], 7, False)):
        append_segment(window, message(ids, 2, day, deleted=[gone]), encoder_version="v1")
        lookup.refresh()
    assert shown(lookup, ["x", "i2"]) == {}
    append_segment(window, message(["x"], 3, 9), encoder_version="v1")
    lookup.refresh()
    assert shown(lookup, ["x", "i2"]) == {"x": 3}


def test_a_pushed_segment_is_taken_once_and_a_late_one_not_at_all(center: str) -> None:
    lookup = open_lookup(center)
    rows = message(["new"], 2, 6)
    name = append_segment(f"{center}/window", rows, encoder_version="v1")
    assert lookup.push(name, rows) == 1
    assert lookup.push(name, rows) == 0
    assert lookup.refresh() == 0
    assert lookup.push("00000000000000000001-abcdef00", message(["old"], 2, 6)) == 0
    assert shown(lookup, ["new", "old"]) == {"new": 2}


def test_what_storage_refused_once_is_taken_by_the_next_look(center: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lookup = open_lookup(center)
    before = lookup.overlay.synced_ns
    append_segment(f"{center}/window", message(["new"], 2, 6), encoder_version="v1")

    def full(*_: object, **__: object) -> None:
        raise ArtifactError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Overlay, "append", full)
        with pytest.raises(ArtifactError, match="no room"):
            lookup.refresh()
    assert lookup.overlay.synced_ns == before, "readers are not told that this lookup is up to date"
    lookup.refresh()
    assert shown(lookup, ["new"]) == {"new": 2}


def test_a_table_and_a_window_that_are_not_there_yet_are_followed_when_they_come(tmp_path: Path) -> None:
    write_snapshot(f"{tmp_path}/line", ["a"], np.ones((1, 2), np.float32), encoder_version="v1")
    table = EmbeddingTable(f"{tmp_path}/table")
    snapshot = Snapshot.open(f"{tmp_path}/line")
    lookup = EmbeddingLookup(snapshot, table=table, window=f"{tmp_path}/window", table_every_s=0)
    assert lookup.refresh() == 0
    append_segment(f"{tmp_path}/window", message(["b"], 2, 6), encoder_version="v1")
    table.create().append(message(["c"], 3, 6), encoder_version="v1", shard_id="s0")
    lookup.refresh()
    assert shown(lookup, ["a", "b", "c"]) == {"a": 1, "b": 2, "c": 3}


def test_a_damaged_segment_is_told_and_holds_up_nothing(center: str) -> None:
    lookup = open_lookup(center)
    append_segment(f"{center}/window", message(["lost"], 2, 6), encoder_version="v1")
    (segment,) = Path(f"{center}/window").rglob("*.arrow")
    segment.write_bytes(b"no arrow")
    before = lookup.overlay.synced_ns
    with pytest.raises(ArtifactError, match="damaged"):
        lookup.refresh()
    assert lookup.overlay.synced_ns > before, "this lookup is up to date with all that can be read"
    append_segment(f"{center}/window", message(["new"], 2, 6), encoder_version="v1")
    lookup.refresh()
    assert shown(lookup, ["lost", "new"]) == {"new": 2}


def test_after_a_hundred_thousand_messages_a_lookup_does_the_same_work(center: str) -> None:
    lookup = open_lookup(center)
    for start in range(0, 100_000, 10_000):
        segments = [
            (f"{lookup_module.time.time_ns():020d}-{number:08x}", message([f"n{number % 30_000}"], number, 6))
            for number in range(start, start + 10_000, 100)
        ]
        with lookup._lock:
            lookup._take_segments(segments)
    big = message([f"m{number}" for number in range(100_000)], 5, 6)
    name = append_segment(f"{center}/window", big, encoder_version="v1")
    lookup.push(name, big)
    assert lookup.num_overlay_rows > 100_000
    assert lookup.get([f"m{number}" for number in range(0, 100_000, 7)]).found.all()
    files = lookup.overlay._files
    assert len(files) < 12, "doubling files: a gather looks at few"
    held, _ = lookup.overlay._index._slots
    assert 2 * len(lookup.overlay._index) <= len(held), "at most half full: a probe or two a key"
