"""The durable log behind events and exposures: each appended row is read once, whatever dies and whoever folds."""

from __future__ import annotations

import concurrent.futures
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_ray import artifacts
from mim_ray.errors import ArtifactError
from mim_ray.representation_center import window_folder
from mim_ray.serving import row_log
from mim_ray.serving.row_log import RowLog

SCHEMA = pa.schema([("name", pa.string()), ("value", pa.float64())])


def rows(*names: str) -> pa.Table:
    return pa.table({"name": list(names), "value": [1.0] * len(names)})


def names(log: RowLog, **when: datetime) -> list[str]:
    return log.read(**when)["name"].to_pylist()


@pytest.fixture
def log(tmp_path: Path) -> RowLog:
    return RowLog(f"{tmp_path}/log", SCHEMA)


def test_rows_are_read_in_the_order_in_which_they_came_before_and_after_folding(log):
    assert names(log) == []
    log.append(rows("b", "a"))
    log.append(rows("c"))
    assert names(log) == ["b", "a", "c"]
    assert log.fold(keep_s=0) == row_log.FoldedRows(2, 3, 2)
    log.append(rows("a2"))
    assert names(log) == ["b", "a", "c", "a2"]
    assert len(list(Path(log.uri).glob("segments/*/*.arrow"))) == 1
    assert log.fold(keep_s=0) == row_log.FoldedRows(1, 1, 1)
    assert log.fold(keep_s=0) == row_log.FoldedRows()
    assert names(log) == ["b", "a", "c", "a2"]


def test_young_segments_stay_and_are_folded_later(log):
    log.append(rows("a"))
    assert log.fold(keep_s=60) == row_log.FoldedRows()
    assert log.fold(keep_s=0, wait_s=60) == row_log.FoldedRows()
    assert names(log) == ["a"]


def test_a_span_of_time_is_read_from_segments_and_from_files(log):
    log.append(rows("a"))
    time.sleep(0.002)
    middle = datetime.now(UTC)
    log.append(rows("b"))
    for _ in range(2):
        assert names(log, since=middle) == ["b"]
        assert names(log, until=middle) == ["a"]
        assert names(log, since=middle - timedelta(hours=2), until=middle + timedelta(hours=2)) == ["a", "b"]
        log.fold(keep_s=0)


def test_what_comes_together_shares_a_segment(log, monkeypatch):
    write = window_folder.write_segment
    monkeypatch.setattr(window_folder, "write_segment", lambda *args: (time.sleep(0.05), write(*args)))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        segments = list(pool.map(lambda number: log.append(rows(f"n{number}")), range(24)))
    assert sorted(names(log)) == sorted(f"n{number}" for number in range(24))
    assert len(set(segments)) < 24, "some shared one"
    found = log.read()
    of = dict(zip(found["name"].to_pylist(), found["segment_id"].to_pylist(), strict=True))
    assert [of[f"n{number}"] for number in range(24)] == segments


def test_a_failed_write_is_told_to_everyone_who_waited_and_the_next_one_works(log, monkeypatch):
    def full(*_):
        time.sleep(0.05)
        raise OSError("no space left")

    with monkeypatch.context() as broken, concurrent.futures.ThreadPoolExecutor(4) as pool:
        broken.setattr(window_folder, "write_segment", full)
        for future in [pool.submit(log.append, rows(f"n{number}")) for number in range(4)]:
            with pytest.raises(OSError, match="no space left"):
                future.result()
    log.append(rows("after"))
    assert names(log) == ["after"]


def test_the_rows_must_fit_and_there_must_be_some(log):
    with pytest.raises(ValueError, match="at least one row"):
        log.append(rows())
    with pytest.raises(KeyError):
        log.append(pa.table({"other": ["a"]}))


def test_a_tail_gives_what_others_append_and_after_a_long_pause_what_was_folded_meanwhile(log, monkeypatch):
    log.append(rows("before"))
    tail = RowLog(log.uri, SCHEMA).follow()
    assert [part["name"].to_pylist() for part in tail.poll()] == [["before"]]
    assert tail.poll() == []
    log.append(rows("a"))
    log.append(rows("b", "c"))
    assert [part["name"].to_pylist() for part in tail.poll()] == [["a"], ["b", "c"]]
    log.append(rows("d"))
    log.fold(keep_s=0)
    assert tail.poll() == []
    tail._polled_at -= row_log.KEEP_S  # a process that slept
    assert "d" in [name for part in tail.poll() for name in part["name"].to_pylist()]
    assert tail.poll() == []


def test_a_tail_that_meets_a_failing_store_gives_the_rows_when_it_works_again(log, monkeypatch):
    tail = log.follow()
    log.append(rows("a"))
    with monkeypatch.context() as broken:
        broken.setattr(artifacts, "read_bytes", lambda _: (_ for _ in ()).throw(OSError("away")))
        with pytest.raises(OSError, match="away"):
            tail.poll()
    assert [part["name"].to_pylist() for part in tail.poll()] == [["a"]]


