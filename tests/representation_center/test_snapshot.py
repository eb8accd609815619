"""mim_ray/representation_center/snapshot.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mim_ray.errors import ArtifactError
from mim_ray.representation_center.snapshot import Snapshot, write_snapshot


def make(folder: Path, num: int = 40, width: int = 5, **options: object) -> tuple[list[str], np.ndarray]:
    ids = [f"item-{number}" for number in range(num)]
    matrix = np.random.default_rng(num).normal(size=(num, width)).astype(np.float32)
    write_snapshot(str(folder), ids, matrix, encoder_version="csft-1", delta_version=3, **options)  # type: ignore[arg-type]
    return ids, matrix


def test_rows_come_back_by_id_in_any_shape(tmp_path: Path) -> None:
    ids, matrix = make(tmp_path / "s")
    snapshot = Snapshot.open(str(tmp_path / "s"))
    rows = snapshot.lookup(pa.array([ids[7], "unknown", ids[0], None]))
    assert rows.dtype == np.int64
    assert rows.tolist()[1::2] == [-1, -1]
    np.testing.assert_array_equal(snapshot.gather(rows), np.stack([matrix[7], 0 * matrix[0], matrix[0], 0 * matrix[0]]))
    grid = snapshot.lookup(ids[:6]).reshape(2, 3)
    np.testing.assert_array_equal(snapshot.gather(grid), matrix[:6].reshape(2, 3, 5))
    assert (snapshot.encoder_version, snapshot.delta_version, snapshot.width, snapshot.num_rows) == ("csft-1", 3, 5, 40)
    assert set(snapshot.ids.to_pylist()) == set(ids)


def test_batches_give_the_same_snapshot_as_the_whole_matrix(tmp_path: Path) -> None:
    ids, matrix = make(tmp_path / "whole")
    pieces = (matrix[start : start + 7] for start in range(0, 40, 7))
    write_snapshot(str(tmp_path / "pieces"), ids, pieces, encoder_version="csft-1", delta_version=3, width=5)
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("whole", "pieces")]
    assert manifests[0]["files"] == manifests[1]["files"]


def test_float16_halves_the_matrix_and_is_read_as_float32(tmp_path: Path) -> None:
    ids, matrix = make(tmp_path / "s", dtype="float16", content_at=np.arange(40))
    snapshot = Snapshot.open(str(tmp_path / "s"))
    rows = snapshot.lookup(ids)
    found = snapshot.gather(rows)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, matrix.astype(np.float16).astype(np.float32))
    assert snapshot.matrix.nbytes == matrix.nbytes // 2
    assert snapshot.content_at is not None
    assert snapshot.content_at[rows].tolist() == list(range(40))


def test_an_empty_snapshot_knows_nothing(tmp_path: Path) -> None:
    write_snapshot(str(tmp_path / "s"), [], np.empty((0, 4), np.float32), encoder_version="csft-1")
    snapshot = Snapshot.open(str(tmp_path / "s"))
    rows = snapshot.lookup(["a"])
    assert rows.tolist() == [-1]
    np.testing.assert_array_equal(snapshot.gather(rows), np.zeros((1, 4), np.float32))


@pytest.mark.parametrize("name", ["hashes.bin", "offsets.bin", "keys.bin", "matrix.bin"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_snapshot_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    make(tmp_path / "s")
    (path,) = (tmp_path / "s").glob(f"data-*/{name}")
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with pytest.raises(ArtifactError, match=f"damaged.*{name}"):
        Snapshot.open(str(tmp_path / "s"))


def test_a_missing_snapshot_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json is not there"):
        Snapshot.open(str(tmp_path / "none"))


def test_rebuilding_leaves_open_snapshots_alone_and_keeps_one_old_state(tmp_path: Path) -> None:
    uri = str(tmp_path / "s")
    ids, matrix = make(tmp_path / "s")
    old = Snapshot.open(uri)
    for version in (4, 5):
        write_snapshot(uri, ids[:2], matrix[:2] + version, encoder_version="csft-1", delta_version=version)
    np.testing.assert_array_equal(old.gather(old.lookup(ids)), matrix)
    new = Snapshot.open(uri)
    assert (new.num_rows, new.delta_version) == (2, 5)
    np.testing.assert_array_equal(new.gather(new.lookup(ids[:1])), matrix[:1] + 5)
    assert len(list((tmp_path / "s").iterdir())) == 3  # manifest, current data, data before


def test_a_failed_build_leaves_the_old_snapshot(tmp_path: Path) -> None:
    uri = str(tmp_path / "s")
    ids, matrix = make(tmp_path / "s")
    bad = matrix.copy()
    bad[3, 1] = np.nan
    for wrong_ids, wrong in [(ids, bad), (ids, matrix[:-1]), ([*ids[:-1], ids[0]], matrix), (ids, matrix * 1e9)]:
        with pytest.raises(ArtifactError):
            write_snapshot(uri, wrong_ids, wrong, encoder_version="x", dtype="float16")
    assert Snapshot.open(uri).encoder_version == "csft-1"
    assert len(list((tmp_path / "s").iterdir())) == 2
