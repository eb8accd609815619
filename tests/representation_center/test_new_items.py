"""mim_ray/representation_center/new_items.py: an acknowledged item is never lost, whatever is killed when."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mim_ray.representation_center.new_items import store_new_items
from mim_ray.representation_center.parameter_store import ParameterStore
from mim_ray.representation_center.snapshot import write_snapshot
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import WindowTail, fold, segment_rows

AT = datetime(2025, 1, 1, tzinfo=UTC)


def rows(name: str) -> pa.Table:
    return segment_rows([name], np.ones((1, 2), np.float32), content_hashes=["h"], content_at=[AT])


def test_the_push_comes_after_the_item_is_safe_and_cannot_undo_it(tmp_path: Path) -> None:
    window = f"{tmp_path}/window"
    seen: list[tuple[str, str, list[str]]] = []

    def push(encoder_version: str, segment_id: str, pushed: pa.Table) -> bool:
        stored = [name for name, _ in WindowTail(window, "v1").poll()]
        assert segment_id in stored, "stored before it is sent"
        seen.append((encoder_version, segment_id, pushed["item_id"].to_pylist()))
        raise ConnectionError("the machine is away")

    name, on_machines = store_new_items(window, rows("a"), encoder_version="v1", push=push)
    assert on_machines is False
    assert seen == [("v1", name, ["a"])]
    assert [segment for segment, _ in WindowTail(window, "v1").poll()] == [name]


WORKER = """
import sys, threading, time
from datetime import UTC, datetime, timedelta
import numpy as np
from mim_ray.representation_center.new_items import store_new_items
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import fold, segment_rows

center, life = sys.argv[1], int(sys.argv[2])

def folding():
    while True:
        fold(f"{center}/window", EmbeddingTable(f"{center}/table"), keep_s=0.0)

threading.Thread(target=folding, daemon=True).start()
number = 0
while True:
    value = 1_000 * life + number
    # "shared" comes again and again, every third time with older content.
    at = datetime(2025, 1, 1, tzinfo=UTC) + timedelta(seconds=value if number % 3 else -value)
    vectors = np.full((2, 2), value, np.float32)
    rows = segment_rows([f"i{value}", "shared"], vectors, content_hashes=["h"] * 2, content_at=[at] * 2)
    store_new_items(f"{center}/window", rows, encoder_version="v1")
    print(value, flush=True)  # the acknowledgement
    number += 1
"""


def killed_again_and_again(tmp_path: Path, kills: int, seed: int) -> int:
    """Store, fold and kill; the number of acknowledged items, all of which must be in the table and be shown."""
    rng = random.Random(seed)
    center = str(tmp_path)
    acknowledged: list[int] = []
    for life in range(1, kills + 1):
        process = subprocess.Popen([sys.executable, "-c", WORKER, center, str(life)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        acknowledged.append(int(process.stdout.readline()))
        time.sleep(rng.uniform(0, 0.6))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        acknowledged += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    write_snapshot(f"{center}/snapshots", ["old"], np.zeros((1, 2), np.float32), encoder_version="v1")
    names = [f"i{value}" for value in acknowledged]
    newest = max(value for value in acknowledged if value % 1_000 % 3)
    for folded in (False, True):
        if folded:
            fold(f"{center}/window", EmbeddingTable(f"{center}/table"), keep_s=0.0)
        store = ParameterStore(f"{center}/snapshots", table=f"{center}/table", window=f"{center}/window")
        matrix, found, _ = store.multi_get([*names, "shared"])
        assert found.all(), "an acknowledged item is lost"
        assert matrix[:-1, 0].tolist() == acknowledged
        assert matrix[-1, 0] >= newest, "older content over newer"  # a message that was not acknowledged may be newer
    table = EmbeddingTable(f"{center}/table")
    _, files = table.scan("v1")
    everything = pa.concat_tables([file.read(["item_id", "shard_id"]) for file in files])
    assert everything.group_by(["item_id", "shard_id"]).aggregate([]).num_rows == everything.num_rows, "a row twice"
    current = {row["item_id"]: row["embedding"][0] for row in table.current_rows("v1").to_pylist()}
    assert {name: current[name] for name in names} == dict(zip(names, map(float, acknowledged), strict=True))
    return len(acknowledged)


def test_every_acknowledged_item_is_in_the_table_whenever_the_encoder_is_killed(tmp_path: Path) -> None:
    assert killed_again_and_again(tmp_path, kills=3, seed=0) > 5


@pytest.mark.chaos
def test_every_acknowledged_item_is_in_the_table_after_many_kills(tmp_path: Path) -> None:
    kills = int(os.environ.get("KILLS", "30"))
    assert killed_again_and_again(tmp_path, kills, seed=1) > 2 * kills
