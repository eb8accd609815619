"""Snapshots on an object store: only what a shard needs is downloaded, and what is downloaded is verified."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mim_ray import artifacts
from mim_ray.data.ids import hash_ids
from mim_ray.errors import ArtifactError, StorageError
from mim_ray.representation_center import snapshot_files, snapshot_line
from mim_ray.representation_center.key_index import shard_of
from mim_ray.representation_center.snapshot import Snapshot, write_snapshot
from mim_ray.representation_center.snapshot_line import (
    current_snapshot,
    list_snapshots,
    prune_snapshots,
    switch_snapshot,
)

NUM = 2_000
IDS = [f"item-{number}" for number in range(NUM)]
MATRIX = np.random.default_rng(0).normal(size=(NUM, 8)).astype(np.float32)
CONTENTS = [hashlib.blake2b(key.encode(), digest_size=16).hexdigest() for key in IDS]


@pytest.fixture
def line(s3: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(snapshot_files, "BLOCK_BYTES", 1_024)
    uri = f"{s3.uri}/snapshots/v1"
    write_snapshot(uri, IDS, MATRIX, encoder_version="v1", content_hashes=CONTENTS)
    return uri


def cached(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_a_shard_downloads_its_own_blocks_only(line: str, tmp_path: Path) -> None:
    shard = Snapshot.open(line, shard=(3, 8))
    mine = np.flatnonzero(shard_of(hash_ids(IDS), 8) == 3)
    rows = shard.lookup([IDS[place] for place in mine])
    assert sorted(rows.tolist()) == list(range(shard.num_rows))
    np.testing.assert_array_equal(shard.gather(rows), MATRIX[mine])
    part = sum(path.stat().st_size for path in cached(tmp_path))
    assert part < 1.5 * shard.num_mapped_bytes + 8 * 1_024
    assert not any("content" in path.name for path in cached(tmp_path))
    whole = Snapshot.open(line)
    np.testing.assert_array_equal(whole.gather(whole.lookup(IDS)), MATRIX)
    assert whole.find_content(CONTENTS[:3]).tolist() == whole.lookup(IDS[:3]).tolist()
    assert sum(path.stat().st_size for path in cached(tmp_path)) - part > 4 * part


def test_what_is_in_the_cache_is_not_downloaded_again_and_is_mended_when_damaged(
    line: str, s3: Any, tmp_path: Path
) -> None:
    Snapshot.open(line)
    s3.requests()
    Snapshot.open(line)
    assert not [request for request in s3.requests() if ".bin" in str(request)]
    (path,) = [path for path in cached(tmp_path) if path.name.startswith("matrix.bin")]
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    snapshot = Snapshot.open(line)
    np.testing.assert_array_equal(snapshot.gather(snapshot.lookup(IDS)), MATRIX)


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_remote_snapshot_is_refused(line: str, damage: str) -> None:
    uri = f"{line}/{current_snapshot(line)}/matrix.bin"
    content = artifacts.read_bytes(uri)
    if damage == "delete":
        artifacts.remove(uri)
    else:
        artifacts.write_bytes(uri, content[:-1] if damage == "cut" else content[:9] + b"?" + content[10:])
    for verify in (True, False):  # what is downloaded is always verified
        with pytest.raises(ArtifactError, match=r"damaged.*matrix\.bin"):
            Snapshot.open(line, verify=verify)


def test_states_are_switched_pruned_and_leave_the_cache(line: str, tmp_path: Path) -> None:
    first = current_snapshot(line)
    opened = Snapshot.open(line)
    for value in (1, 2, 3):
        write_snapshot(line, IDS[:1], MATRIX[:1] + value, encoder_version="v1", keep=9)
        Snapshot.open(line)
    assert len(list((tmp_path / "cache" / "snapshots").glob("*/*"))) == snapshot_files.CACHED_STATES
    np.testing.assert_array_equal(opened.gather(opened.lookup(IDS)), MATRIX)
    assert first is not None
    switch_snapshot(line, first)
    assert Snapshot.open(line).num_rows == NUM
    assert len(prune_snapshots(line, keep=1)) == 2
    assert [state.snapshot_id == first for state in list_snapshots(line)] == [False, True]


def test_an_upload_that_ended_half_way_is_no_state_and_is_deleted_when_old(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = current_snapshot(line)

    def fail(folder: Path, uri: str) -> None:
        artifacts.write_bytes(f"{uri}/matrix.bin", b"half")
        raise StorageError("The store went away.")

    with monkeypatch.context() as patch:
        patch.setattr("mim_ray.representation_center.snapshot_writer.upload", fail)
        with pytest.raises(StorageError, match="went away"):
            write_snapshot(line, IDS[:1], MATRIX[:1], encoder_version="v1")
    assert current_snapshot(line) == before
    assert {uri[len(line) + 1 :].partition("/")[0] for uri in artifacts.list_files(line, ".bin")} == {before}
    for begun, stays in (("20260101T000000000000Z-aa", False), (snapshot_line.new_snapshot_id(), True)):
        artifacts.write_bytes(f"{line}/{begun}/matrix.bin", b"half")
        prune_snapshots(line)
        assert artifacts.exists(f"{line}/{begun}/matrix.bin") is stays
    assert [state.snapshot_id for state in list_snapshots(line)] == [before]
