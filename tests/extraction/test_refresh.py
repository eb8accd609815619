"""mim_ray/extraction/refresh.py: rounds on real Delta and Parquet catalogues."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from mim_ray.data.rejects import read_rejects
from mim_ray.data.schema import ITEMS, TIME
from mim_ray.data.transforms import content_hash
from mim_ray.errors import DataError
from mim_ray.extraction import encode_changes
from mim_ray.extraction import refresh as refresh_module
from mim_ray.extraction.refresh import Refresher, Round
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.updates import append_segment, fold, segment_rows
from mim_ray.runtime.lease import LeaseTakenError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def items_of(first: int, num: int, text: str = "title", **columns: list[Any]) -> pa.Table:
    """Items without pictures."""
    values = {"item_id": [f"item-{n}" for n in range(first, first + num)], "title": [f"{text} {n}" for n in range(num)]}
    return pa.table(
        {name: pa.array(value, ITEMS.schema.field(name).type) for name, value in (values | columns).items()}
    )


def found(done: Round) -> tuple[int, int, int, int]:
    return done.new, done.changed, done.deleted, done.unchanged


def current(refresher: Refresher) -> dict[str, tuple[str, tuple[float, ...]]]:
    """Hash and vector of every item, from the snapshot, which must show the table's current rows."""
    snapshot = Snapshot.open(refresher.line)
    rows = refresher.table.current_rows("v1").sort_by("item_id")
    places = snapshot.lookup(rows["item_id"])
    assert snapshot.num_rows == rows.num_rows
    assert snapshot.content_hashes(places).to_pylist() == rows["content_hash"].to_pylist()
    vectors = snapshot.gather(places)
    np.testing.assert_allclose(
        vectors, np.array(rows["embedding"].to_pylist(), np.float32).reshape(vectors.shape), atol=1e-6
    )
    values = [
        (item_hash, tuple(vector.round(4).tolist()))
        for item_hash, vector in zip(rows["content_hash"].to_pylist(), vectors, strict=True)
    ]
    return dict(zip(rows["item_id"].to_pylist(), values, strict=True))


def assert_same(a: Refresher, b: Refresher) -> None:
    left, right = current(a), current(b)
    assert sorted(left) == sorted(right)
    different = [(item_id, left[item_id], right[item_id]) for item_id in left if left[item_id] != right[item_id]]
    assert not different, different[:3]


def hash_of(refresher: Refresher, item_id: str) -> str | None:
    return current(refresher).get(item_id, (None, ()))[0]


def real_time(refresher: Refresher, item_id: str, title: str, at: datetime) -> None:
    """The new-item encoder's message."""
    rows = segment_rows(
        [item_id], np.ones((1, 4), np.float32), content_hashes=[content_hash(title, None)], content_at=[at]
    )
    append_segment(f"{os.path.dirname(refresher.table.uri)}/window", rows, encoder_version="v1")


def test_rounds_follow_a_delta_catalogue(tmp_path: Path, make_items: Callable[..., str], start: Any) -> None:
    uri = f"{tmp_path}/items"
    rows = pq.read_table(make_items(tmp_path / "data", num=100))
    write_deltalake(uri, rows)
    refresher = start(uri)
    assert found(refresher.round()) == (100, 0, 0, 0)
    nothing = refresher.round()
    assert (found(nothing), nothing.encoded, nothing.built) == ((0, 0, 0, 100), 0, False)

    copies = rows.slice(0, 3).set_column(0, "item_id", pa.array(["copy-0", "copy-1", "copy-2"]))
    write_deltalake(uri, copies, mode="append")
    done = refresher.round()
    assert (found(done), done.encoded, done.copied, done.built) == ((3, 0, 0, 100), 0, 3, True)

    table = DeltaTable(uri)
    table.delete("item_id in ('item-7', 'copy-1')")
    table.update(predicate="item_id = 'item-8'", new_values={"title": "changed"})
    table.update(predicate="item_id = 'item-9'", new_values={"category": "another"})
    done = refresher.round()
    assert (found(done), done.encoded) == ((0, 1, 2, 100), 1)
    assert hash_of(refresher, "item-7") is None
    assert hash_of(refresher, "item-8") == content_hash("changed", rows["image"][8].as_py())

    table.optimize.compact()
    table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    done = refresher.round()
    assert (found(done), done.encoded, done.built) == ((0, 0, 0, 101), 0, False)

    version = refresher.table.version
    assert found(refresher.round(full=True)) == (0, 0, 0, 101)
    assert refresher.table.version == version

    whole = start(uri, center="undisturbed")
    whole.round()
    assert_same(refresher, whole)


