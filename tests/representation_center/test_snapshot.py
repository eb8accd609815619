"""mim_ray/representation_center: snapshot.py, snapshot_writer.py, snapshot_from_rows.py, snapshot_files.py and content_hashes.py."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mim_ray.data.ids import hash_ids
from mim_ray.errors import ArtifactError
from mim_ray.representation_center import snapshot_files, snapshot_from_rows, snapshot_writer
from mim_ray.representation_center.key_index import shard_of
from mim_ray.representation_center.snapshot import DTYPES, Snapshot, write_snapshot


def make(folder: Path, num: int = 40, width: int = 5, **options: object) -> tuple[list[str], np.ndarray]:
    ids = [f"item-{number}" for number in range(num)]
    matrix = np.random.default_rng(num).normal(size=(num, width)).astype(np.float32)
    write_snapshot(str(folder), ids, matrix, encoder_version="csft-1", delta_version=3, **options)  # type: ignore[arg-type]
    return ids, matrix


def contents(num: int) -> list[str]:
    return [hashlib.blake2b(f"content {number}".encode(), digest_size=16).hexdigest() for number in range(num)]


def state_of(line: Path) -> Path:
    return line / json.loads((line / "current.json").read_text())["snapshot"]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 256 bytes, and pieces of 16 rows, so that small snapshots have many."""
    monkeypatch.setattr(snapshot_files, "BLOCK_BYTES", 256)
    monkeypatch.setattr(snapshot_from_rows, "PIECE_ROWS", 16)


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
    assert snapshot.hashes.tolist() == sorted(hash_ids(ids).tolist())
    np.testing.assert_array_equal(snapshot.lookup(ids, hash_ids(ids)), snapshot.lookup(ids))


