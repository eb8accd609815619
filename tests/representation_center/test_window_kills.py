"""Window messages and compaction under SIGKILL: between every two steps, and at random moments (chaos)."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from mim_ray.representation_center.compaction import compact
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import fold, list_segments

COMMON = """
import json, os, signal, sys, time
from datetime import UTC, datetime, timedelta
import numpy as np
import pandas  # which pyarrow imports when first needed: not anew in each forked process
from mim_ray import artifacts
from mim_ray.representation_center import compacted_files, compaction, updates, window_folder
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import append_segment, fold, segment_rows

center = sys.argv[1]
window, table = f"{center}/window", f"{center}/table"

def message(ids, value):
    at = datetime(2025, 1, 1, tzinfo=UTC) + timedelta(seconds=value)
    embedding = np.full((len(ids), 2), value, np.float32)
    return segment_rows(ids, embedding, content_hashes=[f"h{value}"] * len(ids), content_at=[at] * len(ids))

def acknowledge(item):
    handle = os.open(f"{center}/acks", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{item}\\n".encode())
    os.close(handle)
"""

# A first process notes its steps; then, for each of them, a forked one does the same work and is killed just before it.
STEPS = (
    COMMON
    + """
def work(number, fatal=None):
    seen = {}

    def step(name):
        seen[name] = seen.get(name, 0) + 1
        if fatal is None:
            with open(f"{center}/steps", "a") as file:
                file.write(f"{name} {seen[name]}\\n")
        elif fatal == f"{name} {seen[name]}":
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(owner, name):
        whole = getattr(owner, name)
        def watched(*args, **options):
            step(name)
            result = whole(*args, **options)
            if name == "_try":
                step("committed")
            return result
        setattr(owner, name, watched)

    for owner, name in [(os, "fsync"), (os, "replace"), (EmbeddingTable, "_try"), (artifacts, "remove"), (updates, "_write"),
                        (window_folder, "remove_empty_folders"), (compacted_files._File, "write"),
                        (compacted_files._File, "close")]:
        watch(owner, name)
    append_segment(window, message([f"k{number}", "all"], number), encoder_version="v1")
    acknowledge(f"k{number}")
    mine = EmbeddingTable(table)
    fold(window, mine, keep_s=0)
    compaction._merge(mine, compaction._in_order(mine.scan("v1")[1]), 10**6, None, None)

def recover():
    fold(window, EmbeddingTable(table), keep_s=0)

def forked(function, *arguments):
    pid = os.fork()
    if pid == 0:
        try:
            function(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]

def first():
    append_segment(window, message(["first", "all"], 0), encoder_version="v1")
    fold(window, EmbeddingTable(table), keep_s=0)

assert forked(first) == 0
assert forked(work, 0) == 0
for number, fatal in enumerate(open(f"{center}/steps").read().splitlines(), 1):
    status = forked(work, number, fatal)
    print(json.dumps({"k": number, "at": fatal, "killed": os.WIFSIGNALED(status)}), flush=True)
    if number % 4 == 0:  # else the next one finds what several killed ones left
        assert forked(recover) == 0
"""
)

WRITER = (
    COMMON
    + """
name = sys.argv[2]
for number in range(1_000_000):
    item = f"{name}-{number}"
    append_segment(window, message([item, "all"], int(time.time() * 1000) % 10**8), encoder_version="v1")
    acknowledge(item)
"""
)
FOLDER = (
    COMMON
    + """
mine = EmbeddingTable(table)
while True:
    fold(window, mine, keep_s=0.2)
"""
)
COMPACTOR = (
    COMMON
    + """
mine = EmbeddingTable(table)
while True:
    compaction.compact(mine, "v1", fan_in=3)
    time.sleep(0.05)
"""
)


def acknowledged(center: Path) -> list[str]:
    return (center / "acks").read_text().split()


def check(center: Path) -> Counter[str]:
    """After a last fold every acknowledged item is in the table once, and `all` has its newest content."""
    table = EmbeddingTable(f"{center}/table")
    before = {row["item_id"] for row in table.current_rows("v1").to_pylist()}
    fold(f"{center}/window", table, keep_s=0)
    assert list_segments(f"{center}/window", "v1") == []
    rows = pa.concat_tables([file.read() for file in table.scan("v1")[1]])
    counts = Counter(rows["item_id"].to_pylist())
    assert before <= counts.keys()
    del counts["all"]
    assert set(counts.values()) == {1}
    missing = set(acknowledged(center)) - counts.keys()
    assert missing == set()
    everything = [row for row in rows.to_pylist() if row["item_id"] == "all"]
    current = {row["item_id"]: row for row in table.current_rows("v1").to_pylist()}
    assert current["all"]["content_at"] == max(row["content_at"] for row in everything)
    compact(table, "v1", fan_in=2)
    assert {row["item_id"] for row in table.current_rows("v1").to_pylist()} == current.keys()
    return counts


def test_killed_between_any_two_steps_each_acknowledged_item_is_in_once(tmp_path: Path) -> None:
    EmbeddingTable(f"{tmp_path}/table").create()
    out = subprocess.run(
        [sys.executable, "-c", STEPS, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert out.returncode == 0, out.stderr
    events = [json.loads(line) for line in out.stdout.splitlines()]
    assert [event for event in events if not event["killed"]] == []
    met = {event["at"].split()[0] for event in events}
    assert met == {
        "fsync",
        "replace",
        "_write",
        "_try",
        "committed",
        "remove",
        "remove_empty_folders",
        "write",
        "close",
    }
    counts = check(tmp_path)
    told = set(acknowledged(tmp_path))
    assert len(told) > len(events) // 2  # killed after the answer, in the fold or the compaction
    assert counts.keys() - told  # killed after the rename but before the answer: in, though nobody was told


def start(program: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program, *arguments])


@pytest.mark.chaos
def test_killed_at_random_moments_each_acknowledged_item_is_in_once(tmp_path: Path) -> None:
    """KILLS (default 20) kills among two writers, two folding processes and a compaction."""
    kills = int(os.environ.get("KILLS", "20"))
    EmbeddingTable(f"{tmp_path}/table").create()
    center, rng = str(tmp_path), random.Random(7)
    roles = {"w0": WRITER, "w1": WRITER, "f0": FOLDER, "f1": FOLDER, "c": COMPACTOR}
    running = {name: start(program, center, f"{name}-0") for name, program in roles.items()}
    num_acks = 0
    try:
        for kill in range(kills):
            num_acks += rng.randrange(20, 200)
            deadline = time.monotonic() + 120
            while not (tmp_path / "acks").exists() or len(acknowledged(tmp_path)) < num_acks:
                assert time.monotonic() < deadline, "nothing is acknowledged any more"
                time.sleep(0.02)
            num_acks = len(acknowledged(tmp_path))
            name = rng.choice(sorted(running))
            process = running[name]
            assert process.poll() is None, f"{name} ended by itself"
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            running[name] = start(roles[name], center, f"{name}-{kill + 1}")
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    check(tmp_path)
    print(f"{kills} kills, {len(acknowledged(tmp_path)):,} acknowledged items, none lost, none twice")