def test_rounds_follow_a_parquet_catalogue_and_do_not_read_files_that_did_not_change(
    tmp_path: Path, start: Any
) -> None:
    folder = tmp_path / "items"
    folder.mkdir()
    pq.write_table(items_of(0, 50), folder / "a.parquet")
    pq.write_table(items_of(50, 50), folder / "b.parquet")
    refresher = start(str(folder), max_deleted_ratio=1.0)
    assert found(refresher.round()) == (100, 0, 0, 0)
    assert found(refresher.round()) == (0, 0, 0, 100)

    unread = folder / "a.parquet"  # what is looked at shows in its records, which hold the file's time
    before = refresher._state.files[str(unread)]
    changed = items_of(50, 49).set_column(1, "title", pa.array([f"title {n}" for n in range(48)] + ["changed"]))
    pq.write_table(changed, folder / "b.parquet")
    pq.write_table(items_of(200, 3), folder / "c.parquet")
    assert found(refresher.round()) == (3, 1, 1, 98)
    assert refresher._state.files[str(unread)] == before

    (folder / "b.parquet").rename(folder / "d.parquet")
    done = refresher.round()
    assert (found(done), done.built) == ((0, 0, 0, 102), False)
    (folder / "d.parquet").unlink()
    assert found(refresher.round()) == (0, 0, 49, 53)
    whole = start(str(folder), center="undisturbed")
    whole.round()
    assert current(refresher).keys() == current(whole).keys()


def test_many_changes_go_through_the_pipeline_with_the_same_outcome(
    tmp_path: Path, make_items: Callable[..., str], start: Any
) -> None:
    uri = make_items(
        tmp_path / "data", num=100, image={3: b"broken", 4: None}, title={3: None}, item_id={7: "item-6", 8: None}
    )
    few, many = start(uri), start(uri, center="many", warm_rows=1)
    for number in range(2):
        a, b = few.round(), many.round()
        assert found(a) == found(b) == ((98, 0, 0, 1), (0, 4, 1, 95))[number]
        assert a.rejected == b.rejected
        assert_same(few, many)
        rejects = [read_rejects(f"{tmp_path}/{name}-rejects", "refresh").sort_by("key") for name in ("center", "many")]
        assert rejects[0].to_pylist() == rejects[1].to_pylist()
        file = tmp_path / "data/items.parquet/part-00001.parquet"
        rows = pq.read_table(file)
        titles = ["other", None, "other", *rows["title"].to_pylist()[3:]]
        images = [None, None, *rows["image"].to_pylist()[2:]]
        changed = rows.set_column(1, "title", pa.array(titles)).set_column(3, "image", pa.array(images, pa.binary()))
        pq.write_table(changed.set_column(1, "title", pa.array([*titles[:3], "more", *titles[4:]])), file)
    assert hash_of(few, "item-51") is None  # it lost all its content


def test_newer_real_time_content_stays_and_older_gives_way(tmp_path: Path, start: Any) -> None:
    folder = tmp_path / "items"
    folder.mkdir()
    pq.write_table(items_of(0, 10), folder / "a.parquet")
    refresher = start(str(folder))
    refresher.round()
    now = datetime.now(UTC)
    real_time(refresher, "item-1", "real time", now)
    real_time(refresher, "item-2", "real time", now)
    real_time(refresher, "only-real-time", "real time", now)
    fold(f"{tmp_path}/center/window", refresher.table)
    refresher.round()
    assert hash_of(refresher, "item-1") == hash_of(refresher, "only-real-time") == content_hash("real time", None)

    time.sleep(0.01)
    for item in ("item-1", "item-2"):
        real_time(refresher, item, "real time", datetime.now(UTC))
    # Written again, with an old time for what is news: newer real-time content stays, also where the row did not change.
    pq.write_table(
        items_of(0, 10, "title").set_column(
            1, "title", pa.array(["title 0", "late", *[f"title {n}" for n in range(2, 10)]])
        ),
        folder / "a.parquet",
    )
    os.utime(folder / "a.parquet", (0, 0))
    done = refresher.round()
    assert (done.older, done.changed, done.deleted) == (1, 0, 0)
    assert hash_of(refresher, "item-1") == hash_of(refresher, "item-2") == content_hash("real time", None)

    time.sleep(0.01)
    pq.write_table(items_of(0, 10, "newer"), folder / "a.parquet")
    assert refresher.round().changed == 10
    assert hash_of(refresher, "item-1") == content_hash("newer 1", None)

    # Deleted in the catalogue before the real-time message: it stays. After it: it goes.
    real_time(refresher, "item-9", "real time again", datetime.now(UTC) + timedelta(seconds=2))
    pq.write_table(items_of(0, 8, "newer"), folder / "a.parquet")
    time.sleep(2.1)
    done = refresher.round()
    assert (done.deleted, done.older) == (1, 1)
    fold(f"{tmp_path}/center/window", refresher.table)
    refresher.round(full=True)
    assert {"item-9", "only-real-time"} <= current(refresher).keys()
    assert "item-8" not in current(refresher)