def test_batches_give_the_same_snapshot_as_the_whole_matrix(tmp_path: Path) -> None:
    ids, matrix = make(tmp_path / "whole")
    pieces = (matrix[start : start + 7] for start in range(0, 40, 7))
    write_snapshot(str(tmp_path / "pieces"), ids, pieces, encoder_version="csft-1", delta_version=3, width=5)
    manifests = [json.loads((state_of(tmp_path / name) / "manifest.json").read_text()) for name in ("whole", "pieces")]
    assert manifests[0]["files"] == manifests[1]["files"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_read_as_float32(tmp_path: Path, dtype: str) -> None:
    ids, matrix = make(tmp_path / "s", num=300, width=16, dtype=dtype, content_at=np.arange(300))
    snapshot = Snapshot.open(str(tmp_path / "s"))
    rows = snapshot.lookup([*ids, "unknown"])
    found = snapshot.gather(rows)
    assert found.dtype == np.float32
    assert not found[-1].any()
    most = np.abs(matrix).max(axis=1, keepdims=True)
    error = {"float32": 0.0, "float16": 2.0**-11, "int8": 0.5001 / 127}[dtype]
    assert (np.abs(found[:-1] - matrix) <= error * most).all()
    stored = snapshot.gather_stored(rows)
    assert (stored.dtype, snapshot.matrix.nbytes) == (DTYPES[dtype], 300 * 16 * np.dtype(DTYPES[dtype]).itemsize)
    scales = np.ones(300) if snapshot.scales is None else snapshot.scales[rows[:-1]]
    np.testing.assert_allclose(stored[:-1] * scales[:, None], found[:-1], rtol=1e-6)
    assert snapshot.content_at is not None
    assert snapshot.content_at[rows[:-1]].tolist() == list(range(300))


def test_int8_keeps_zeros_and_the_largest_value_of_a_row(tmp_path: Path) -> None:
    matrix = np.array([[0, 0, 0], [1, -2, 0.5], [1e-30, 0, -1e-30]], np.float32)
    write_snapshot(str(tmp_path / "s"), ["a", "b", "c"], matrix, encoder_version="none", dtype="int8")
    snapshot = Snapshot.open(str(tmp_path / "s"))
    found = snapshot.gather(snapshot.lookup(["a", "b", "c"]))
    np.testing.assert_allclose(found, [[0, 0, 0], [1, -2, 0.5], [1e-30, 0, -1e-30]], rtol=0.008)


def test_an_empty_snapshot_knows_nothing(tmp_path: Path) -> None:
    write_snapshot(str(tmp_path / "s"), [], np.empty((0, 4), np.float32), encoder_version="csft-1")
    snapshot = Snapshot.open(str(tmp_path / "s"))
    rows = snapshot.lookup(["a"])
    assert rows.tolist() == [-1]
    np.testing.assert_array_equal(snapshot.gather(rows), np.zeros((1, 4), np.float32))
    assert snapshot.content_hashes(rows).to_pylist() == [None]
    assert snapshot.find_content(contents(1)).tolist() == [-1]
    assert Snapshot.open(str(tmp_path / "s"), shard=(1, 2)).lookup(["a"]).tolist() == [-1]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_shards_are_ranges_that_make_up_the_whole(tmp_path: Path, small_blocks: None, dtype: str) -> None:
    ids, _ = make(tmp_path / "s", num=500, dtype=dtype, content_at=np.arange(500), content_hashes=contents(500))
    uri = str(tmp_path / "s")
    whole = Snapshot.open(uri)
    expected = whole.gather(whole.lookup(ids))
    for num_shards in (1, 2, 3, 7, 60):
        shards = [Snapshot.open(uri, shard=(number, num_shards)) for number in range(num_shards)]
        assert [shard.first_row for shard in shards] == np.cumsum([0] + [s.num_rows for s in shards])[:-1].tolist()
        assert [key for shard in shards for key in shard.ids.to_pylist()] == whole.ids.to_pylist()
        home = shard_of(hash_ids(ids), num_shards)
        for number in {0, 1, 2, num_shards - 1} & set(range(num_shards)):
            rows = shards[number].lookup(ids)
            np.testing.assert_array_equal(rows >= 0, home == number)
            mine = np.flatnonzero(home == number)
            np.testing.assert_array_equal(shards[number].gather(rows[mine]), expected[mine])
            assert shards[number].content_at is not None
            assert shards[number].content_at[rows[mine]].tolist() == mine.tolist()
            assert shards[number].content_hashes(rows[mine]).to_pylist() == [contents(500)[place] for place in mine]
    assert Snapshot.open(uri, shard=(2, 3)).num_mapped_bytes < whole.num_mapped_bytes / 2
    with pytest.raises(ArtifactError, match="Open the whole"):
        Snapshot.open(uri, shard=(0, 2)).find_content(contents(1))
    with pytest.raises(ArtifactError, match="numbered from 0"):
        Snapshot.open(uri, shard=(2, 2))


def test_contents_are_found_by_hash(tmp_path: Path) -> None:
    hashes: list[str | None] = [*contents(38), None, "no hash"]
    hashes[5] = hashes[4]
    ids, _ = make(tmp_path / "s", content_hashes=hashes)
    snapshot = Snapshot.open(str(tmp_path / "s"))
    rows = snapshot.lookup(ids)
    assert snapshot.content_hashes(np.append(rows, -1)).to_pylist() == [*hashes[:38], None, None, None]
    found = snapshot.find_content(pa.array([*hashes, "f" * 32, hashes[0].upper() if hashes[0] else ""]))
    assert snapshot.content_hashes(found).to_pylist() == [*hashes[:38], None, None, None, None]
    assert (found[38:] == -1).all()
    make(tmp_path / "none")
    bare = Snapshot.open(str(tmp_path / "none"))
    assert bare.find_content([hashes[0]]).tolist() == [-1]
    assert bare.content_hashes(np.array([0])).to_pylist() == [None]


def test_contents_are_sorted_in_parts_where_memory_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "whole", num=400, content_hashes=contents(400))
    writer = snapshot_writer.ContentIndexWriter
    monkeypatch.setattr(
        snapshot_writer, "ContentIndexWriter", lambda folder, rows, memory: writer(folder, rows, memory_bytes=1024)
    )
    monkeypatch.setattr(snapshot_from_rows, "PIECE_ROWS", 16)
    make(tmp_path / "parts", num=400, content_hashes=contents(400))
    files = [
        json.loads((state_of(tmp_path / name) / "manifest.json").read_text())["files"] for name in ("whole", "parts")
    ]
    assert files[0] == files[1]