STEPS = ["list", "read", "write", "written", "remove", "removed"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("nth", [1, 3])
def test_a_fold_that_dies_between_any_two_steps_loses_and_doubles_nothing(log, monkeypatch, step, nth):
    for number in range(6):
        log.append(rows(f"n{number}", f"m{number}"))
    expected = names(log)
    monkeypatch.setattr("mim_ray.serving.row_log_files.READ_AT_ONCE", 2)
    monkeypatch.setattr("mim_ray.serving.row_log_files.MAX_FOLDED_BYTES", 1)  # a file for every two segments
    seen = 0

    class Killed(BaseException):
        pass

    def dying(owner, name, before, after):
        whole = getattr(owner, name)

        def watched(*args, **options):
            nonlocal seen
            for when in (before, after):
                if when == step:
                    seen += 1
                    if seen == nth:
                        if when == after:
                            whole(*args, **options)
                        raise Killed
            return whole(*args, **options)

        return watched

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "list_files", dying(artifacts, "list_files", "list", None))
        patch.setattr(artifacts, "read_bytes", dying(artifacts, "read_bytes", "read", None))
        patch.setattr(artifacts, "write_bytes", dying(artifacts, "write_bytes", "write", "written"))
        patch.setattr(artifacts, "remove", dying(artifacts, "remove", "remove", "removed"))
        if (step, nth) == ("list", 3):
            log.fold(keep_s=0)  # it lists once: nobody dies
        else:
            with pytest.raises(Killed):
                log.fold(keep_s=0)
    assert names(log) == expected
    log.append(rows("later"))
    log.fold(keep_s=0)
    assert names(log) == [*expected, "later"]
    assert list(Path(log.uri).glob("segments/*/*.arrow")) == []
    files = [pq.read_table(path)["name"].to_pylist() for path in Path(log.uri).glob("folded/*/*.parquet")]
    assert sorted(name for file in files for name in file) == sorted([*expected, "later"]), "one fold doubles nothing"


def test_two_folds_of_overlapping_segments_are_read_once(log, monkeypatch):
    log.append(rows("a"))
    log.append(rows("b"))
    other = RowLog(log.uri, SCHEMA)
    remove = artifacts.remove

    def meanwhile(uri):
        """Before the first segment is deleted another process folds all of them, one more too, not seeing our file."""
        if artifacts.remove is meanwhile:
            monkeypatch.setattr(artifacts, "remove", remove)
            other.append(rows("c"))
            with monkeypatch.context() as blind:
                blind.setattr(row_log, "segments_of", lambda _: set())
                other.fold(keep_s=0)
        remove(uri)

    monkeypatch.setattr(artifacts, "remove", meanwhile)
    log.fold(keep_s=0)
    assert len(list(Path(log.uri).glob("folded/*/*.parquet"))) == 2
    assert names(log) == ["a", "b", "c"]


def test_reading_while_others_append_and_fold_misses_and_doubles_nothing(log):
    def write(writer: int) -> list[str]:
        mine = RowLog(log.uri, SCHEMA)
        done = []
        for number in range(40):
            done.append(f"{writer}-{number}")
            mine.append(rows(done[-1]))
        return done

    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        writers = [pool.submit(write, writer) for writer in range(2)]
        folders = [pool.submit(lambda: [log.fold(keep_s=0) for _ in range(15)]) for _ in range(2)]
        seen: set[str] = set()
        while not all(future.done() for future in writers):
            found = names(log)
            assert len(set(found)) == len(found)
            assert seen <= set(found)
            seen = set(found)
        done = [name for future in writers for name in future.result()]
        for future in folders:
            future.result()
    assert sorted(names(log)) == sorted(done)


def test_a_damaged_segment_is_named_and_the_others_are_folded(log):
    log.append(rows("a"))
    log.append(rows("b"))
    bad = sorted(Path(log.uri).glob("segments/*/*.arrow"))[0]
    bad.write_bytes(b"garbage")
    with pytest.raises(ArtifactError, match=r"is damaged .* its rows are lost"):
        log.fold(keep_s=0)
    bad.unlink()
    assert names(log) == ["b"]


def test_a_damaged_file_is_named(log):
    log.append(rows("a"))
    log.fold(keep_s=0)
    next(Path(log.uri).glob("folded/*/*.parquet")).write_bytes(b"garbage")
    with pytest.raises(ArtifactError, match="bring it back from a copy"):
        log.read()


def test_it_works_on_an_object_store(s3):
    log = RowLog(f"{s3.uri}/log", SCHEMA)
    tail = RowLog(log.uri, SCHEMA).follow()
    s3.requests()
    log.append(rows("a"))
    assert [request.split()[0] for request in s3.requests()] == ["PUT"]
    log.append(rows("b", "c"))
    assert [part["name"].to_pylist() for part in tail.poll()] == [["a"], ["b", "c"]]
    assert log.fold(keep_s=0) == row_log.FoldedRows(2, 3, 2)
    log.append(rows("d"))
    assert names(log) == ["a", "b", "c", "d"]