def test_times_in_the_future_cannot_lock_an_item(tmp_path: Path, start: Any) -> None:
    folder = tmp_path / "items"
    folder.mkdir()
    future = datetime.now(UTC) + timedelta(days=400)
    pq.write_table(items_of(0, 3, created_at=[future, None, None]), folder / "a.parquet")
    os.utime(folder / "a.parquet", (future.timestamp(), future.timestamp()))
    refresher = start(str(folder))
    assert refresher.round().rejected == {"created_at in the future": 1}
    at = refresher.table.current_rows("v1")["content_at"].cast(pa.int64()).to_numpy()
    assert (at <= time.time_ns() // 1_000).all()
    refresher.table.append(  # as a full extraction may have written it
        pa.table(
            {
                "item_id": ["item-2"],
                "embedding": [[1.0] * 4],
                "content_hash": ["old"],
                "content_at": pa.array([future], TIME),
            }
        ),
        encoder_version="v1",
    )
    pq.write_table(items_of(0, 3, "changed"), folder / "a.parquet")
    assert refresher.round().changed == 3
    assert hash_of(refresher, "item-2") == content_hash("changed 2", None)
    pq.write_table(items_of(0, 2, "changed"), folder / "a.parquet")
    assert refresher.round().deleted == 1
    assert "item-2" not in current(refresher)


def test_rejects_are_those_of_the_catalogue_as_it_is(
    tmp_path: Path, make_items: Callable[..., str], start: Any
) -> None:
    uri = make_items(tmp_path / "data", num=20, image={3: b"broken", 12: b"broken", 13: b"broken"}, title={12: None})
    refresher = start(uri)
    assert refresher.round().rejected == {"image format": 3, "no content": 1}
    assert found(refresher.round(full=True)) == (1, 0, 0, 19)  # item-12 is still looked for, item-3's title is known
    file = Path(uri) / "part-00001.parquet"
    rows = pq.read_table(file)
    images = rows["image"].to_pylist()
    images[2] = rows["image"][5].as_py()
    pq.write_table(rows.set_column(3, "image", pa.array(images, pa.binary())), file)
    done = refresher.round()
    assert (found(done), dict(done.rejected)) == ((1, 0, 0, 19), {})
    left = read_rejects(f"{tmp_path}/center-rejects", "refresh")
    assert sorted(left["key"].to_pylist()) == ["item-13", "item-3"]


def test_a_catalogue_that_lost_most_of_its_items_is_refused(tmp_path: Path, start: Any) -> None:
    folder = tmp_path / "items"
    folder.mkdir()
    pq.write_table(items_of(0, 300), folder / "a.parquet")
    refresher = start(str(folder))
    refresher.round()
    pq.write_table(items_of(0, 100), folder / "a.parquet")
    with pytest.raises(DataError, match=r"lacks 200 of 300 known items.*max_deleted_ratio"):
        refresher.round()
    pq.write_table(items_of(0, 250), folder / "a.parquet")
    assert found(refresher.round()) == (0, 0, 50, 250)
    (folder / "a.parquet").unlink()
    with pytest.raises(DataError, match="is empty"):
        refresher.round()


def test_a_second_refresher_of_the_same_center_is_refused(tmp_path: Path, start: Any) -> None:
    pq.write_table(items_of(0, 5), tmp_path / "items.parquet")
    start(f"{tmp_path}/items.parquet")
    with pytest.raises(LeaseTakenError, match=r"Another refresh is running: process \d+ on "):
        start(f"{tmp_path}/items.parquet")


@pytest.mark.parametrize("step", ["PackWriter", "find_changes", "write_deletions", "write_rejects", "build_snapshot"])
def test_a_round_that_failed_anywhere_is_made_up_for_by_the_next(
    tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    folder = tmp_path / "items"
    folder.mkdir()
    pq.write_table(items_of(0, 20, title=[None] + [f"title {n}" for n in range(19)]), folder / "a.parquet")
    refresher = start(str(folder))
    refresher.round()
    pq.write_table(items_of(5, 20, "changed", title=[None] + [f"changed {n}" for n in range(19)]), folder / "a.parquet")
    module = encode_changes if step == "write_deletions" else refresh_module
    original = getattr(module, step)

    def fail(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        raise RuntimeError("the machine went down")

    with monkeypatch.context() as patched:
        patched.setattr(module, step, fail)
        with pytest.raises(RuntimeError, match="went down"):
            refresher.round()
    refresher.__exit__(None, None, None)
    again = start(str(folder))
    again.round()
    version = again.table.version
    assert found(again.round()) == (0, 0, 0, 20)
    assert again.table.version == version
    whole = start(str(folder), center="undisturbed")
    whole.round()
    assert_same(again, whole)
    rows = pa.concat_tables([file.read(["item_id", "content_hash"]) for file in again.table.scan("v1")[1]]).to_pylist()
    assert len({str(row) for row in rows}) == len(rows)
