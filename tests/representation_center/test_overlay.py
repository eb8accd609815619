"""mim_ray/representation_center/overlay.py: what one process appends, others of the node read as it comes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mim_ray.data.ids import hash_ids
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.overlay import Overlay

WIDTH = 8


def append(overlay: Overlay, ids: list[str], value: float, **columns: object) -> None:
    keys = pa.array(ids, pa.large_string())
    num = len(ids)
    given = {
        "content_at": np.full(num, 7),
        "sources": np.zeros(num, np.int64),
        "deleted": np.zeros(num, bool),
        "category": pa.nulls(num, pa.string()),
    }
    overlay.append(hash_ids(keys), keys, np.full((num, overlay.width), value, np.float32), **(given | columns))


def find(overlay: Overlay, ids: list[str]) -> np.ndarray:
    keys = pa.array(ids, pa.large_string())
    return overlay.find(hash_ids(keys), keys)


def test_a_reader_sees_what_was_published_since_it_looked_last(tmp_path: Path) -> None:
    writer = Overlay.create(tmp_path / "o", width=WIDTH, dtype="float16")
    reader = Overlay.open(tmp_path / "o")
    assert (reader.width, reader.dtype, reader.poll()) == (WIDTH, "float16", 0)
    append(writer, ["a", "b"], 1.5, category=pa.array(["shoes", None]), deleted=np.array([False, True]))
    assert find(reader, ["a"]).tolist() == [-1]
    assert reader.poll() == 2
    rows = find(reader, ["a", "nobody", "b"])
    assert (rows >= 0).tolist() == [True, False, True]
    rows = rows[[0, 2]]
    assert reader.gather(rows).tolist() == [[1.5] * WIDTH] * 2
    assert reader.deleted(rows).tolist() == [False, True]
    assert reader.category(rows).to_pylist() == ["shoes", None]
    assert reader.content_at(rows).tolist() == [7, 7]
    append(writer, ["a"], 2.5)
    assert reader.gather(find(reader, ["a"]))[0, 0] == 1.5, "not looked yet"
    assert reader.poll() == 1
    assert reader.gather(find(reader, ["a"]))[0, 0] == 2.5
    assert (reader.num_items, reader.num_rows, writer.num_items) == (2, 3, 2)


@pytest.mark.parametrize("in_memory", [True, False])
def test_it_grows_by_further_files_and_keeps_every_key(tmp_path: Path, in_memory: bool) -> None:
    folder = None if in_memory else tmp_path / "o"
    writer = Overlay.create(folder, width=WIDTH, dtype="float32")
    rng = np.random.default_rng(0)
    truth: dict[str, float] = {}
    for value in range(40):
        ids = [f"{'long ' * int(rng.integers(0, 60))}{number}" for number in rng.choice(5_000, 1_500, replace=False)]
        append(writer, ids, value)
        truth |= dict.fromkeys(ids, float(value))
    readers = [writer] if folder is None else [writer, Overlay.open(folder)]
    for overlay in readers:
        overlay.poll()
        rows = find(overlay, list(truth))
        assert (rows >= 0).all()
        assert overlay.gather(rows)[:, 0].tolist() == list(truth.values())
        assert (overlay.num_rows, overlay.num_items) == (60_000, len(truth))
    if folder is not None:
        assert 3 < len(list(folder.iterdir())) < 12


def test_a_key_longer_than_a_file_plans_for_gets_a_file_that_holds_it(tmp_path: Path) -> None:
    writer = Overlay.create(tmp_path / "o", width=WIDTH, dtype="float32")
    ids = ["x" * 300_000, "", "y"]
    append(writer, ids, 3)
    reader = Overlay.open(tmp_path / "o")
    reader.poll()
    assert reader.gather(find(reader, ids)).shape == (3, WIDTH)
    assert (find(reader, ["x" * 299_999, "z"]) == -1).all()


def test_values_that_float16_cannot_hold_become_its_largest(tmp_path: Path) -> None:
    writer = Overlay.create(None, width=WIDTH, dtype="float16")
    append(writer, ["a"], 1e6)
    assert writer.gather(find(writer, ["a"])).max() == 65_504


def test_a_full_disk_is_an_error_and_what_is_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Overlay.create(tmp_path / "o", width=WIDTH, dtype="float32")
    append(writer, ["a"], 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(ArtifactError, match="no room for"):
            append(writer, [f"b{number}" for number in range(50_000)], 2)
    reader = Overlay.open(tmp_path / "o")
    reader.poll()
    assert reader.gather(find(reader, ["a"]))[0, 0] == 1
    append(writer, [f"b{number}" for number in range(50_000)], 3)
    reader.poll()
    assert reader.gather(find(reader, ["b0", "b49999"]))[:, 0].tolist() == [3, 3]


def test_what_is_no_overlay_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        Overlay.open(tmp_path / "none")
    (tmp_path / "00000000.rows").write_bytes(bytes(10_000))
    with pytest.raises(ArtifactError, match="is no overlay"):
        Overlay.open(tmp_path)


WRITER = """
import sys
from pathlib import Path
import numpy as np, pyarrow as pa
from mim_ray.data.ids import hash_ids
from mim_ray.representation_center.overlay import Overlay

overlay = Overlay.create(Path(sys.argv[1]), width=8, dtype="float32")
number = 0
while True:
    keys = pa.array([f"key-{number + place}" for place in range(50)], pa.large_string())
    values = np.repeat(np.arange(number, number + 50, dtype=np.float32), 8).reshape(50, 8)
    overlay.append(hash_ids(keys), keys, values, content_at=np.arange(50), sources=np.zeros(50, np.int64),
                   deleted=np.zeros(50, bool), category=keys.cast(pa.string()))
    number += 50
    print(number, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_a_prefix_that_other_processes_read(tmp_path: Path) -> None:
    for attempt, wait_s in enumerate((0.0, 0.13, 0.31)):
        folder = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = int(process.stdout.readline())
        reader = Overlay.open(folder)
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            reader.poll()
        process.kill()
        assert process.wait() == -signal.SIGKILL
        said = max([said, *(int(line) for line in process.stdout.read().split("\n")[:-1])])
        reader.poll()
        assert reader.num_rows >= said, "published before it was said"
        ids = [f"key-{number}" for number in range(reader.num_rows)]
        rows = find(reader, ids)
        assert rows.tolist() == list(range(reader.num_rows))
        assert (reader.gather(rows) == np.arange(reader.num_rows, dtype=np.float32)[:, None]).all()
        assert reader.category(rows).to_pylist() == ids
        fresh = Overlay.open(folder)
        assert fresh.poll() == reader.num_rows