FILES = [
    "hashes.bin",
    "offsets.bin",
    "groups.bin",
    "steps.bin",
    "keys.bin",
    "matrix.bin",
    "scales.bin",
    "content_at.bin",
]


@pytest.mark.parametrize("name", [*FILES, "content.bin", "content_keys.bin", "content_rows.bin"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_snapshot_is_refused(tmp_path: Path, small_blocks: None, name: str, damage: str) -> None:
    make(tmp_path / "s", dtype="int8", content_at=np.arange(40), content_hashes=contents(40))
    path = state_of(tmp_path / "s") / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[random.Random(name).randrange(len(content))] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with pytest.raises(ArtifactError, match=rf"damaged.*{name}.*older one"):
        Snapshot.open(str(tmp_path / "s")).find_content(contents(1))


def test_every_flipped_bit_of_a_manifest_or_pointer_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "s")
    for path in (state_of(tmp_path / "s") / "manifest.json", tmp_path / "s" / "current.json"):
        content = path.read_bytes()
        where = range(len(content)) if path.name == "current.json" else range(0, len(content), 23)
        for position in where:
            changed = bytearray(content)
            changed[position] ^= 1 << (position % 7)
            path.write_bytes(changed)
            try:
                found = Snapshot.open(str(tmp_path / "s"), verify=False)
            except ArtifactError:
                continue
            assert (found.num_rows, found.encoder_version, found.delta_version) == (40, "csft-1", 3)
        path.write_bytes(content)


def test_a_manifest_of_another_snapshot_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", num=41)
    path = state_of(tmp_path / "a") / "manifest.json"
    path.write_bytes((state_of(tmp_path / "b") / "manifest.json").read_bytes())
    with pytest.raises(ArtifactError, match="belongs to snapshot"):
        Snapshot.open(str(tmp_path / "a"))
    path.write_text('{"format": 1}')
    with pytest.raises(ArtifactError, match="has format 1, this version reads 2"):
        Snapshot.open(str(tmp_path / "a"))


def test_a_shard_checks_its_own_blocks_only(tmp_path: Path, small_blocks: None) -> None:
    make(tmp_path / "s", num=400)
    path = state_of(tmp_path / "s") / "matrix.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert Snapshot.open(str(tmp_path / "s"), shard=(0, 2)).num_rows > 0
    for shard in (None, (1, 2)):
        with pytest.raises(ArtifactError, match=r"damaged.*matrix\.bin"):
            Snapshot.open(str(tmp_path / "s"), shard=shard)
    assert Snapshot.open(str(tmp_path / "s"), verify=False).num_rows == 400


def test_a_missing_snapshot_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no snapshot.*manifest\.json is not there"):
        Snapshot.open(str(tmp_path / "none"))


def test_a_failed_build_leaves_the_old_snapshot(tmp_path: Path) -> None:
    uri = str(tmp_path / "s")
    ids, matrix = make(tmp_path / "s")
    bad = matrix.copy()
    bad[3, 1] = np.nan
    for wrong_ids, wrong in [(ids, bad), (ids, matrix[:-1]), ([*ids[:-1], ids[0]], matrix), (ids, matrix * 1e9)]:
        for dtype in ("float16", "int8"):
            if wrong.max() > 1e6 and dtype == "int8":
                continue
            with pytest.raises(ArtifactError):
                write_snapshot(uri, wrong_ids, wrong, encoder_version="x", dtype=dtype)
    with pytest.raises(ArtifactError, match="dtype 'int4' is none of"):
        write_snapshot(uri, ids, matrix, encoder_version="x", dtype="int4")
    assert Snapshot.open(uri).encoder_version == "csft-1"
    assert len(list((tmp_path / "s").iterdir())) == 2


def test_a_full_disk_leaves_the_old_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "s")
    ids, matrix = make(tmp_path / "s")

    def write(self: object, array: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot_writer.BlockWriter, "write", write)
    with pytest.raises(ArtifactError, match=r"No space left.*stays current"):
        write_snapshot(uri, ids, matrix, encoder_version="x")
    assert Snapshot.open(uri).encoder_version == "csft-1"
    assert len(list((tmp_path / "s").iterdir())) == 2
