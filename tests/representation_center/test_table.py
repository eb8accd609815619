"""mim_ray/representation_center/table.py and build.py."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from mim_ray.data.schema import TIME
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.compaction import compact
from mim_ray.representation_center.data_files import SCHEMA, write_fragment
from mim_ray.representation_center.table import CURRENT_ROWS_SQL, EmbeddingTable, PartlyCommittedError

DAY = 86_400_000_000


def rows(ids: list[str], value: float, day: int | None, **columns: object) -> pa.Table:
    values: dict[str, object] = {
        "item_id": ids,
        "embedding": pa.array([[value, 1.0]] * len(ids), pa.list_(pa.float32())),
        "content_hash": [f"hash-{value}"] * len(ids),
        "content_at": pa.array([None if day is None else day * DAY] * len(ids), TIME),
    }
    return pa.table(values | columns)


def values(table: pa.Table) -> dict[str, float]:
    return {row["item_id"]: row["embedding"][0] for row in table.to_pylist()}


@pytest.fixture
def table(tmp_path: Path) -> EmbeddingTable:
    return EmbeddingTable(str(tmp_path / "table")).create()


def test_the_current_row_is_the_last_by_content_time_then_commit(table: EmbeddingTable) -> None:
    table.append(rows(["a", "b", "c", "d"], 1, 5), encoder_version="v1")
    table.append(rows(["a"], 2, 4), encoder_version="v1")  # older content, later commit: loses
    table.append(rows(["b"], 3, 5), encoder_version="v1")  # same time, later commit: wins
    table.append(rows(["c"], 4, None), encoder_version="v1")  # no time: older than everything
    table.append(rows(["d"], 5, 6), encoder_version="v1")  # newer: wins
    table.append(rows(["a", "e"], 6, 9), encoder_version="v2")  # another encoder version: a table of its own
    table.append(rows(["f"], 7, None), encoder_version="v1")
    assert values(table.current_rows("v1")) == {"a": 1, "b": 3, "c": 1, "d": 5, "f": 7}
    assert values(table.current_rows("v2")) == {"a": 6, "e": 6}
    assert table.encoder_versions() == ["v1", "v2"]


def test_a_deleted_item_has_no_current_row_until_newer_content_comes(table: EmbeddingTable) -> None:
    table.append(rows(["a", "b"], 1, 5), encoder_version="v1")
    table.append(rows(["a"], 0, 6, deleted=[True]), encoder_version="v1")
    table.append(rows(["b"], 0, 4, deleted=[True]), encoder_version="v1")  # deleted before b's newer content
    assert values(table.current_rows("v1")) == {"b": 1}
    assert values(table.current_rows("v1", deleted=True)) == {"a": 0, "b": 1}
    table.append(rows(["a"], 2, 7), encoder_version="v1")
    assert values(table.current_rows("v1")) == {"a": 2, "b": 1}


def in_duckdb(uri: str) -> pa.Table:
    """DuckDB's own reader of Delta is an extension that it downloads when first used, which a test does not do: it is
    given the table as an Arrow dataset instead."""
    connection = duckdb.connect()
    connection.register("item_embeddings", DeltaTable(uri).to_pyarrow_dataset())
    return connection.sql(CURRENT_ROWS_SQL).to_arrow_table()


def in_polars(uri: str) -> pa.Table:
    frame = pl.scan_delta(uri, use_pyarrow=True)
    return pl.SQLContext(item_embeddings=frame).execute(CURRENT_ROWS_SQL).collect().to_arrow()


@pytest.mark.parametrize("engine", [in_duckdb, in_polars])
@pytest.mark.parametrize("compacted", [False, True])
def test_the_sql_view_says_the_same(table: EmbeddingTable, engine: Callable[[str], pa.Table], compacted: bool) -> None:
    rng = np.random.default_rng(1)
    for step in range(24):
        ids = [f"i{number}" for number in rng.choice(20, 8, replace=False)]
        day = None if step % 5 == 0 else int(rng.integers(1, 4))
        gone = (rng.random(8) < 0.2).tolist()
        table.append(rows(ids, float(step), day, deleted=gone), encoder_version=f"v{step % 2}")
    table.append(rows(["untimed"], 1.0, None), encoder_version="v0")
    table.append(rows(["untimed"], 2.0, None), encoder_version="v0")
    table.append(rows(["timed"], 3.0, 1), encoder_version="v0")
    table.append(rows(["timed"], 4.0, None), encoder_version="v0")
    if compacted:
        assert compact(table, "v0").num_merges
    found = engine(table.uri)
    for version in ("v0", "v1"):
        expected = table.current_rows(version)
        mine = found.filter(pa.compute.equal(found["encoder_version"], version))
        assert 0 < expected.num_rows <= 22
        assert values(mine) == values(expected)
        assert set(mine["commit_version"].to_pylist()) == set(expected["commit_version"].to_pylist())
    assert {"untimed": 2.0, "timed": 3.0}.items() <= values(found).items()
    assert set(found.column_names) == set(SCHEMA.names) - {"deleted"}


def test_a_reader_without_the_logs_partition_values_gets_no_rows_rather_than_wrong_ones(table: EmbeddingTable) -> None:
    for step in range(3):
        table.append(rows(["a"], float(step), 1), encoder_version="v1")
    found = pl.SQLContext(item_embeddings=pl.scan_delta(table.uri)).execute(CURRENT_ROWS_SQL).collect()
    assert found["embedding"].to_list() in ([], [[2.0, 1.0]])


def test_commit_version_is_the_delta_version(table: EmbeddingTable) -> None:
    versions = [table.append(rows([f"i{step}"], step, 1), encoder_version="v1") for step in range(3)]
    found = {row["item_id"]: row["commit_version"] for row in table.current_rows("v1").to_pylist()}
    assert found == {f"i{step}": version for step, version in enumerate(versions)}
    assert table.version == versions[-1]


def test_a_shard_enters_once_however_often_it_is_committed(table: EmbeddingTable) -> None:
    first = write_fragment(table.uri, rows(["a"], 1, 1), encoder_version="v1", shard_id="s1")
    again = write_fragment(table.uri, rows(["a"], 1, 1), encoder_version="v1", shard_id="s1")
    empty = write_fragment(table.uri, rows([], 1, 1), encoder_version="v1", shard_id="s2")
    version = table.commit([first, empty])
    assert table.commit([again, first]) == version
    assert EmbeddingTable(table.uri).commit([again, empty]) == version
    assert EmbeddingTable(table.uri).committed_shards("v1") == {"s1", "s2"}
    assert table.current_rows("v1").num_rows == 1
    assert table.contains("v1", ["s2", "s3"]) == {"s2"}


def test_files_without_a_commit_are_invisible(table: EmbeddingTable) -> None:
    write_fragment(table.uri, rows(["a"], 1, 1), encoder_version="v1", shard_id="s1")
    assert table.committed_shards("v1") == set()
    assert table.current_rows("v1").num_rows == 0


def test_two_committers_at_once_lose_and_double_nothing(table: EmbeddingTable) -> None:
    def work(worker: int) -> None:
        mine = EmbeddingTable(table.uri)
        for step in range(6):
            mine.append(rows([f"w{worker}-{step}"], step, 1), encoder_version="v1", shard_id=f"s{worker}x{step}")
            mine.append(rows([f"both-{step}"], step, 1), encoder_version="v1", shard_id=f"both{step}")

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _, files = table.scan("v1")
    everything = pa.concat_tables([file.read() for file in files])
    assert sorted(everything["item_id"].to_pylist()) == sorted(
        [f"w{worker}-{step}" for worker in range(3) for step in range(6)] + [f"both-{step}" for step in range(6)]
    )
    assert table.version == 24  # one commit per shard, each under its own version
    assert sorted(set(everything["commit_version"].to_pylist())) == list(range(1, 25))


def test_a_fragment_of_several_shards_is_refused_when_some_are_in(table: EmbeddingTable) -> None:
    shards = pa.array(["m1", "m2"])
    fragment = write_fragment(
        table.uri, rows(["a", "b"], 1, 1, shard_id=shards), encoder_version="v1", origin="realtime"
    )
    other = write_fragment(table.uri, rows(["b"], 1, 1, shard_id=["m2"]), encoder_version="v1", origin="realtime")
    table.commit([other])
    with pytest.raises(PartlyCommittedError):
        table.commit([fragment])
    assert table.contains("v1", ["m1", "m2", "m3"]) == {"m2"}


def test_snapshot_shows_exactly_the_current_rows(table: EmbeddingTable, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for step in range(5):
        ids = [f"i{number}" for number in rng.choice(300, 120, replace=False)]
        gone = (rng.random(120) < 0.1).tolist()
        data = rows(ids, 0, int(rng.integers(1, 4)), deleted=gone)
        embedding = pa.array(rng.normal(size=(120, 2)).astype(np.float32).tolist(), pa.list_(pa.float32()))
        table.append(data.set_column(1, "embedding", embedding), encoder_version="v1", shard_id=f"s{step}")
    table.append(rows([], 0, 1), encoder_version="v1")
    snapshot = build_snapshot(table, "v1", str(tmp_path / "snapshot"))
    current = table.current_rows("v1")
    assert snapshot.num_rows == current.num_rows
    assert (snapshot.encoder_version, snapshot.delta_version) == ("v1", table.version)
    found = snapshot.lookup(current["item_id"])
    np.testing.assert_array_equal(snapshot.gather(found), np.array(current["embedding"].to_pylist(), np.float32))
    assert snapshot.content_at is not None
    at = datetime.fromtimestamp(snapshot.content_at[found[0]] / 1e6, UTC)
    assert at == current["content_at"][0].as_py()


def test_snapshot_of_an_unknown_encoder_version_names_the_known(table: EmbeddingTable, tmp_path: Path) -> None:
    table.append(rows(["a"], 1, 1), encoder_version="v1")
    with pytest.raises(ArtifactError, match=r"no embeddings of encoder version v9 \(it has: v1\)"):
        build_snapshot(table, "v9", str(tmp_path / "snapshot"))


def test_embeddings_of_two_widths_are_refused(table: EmbeddingTable, tmp_path: Path) -> None:
    table.append(rows(["a"], 1, 1), encoder_version="v1")
    odd = pa.array([[1.0, 2.0, 3.0]], pa.list_(pa.float32()))
    table.append(rows(["b"], 1, 1).set_column(1, "embedding", odd), encoder_version="v1")
    with pytest.raises(ArtifactError, match="width"):
        build_snapshot(table, "v1", str(tmp_path / "snapshot"))
    assert not (tmp_path / "snapshot" / "manifest.json").exists()


def test_a_missing_table_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="Run the extraction first"):
        EmbeddingTable(str(tmp_path / "none")).encoder_versions()
