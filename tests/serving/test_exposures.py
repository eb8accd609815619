"""What was shown is logged behind the rankings' back: complete while storage works, counted where it does not."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time

import pytest

from mim_ray.config.scenario import Serving
from mim_ray.representation_center import window_folder
from mim_ray.serving import exposures as module
from mim_ray.serving.exposures import Exposures, exposure_log, shown_now, user_hash


def shown(request: str, *items: str, arm: str | None = "a"):
    return shown_now(request, f"user of {request}", arm, "model@1", items, 50)


def logged(center) -> list[dict]:
    return exposure_log(str(center)).read().drop(["segment_id"]).to_pylist()


def test_each_shown_item_is_a_row_with_its_position(tmp_path):
    before = time.time()
    exposures = Exposures(exposure_log(str(tmp_path)))
    exposures.add(shown("r1", "x", "y"))
    exposures.add(shown("r2"))
    exposures.add(shown("r3", "z", arm=None))
    exposures.write()
    rows = logged(tmp_path)
    assert all(before <= row.pop("timestamp").timestamp() + 1e-3 <= time.time() + 1 for row in rows)
    of = {"release": "model@1"}
    assert rows == [
        {"request_id": "r1", "user_hash": user_hash("user of r1"), "arm": "a", "item_id": "x", "position": 1, **of},
        {"request_id": "r1", "user_hash": user_hash("user of r1"), "arm": "a", "item_id": "y", "position": 2, **of},
        {"request_id": "r3", "user_hash": user_hash("user of r3"), "arm": None, "item_id": "z", "position": 1, **of},
    ]
    assert exposures.num_dropped == 0


def test_only_the_top_of_a_long_answer_counts_as_shown():
    assert shown_now("r", "u", None, "m", ["a", "b", "c"], 2).item_ids == ["a", "b"]


def test_a_user_is_hashed_with_the_key_of_the_environment(monkeypatch):
    monkeypatch.delenv("MIM_RAY_USER_HASH_KEY", raising=False)
    plain = user_hash("u1")
    assert plain == user_hash("u1") != user_hash("u2")
    assert len(plain) == 32
    monkeypatch.setenv("MIM_RAY_USER_HASH_KEY", "secret" * 50)
    assert user_hash("u1") != plain
    assert user_hash("u1") == user_hash("u1")


def test_a_full_queue_drops_and_counts_and_nobody_waits(tmp_path, caplog):
    exposures = Exposures(exposure_log(str(tmp_path)), max_queued=3)
    for number in range(10):
        exposures.add(shown(f"r{number}", "x"))
    assert exposures.num_dropped == 7
    assert caplog.text.count("were not logged") == 3  # told at 1, 2 and 4
    exposures.write()
    assert [row["request_id"] for row in logged(tmp_path)] == ["r0", "r1", "r2"]


def test_what_could_not_be_stored_is_stored_later_once(tmp_path, monkeypatch):
    exposures = Exposures(exposure_log(str(tmp_path)))
    exposures.add(shown("r1", "x"))

    def away(*_):
        raise OSError("away")

    with monkeypatch.context() as broken:
        broken.setattr("mim_ray.representation_center.window_folder.write_segment", away)
        with pytest.raises(OSError, match="away"):
            exposures.write()
    exposures.add(shown("r2", "x"))
    exposures.write()
    exposures.write()
    assert [row["request_id"] for row in logged(tmp_path)] == ["r1", "r2"]


def test_what_was_stored_though_the_store_said_no_is_there_once(tmp_path, monkeypatch):
    exposures = Exposures(exposure_log(str(tmp_path)))
    exposures.add(shown("r1", "x"))
    write = window_folder.write_segment

    def liar(*args):
        write(*args)
        raise OSError("timed out")

    with monkeypatch.context() as broken:
        broken.setattr(window_folder, "write_segment", liar)
        with pytest.raises(OSError, match="timed out"):
            exposures.write()
    exposures.add(shown("r2", "x"))
    exposure_log(str(tmp_path)).fold(keep_s=0)
    exposures.write()
    for _ in range(2):
        assert [row["request_id"] for row in logged(tmp_path)] == ["r1", "r2"]
        exposure_log(str(tmp_path)).fold(keep_s=0)


def test_a_slow_store_never_delays_an_answer(tmp_path, monkeypatch):
    release, began = threading.Event(), threading.Event()

    def slow(*_):
        began.set()
        release.wait(60)

    monkeypatch.setattr("mim_ray.representation_center.window_folder.write_segment", slow)
    exposures = Exposures(exposure_log(str(tmp_path)))
    exposures.add(shown("r0", "x"))
    writer = threading.Thread(target=exposures.write)
    writer.start()
    assert began.wait(60)
    for number in range(100):
        exposures.add(shown(f"r{number}", "x"))  # returns although the store does not
    assert writer.is_alive()
    release.set()
    writer.join(60)
    assert exposures._queue.empty()
    assert exposures.num_dropped == 0


def test_an_open_one_writes_by_itself_and_the_rest_when_it_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EVERY_S", 0.02)
    exposures = Exposures.open(str(tmp_path), Serving())
    exposures.add(shown("r1", "x"))
    deadline = time.monotonic() + 60
    while not logged(tmp_path):
        assert time.monotonic() < deadline, "it does not write"
        time.sleep(0.01)
    exposures.stop()
    exposures.add(shown("r2", "x"))
    del exposures
    gc.collect()
    deadline = time.monotonic() + 60
    while len(logged(tmp_path)) < 2:
        assert time.monotonic() < deadline, "it does not write the rest"
        time.sleep(0.01)


def test_a_process_that_ends_writes_what_waits(tmp_path):
    program = """
import sys
from mim_ray.config.scenario import Serving
from mim_ray.serving.exposures import Exposures, shown_now
exposures = Exposures.open(sys.argv[1], Serving())
exposures.add(shown_now("r1", "u", None, "m", ["x"], 5))
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=180)
    assert [row["request_id"] for row in logged(tmp_path)] == ["r1"]
