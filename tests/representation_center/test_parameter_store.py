"""mim_ray/representation_center/parameter_store.py: what it holds in memory is bounded by what came since the newest snapshot."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from mim_ray.errors import ArtifactError
from mim_ray.representation_center import parameter_store as module
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.parameter_store import ParameterStore
from mim_ray.representation_center.snapshot_line import switch_snapshot
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import append_segment, fold

from .messages import message


@pytest.fixture
def center(tmp_path: Path) -> str:
    table = EmbeddingTable(f"{tmp_path}/table").create()
    table.append(message(["a", "b"], 1, 1), encoder_version="v1", shard_id="s")
    build_snapshot(table, "v1", f"{tmp_path}/snapshots/v1")
    return str(tmp_path)


def post(center: str, ids: list[str], value: float, day: int, **options: object) -> None:
    append_segment(f"{center}/window", message(ids, value, day, **options), encoder_version="v1")


def build(center: str) -> str:
    """Fold the window and make the line's next state; its URI."""
    table = EmbeddingTable(f"{center}/table")
    fold(f"{center}/window", table, keep_s=0)
    return build_snapshot(table, "v1", f"{center}/snapshots/v1").uri


def open_store(center: str, snapshot: str | None = None) -> ParameterStore:
    snapshot = snapshot or f"{center}/snapshots/v1"
    return ParameterStore(snapshot, table=f"{center}/table", window=f"{center}/window", encoder_version="v1")


def shown(store: ParameterStore, *ids: str) -> dict[str, tuple[float, str | None]]:
    matrix, found, category = store.multi_get(list(ids))
    rows = zip(ids, matrix[:, 0].tolist(), found, category.to_pylist(), strict=True)
    return {item: (value, named) for item, value, there, named in rows if there}


def test_a_newer_snapshot_is_taken_over_and_only_what_came_since_stays_in_memory(center: str) -> None:
    store = open_store(center)
    for number in range(20):
        post(center, [f"n{number}"], 2, 2, categories=["bags" if number else None])
    store.refresh()
    assert store.num_overlay_rows == 20
    assert not store.take_newer(), "there is none"
    uri = build(center)
    post(center, ["later"], 3, 3)
    assert store.take_newer()
    assert store.lookup.snapshot.uri == uri
    assert store.num_overlay_rows == 1
    expected = {"a": (1, None), "n0": (2, None), "n5": (2, "bags"), "later": (3, None)}
    assert shown(store, "a", "n0", "n5", "later", "nobody") == expected, "categories too, which a snapshot has not"
    assert not store.take_newer()
    store.name({"a": "hats", "n5": "shoes"})
    assert shown(store, "a", "n5") == {"a": (1, "hats"), "n5": (2, "bags")}, "what a message named goes before"


def test_a_store_that_is_opened_with_an_old_snapshot_reads_as_one_that_ran_all_the_time(center: str) -> None:
    first = build(center)
    running = open_store(center, first)
    post(center, ["new", "gone"], 2, 2, categories=["bags", "hats"])
    build(center)
    running.take_newer()
    post(center, ["gone"], 0, 3, deleted=[True])
    post(center, ["new"], 4, 3)  # names no category any more
    build(center)
    running.take_newer()
    opened = open_store(center, first)
    assert shown(running, "a", "new", "gone") == shown(opened, "a", "new", "gone") == {"a": (1, None), "new": (4, None)}
    assert opened.num_overlay_rows == 0


def test_a_line_that_was_switched_back_is_not_followed_back(center: str) -> None:
    first = Path(build(center)).name
    post(center, ["new"], 2, 2)
    store = open_store(center, build(center))
    switch_snapshot(f"{center}/snapshots/v1", first)
    assert not store.take_newer()


def test_a_damaged_newer_snapshot_keeps_nobody_from_reading_the_old_one(center: str, caplog) -> None:
    first = Path(f"{center}/snapshots/v1") / Path(open_store(center).lookup.snapshot.uri).name
    store = open_store(center)
    post(center, ["new"], 2, 2)
    matrix = Path(build(center)) / "matrix.bin"
    matrix.write_bytes(bytes(len(matrix.read_bytes())))
    store.lookup.refresh(now=True)
    with pytest.raises(ArtifactError):
        store.take_newer()
    assert shown(store, "new") == shown(open_store(center, str(first)), "new") == {"new": (2, None)}
    assert "a newer one cannot be" in caplog.text


def test_a_damaged_segment_keeps_no_store_from_opening(center: str, caplog) -> None:
    post(center, ["lost"], 2, 2)
    (segment,) = Path(f"{center}/window").rglob("*.arrow")
    segment.write_bytes(b"no arrow")
    assert shown(open_store(center), "a", "lost") == {"a": (1, None)}
    assert "damaged" in caplog.text


def test_a_thread_takes_it_over_and_no_item_that_was_seen_is_missing_in_between(center: str, monkeypatch) -> None:
    monkeypatch.setattr(module, "NEWER_EVERY_S", 0.02)
    store = open_store(center)
    store.start(every_s=0.01)
    missing, stop = [], threading.Event()

    def read() -> None:
        seen: set[str] = set()
        names = [f"n{number}" for number in range(30)]
        while not stop.is_set():
            there = set(shown(store, *names))
            missing.extend(seen - there)
            seen |= there

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(30):
            post(center, [f"n{number}"], 2, 2)
            if number % 10 == 9:
                uri = build(center)
                deadline = time.monotonic() + 30
                while store.lookup.snapshot.uri != uri:
                    assert time.monotonic() < deadline, "it is not taken over"
                    time.sleep(0.01)
    finally:
        stop.set()
        reader.join()
        store.stop()
    assert not missing
    assert not store.follows(store.lookup)
