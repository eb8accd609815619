"""Posted events become files of the table `interactions`, each event once, as often as the job runs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_ray.data.schema import INTERACTIONS
from mim_ray.data.sources import open_dataset, shards
from mim_ray.errors import DataError
from mim_ray.pipeline.export_events import export_events, main
from mim_ray.representation_center import window_folder
from mim_ray.serving.events import SCHEMA, event_log

MONDAY = datetime(2026, 3, 2, tzinfo=UTC)


@pytest.fixture
def post(tmp_path, monkeypatch):
    """post(when received, ids…): as if events had come at that time."""

    def store(at: datetime, *ids: str) -> None:
        number = iter(range(10**6))
        name = lambda: f"{int(at.timestamp()) * 10**9 + next(number):020d}-{'-'.join(ids)}"  # noqa: E731
        monkeypatch.setattr(window_folder, "new_segment_id", name)
        event = {"user_id": "7", "item_id": "i1", "event": "click", "timestamp": at, "request_id": "r1", "revenue": 1.5}
        rows = [{**event, "event_id": event_id, "rating": None} for event_id in ids]
        event_log(f"{tmp_path}/center").append(pa.Table.from_pylist(rows, SCHEMA))

    return store


def files(root: Path) -> dict[str, int]:
    return {path.name: pq.read_metadata(path).num_rows for path in sorted((root / "interactions").glob("*.parquet"))}


def test_each_day_is_a_file_and_an_event_that_comes_again_counts_on_its_first_day(post, tmp_path):
    post(MONDAY + timedelta(hours=1), "a", "b")
    post(MONDAY + timedelta(hours=23), "c")
    post(MONDAY + timedelta(hours=25), "c", "d")
    event_log(f"{tmp_path}/center").fold(keep_s=0)
    post(MONDAY + timedelta(hours=26), "a", "d", "e")
    now = MONDAY + timedelta(hours=27)
    expected = {"posted-events-2026-03-02.parquet": 3, "posted-events-2026-03-03.parquet": 2}
    export_events(f"{tmp_path}/center", f"{tmp_path}/shop", now)
    assert files(tmp_path / "shop") == expected
    post(MONDAY + timedelta(hours=22), "held-up")  # stored after Monday's file was made
    post(MONDAY + timedelta(hours=75), "f")
    now = MONDAY + timedelta(hours=76)
    export_events(f"{tmp_path}/center", f"{tmp_path}/shop", now)
    expected |= {"posted-events-2026-03-02.parquet": 4, "posted-events-2026-03-05.parquet": 1}
    assert files(tmp_path / "shop") == expected
    again = export_events(f"{tmp_path}/center", f"{tmp_path}/shop", now)
    assert list(again.values()) == [1], "days that are over are not written again"
    assert files(tmp_path / "shop") == expected


def test_events_of_several_users_under_one_id_are_all_exported(tmp_path):
    at = datetime.now(UTC)
    for user in ("7", "8", "7"):
        event = {"event_id": "1", "user_id": user, "item_id": "i1", "event": "click", "timestamp": at}
        event_log(f"{tmp_path}/center").append(pa.Table.from_pylist([event], SCHEMA))
    export_events(f"{tmp_path}/center", f"{tmp_path}/shop")
    (table,) = [shard.read() for shard in shards(f"{tmp_path}/shop/interactions", "interactions")]
    assert table["user_id"].to_pylist() == ["7", "8"]


def test_the_files_are_read_as_the_table_beside_the_shops_own(post, tmp_path):
    folder = tmp_path / "shop" / "interactions"
    folder.mkdir(parents=True)
    own = {
        "user_id": [1, 2],
        "item_id": ["x", "y"],
        "event": ["buy"] * 2,
        "timestamp": [MONDAY.replace(tzinfo=None)] * 2,
    }
    pq.write_table(pa.table(own), folder / "part-0.parquet")
    post(MONDAY, "a")
    export_events(f"{tmp_path}/center", f"{tmp_path}/shop", MONDAY + timedelta(hours=1))
    rows = pa.concat_tables([shard.read() for shard in shards(f"{tmp_path}/shop/interactions", "interactions")])
    assert rows.schema.equals(INTERACTIONS.schema)
    assert rows["user_id"].to_pylist() == ["1", "2", "7"]
    assert rows["timestamp"].to_pylist() == [MONDAY] * 3
    open_dataset(f"{tmp_path}/shop/interactions", "interactions")


def test_without_a_table_there_one_is_made_with_impression_ids_from_requests(post, tmp_path):
    post(MONDAY, "a")
    export_events(f"{tmp_path}/center", f"{tmp_path}/shop", MONDAY)
    row = shards(f"{tmp_path}/shop/interactions", "interactions")[0].read().to_pylist()[0]
    assert (row["impression_id"], row["revenue"], row["timestamp"]) == ("r1", 1.5, MONDAY)


def test_nothing_posted_writes_nothing(tmp_path):
    assert export_events(f"{tmp_path}/center", f"{tmp_path}/shop") == {}
    assert not (tmp_path / "shop").exists()


def test_what_events_cannot_be_put_beside_is_a_sentence(post, tmp_path):
    post(MONDAY, "a")
    (tmp_path / "one").mkdir()
    pq.write_table(pa.table({"user_id": ["u"]}), tmp_path / "one" / "interactions.parquet")
    with pytest.raises(DataError, match="Move it into a folder"):
        export_events(f"{tmp_path}/center", f"{tmp_path}/one")
    (tmp_path / "delta" / "interactions" / "_delta_log").mkdir(parents=True)
    with pytest.raises(DataError, match="is a Delta table"):
        export_events(f"{tmp_path}/center", f"{tmp_path}/delta")
    (tmp_path / "ints" / "interactions").mkdir(parents=True)
    pq.write_table(pa.table({"item_id": [3]}), tmp_path / "ints" / "interactions" / "a.parquet")
    with pytest.raises(DataError, match="do not fit the column 'item_id'"):
        export_events(f"{tmp_path}/center", f"{tmp_path}/ints")


def test_the_job_says_what_it_wrote_and_where_nothing_can_go(post, tmp_path, capsys):
    post(datetime.now(UTC), "a", "b")
    main("doc", ["--config", "tiny", f"run.root={tmp_path}", "--to", f"{tmp_path}/shop"])
    assert "2 events" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main("doc", ["--config", "tiny", f"run.root={tmp_path}"])
    assert stopped.value.code == 2
    assert "--to FOLDER" in capsys.readouterr().err
