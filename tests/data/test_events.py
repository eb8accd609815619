"""The samples stage as a whole, on the synthetic shop, on own tables, on bad input and on real data."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_ray import artifacts
from mim_ray.config.load import load_scenario
from mim_ray.config.scenario import Synthetic
from mim_ray.data import events
from mim_ray.data.batches import RowBatches
from mim_ray.data.catalogue import Catalogue
from mim_ray.data.rejects import read_rejects
from mim_ray.data.schema import IMPRESSIONS, INTEREST_PAIRS
from mim_ray.data.shop import ShopModel
from mim_ray.data.synthetic import make_events, make_items
from mim_ray.data.transforms import content_hash
from mim_ray.errors import DataError
from mim_ray.runtime.cluster import user_error

SMALL = Synthetic(num_items=300, num_users=40, num_impressions=3_000, num_image_searches=150, num_weeks=2)
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def shop():
    model = ShopModel(4, SMALL)
    return make_items(model, 0, SMALL.num_items), make_events(model, 0, SMALL.num_impressions)[0]


def write_shop(folder, items, log):
    pq.write_table(items, folder / "items.parquet", row_group_size=100)
    (folder / "interactions.parquet").mkdir()
    half = log.num_rows // 2
    for number, part in enumerate((log.slice(0, half), log.slice(half))):
        pq.write_table(part, folder / "interactions.parquet" / f"part-{number}.parquet")


def run(root, tmp_path, *overrides, config="tiny"):
    return events.run(
        load_scenario(config, list(overrides)),
        data_root=str(root),
        output=str(tmp_path / "samples"),
        rejects=str(tmp_path / "rejects"),
    )


def impressions(tmp_path):
    return {name: pq.read_table(tmp_path / "samples" / "impressions" / name) for name in SPLITS}


@pytest.mark.ray
def test_the_shop_becomes_point_in_time_samples(ray_cluster, tmp_path, shop):
    items, log = shop
    twice = pa.concat_tables([items, items.slice(0, 2)])
    write_shop(tmp_path, twice, log)
    result = run(tmp_path, tmp_path)
    splits = impressions(tmp_path)
    assert [splits[name].num_rows for name in SPLITS] == [2_100, 300, 600]
    assert all(table.schema.names == IMPRESSIONS.schema.names for table in splits.values())
    clicked = set(log.filter(pa.compute.equal(log["event"], "click"))["impression_id"].to_pylist())
    rows = [row for table in splits.values() for row in table.to_pylist()]
    assert {row["impression_id"] for row in rows if row["label"]} == clicked
    shown = log.filter(pa.compute.equal(log["event"], "impression"))
    assert {row["impression_id"] for row in rows} == set(shown["impression_id"].to_pylist())
    for earlier, later in itertools.pairwise(SPLITS):
        assert max(splits[earlier]["timestamp"].to_pylist()) < min(splits[later]["timestamp"].to_pylist())
    meta = artifacts.read_json(str(tmp_path / "samples" / "samples.json"))
    pairs = pq.read_table(tmp_path / "samples" / "interest_pairs")
    assert pairs.schema.names == INTEREST_PAIRS.schema.names
    assert pairs.num_rows == meta["counts"]["interest pairs"] > 80
    assert max(pairs["timestamp"].cast(pa.int64()).to_pylist()) < meta["validation_start_us"]
    assert meta["made_from"] == {"impressions": "logged", "interest_pairs": "searched"}
    assert sum(bucket["num_rows"] for bucket in meta["age_buckets"]) == 600
    assert result.rejects == {"duplicate item id": 2}
    assert read_rejects(str(tmp_path / "rejects"), "samples").num_rows == 2
    catalogue = Catalogue.open(str(tmp_path / "samples" / "catalogue"))
    assert catalogue.num_items == 300
    known = catalogue.rows(splits["test"]["item_id"])
    assert (known >= 0).all()
    first = pq.read_table(tmp_path / "samples" / "first_positive.parquet").to_pylist()
    positives = [row for row in splits["train"].to_pylist() if row["label"]]
    assert sum(row["num_train_positives"] for row in first) == len(positives)
    assert all(
        row["first_positive_at"] == min(p["timestamp"] for p in positives if p["item_id"] == row["item_id"])
        for row in first
    )
    assert RowBatches(str(tmp_path / "samples" / "impressions" / "train"), None, 512, 0).steps_per_epoch == 4


@pytest.mark.ray
def test_unusable_events_are_rejected_and_the_job_goes_on(ray_cluster, tmp_path, shop):
    items, log = shop
    bad = log.slice(0, 3).to_pylist()
    bad[0]["item_id"], bad[1]["user_id"] = "no such item", None
    bad[2]["timestamp"] = bad[2]["timestamp"].replace(year=2010)
    write_shop(tmp_path, items, pa.concat_tables([log, pa.Table.from_pylist(bad, schema=log.schema)]))
    result = run(tmp_path, tmp_path)
    assert result.rejects == {"unknown item": 1, "no user id": 1, "event before its item existed": 1}
    assert sum(table.num_rows for table in impressions(tmp_path).values()) == 3_000


@pytest.mark.ray
def test_features_and_queries_of_logged_impressions_reach_the_samples(ray_cluster, tmp_path, shop):
    items, log = shop
    names = log["impression_id"].to_pylist()
    device = pa.array([None if name is None else f"d{int(name[-2:]) % 3}" for name in names])
    tags = pa.array([None if name is None else [name[-1], name[-2]] for name in names])
    query = pa.array([None if name is None or name[-1] == "0" else f"find {name[-1]}" for name in names])
    log = log.append_column("device", device).append_column("tags", tags).append_column("query_text", query)
    write_shop(tmp_path, items, log)
    declared = "data.features=[{name: device, kind: categorical}, {name: tags, kind: multi}]"
    result = run(tmp_path, tmp_path, declared)
    rows = [row for table in impressions(tmp_path).values() for row in table.to_pylist()]
    assert len(rows) == 3_000
    for row in rows:
        name = row["impression_id"]
        assert (row["device"], row["tags"]) == (f"d{int(name[-2:]) % 3}", [name[-1], name[-2]])
        asked = None if name[-1] == "0" else content_hash(f"find {name[-1]}", None)
        assert (row["query_id"], row["query_image"]) == (asked, None)
        assert all(time < row["timestamp"] for time in row["behavior_times"])
        assert len(row["behavior_times"]) == len(row["behaviors"])
    queries = pq.read_table(tmp_path / "samples" / "queries")
    assert sorted(queries["title"].to_pylist()) == [f"find {number}" for number in range(1, 10)]
    assert result.metrics["counts"]["queries"] == 9
    with pytest.raises(DataError, match=r"has no column 'colour'"):
        run(tmp_path, tmp_path, "data.features=[{name: colour, kind: categorical}]")


@pytest.mark.ray
def test_own_tables_replace_the_built_ones(ray_cluster, tmp_path, shop):
    items, log = shop
    write_shop(tmp_path, items, log)
    own = [
        {"impression_id": f"own{i}", "user_id": f"u{i % 7}", "timestamp": 1_736_200_000_000_000 + i * 10**9, "item_id": f"item-{i % 400:08d}",
         "label": i % 2, "behaviors": ["item-00000001"], "split": "train" if i < 300 else "test"}
        for i in range(500)
    ]  # fmt: skip
    full = [{name: row.get(name) for name in IMPRESSIONS.schema.names} for row in own]
    pq.write_table(pa.Table.from_pylist(full, schema=IMPRESSIONS.schema), tmp_path / "impressions.parquet")
    pair = {"query_item_id": "item-00000003", "item_id": "item-00000002", "signal": "purchase", "user_id": "u1"}
    pair |= {"timestamp": 1_736_200_000_000_000}
    table = pa.Table.from_pylist(
        [{n: pair.get(n) for n in INTEREST_PAIRS.schema.names}] * 3, schema=INTEREST_PAIRS.schema
    )
    pq.write_table(table, tmp_path / "interest_pairs.parquet")
    run(tmp_path, tmp_path)
    splits = impressions(tmp_path)
    assert splits["test"].num_rows == 200  # with the items that no catalogue has
    assert splits["train"].num_rows + splits["validation"].num_rows == 300
    assert pq.read_table(tmp_path / "samples" / "interest_pairs").num_rows == 3
    meta = artifacts.read_json(str(tmp_path / "samples" / "samples.json"))
    assert meta["made_from"] == {"impressions": "own", "interest_pairs": "own"}
    for name in ("interactions.parquet", "samples"):
        shutil.rmtree(tmp_path / name)
    run(tmp_path, tmp_path)  # own impressions need no log
    assert pq.read_table(tmp_path / "samples" / "behaviors").num_rows == 7
    assert sum(table.num_rows for table in impressions(tmp_path).values()) == 500


@pytest.mark.ray
def test_user_mistakes_are_sentences(ray_cluster, tmp_path, shop):
    items, log = shop
    with pytest.raises(DataError, match="has no table items"):
        run(tmp_path, tmp_path)
    pq.write_table(items, tmp_path / "items.parquet")
    with pytest.raises(DataError, match="has no table interactions"):
        run(tmp_path, tmp_path)
    pq.write_table(log.drop_columns(["event"]), tmp_path / "interactions.parquet")
    with pytest.raises(DataError, match=r"interactions.parquet has no column 'event'"):
        run(tmp_path, tmp_path)
    pq.write_table(log, tmp_path / "interactions.parquet")
    with pytest.raises(DataError, match=r"samples.positive_events is \['like'\]"):
        run(tmp_path, tmp_path, "samples.positive_events=[like]")
    broken = (tmp_path / "interactions.parquet").read_bytes()
    (tmp_path / "interactions.parquet").write_bytes(broken[:2_000] + bytes(4_000) + broken[6_000:])
    with pytest.raises(Exception, match=r"interactions.parquet") as error:
        run(tmp_path, tmp_path)
    assert isinstance(user_error(error.value), DataError)


@pytest.mark.ray
@pytest.mark.slow
def test_movietweetings_runs_with_drawn_negatives_and_built_pairs(ray_cluster, tmp_path, real_data: Path):
    result = run(real_data / "movietweetings", tmp_path, config="movietweetings")
    counts = result.metrics["counts"]
    assert result.metrics["made_from"] == {"impressions": "drawn", "interest_pairs": "built"}
    assert counts["events"] == 141_695
    assert counts["items"] == 12_611
    assert counts["items with image"] == 8_683
    assert counts["train positives"] + counts["validation positives"] + counts["test positives"] == counts["positives"]
    log = pq.read_table(real_data / "movietweetings" / "interactions.parquet").to_pandas()
    own = set(zip(log["user_id"], log["item_id"], strict=True))
    first = log.groupby("item_id")["timestamp"].min()
    created = pq.read_table(
        real_data / "movietweetings" / "items.parquet", columns=["item_id", "created_at"]
    ).to_pandas()
    created = created.set_index("item_id")["created_at"]
    test = impressions(tmp_path)["test"].to_pandas()
    drawn = test[test["drawn"]]
    assert len(drawn) > 70_000
    assert not own & set(zip(drawn["user_id"], drawn["item_id"], strict=True))
    assert (created[drawn["item_id"]].to_numpy() <= drawn["timestamp"].to_numpy()).all()
    seen = first[drawn["item_id"]].to_numpy() < drawn["timestamp"].to_numpy()
    assert 0.8 < seen.mean() <= 1  # the rest is the floor: films that existed and nobody had rated yet
    liked = log[log["rating"] >= 7].sort_values(["timestamp"], kind="stable")
    for _, row in test.sample(200, random_state=0).iterrows():
        before = liked[(liked["user_id"] == row["user_id"]) & (liked["timestamp"] < row["timestamp"])][
            "item_id"
        ].tolist()
        collapsed = [item for i, item in enumerate(before) if i == 0 or before[i - 1] != item]
        assert sorted(row["behaviors"]) == sorted(collapsed[-50:])


@pytest.mark.ray
def test_obd_small_runs_with_logged_impressions(ray_cluster, tmp_path, real_data: Path):
    result = run(real_data / "obd_small", tmp_path, "samples.positive_events=[click]", "samples.pair_events=[click]")
    splits = impressions(tmp_path)
    assert sum(table.num_rows for table in splits.values()) == 40_000
    assert sum(int(np.sum(table["label"].to_numpy())) for table in splits.values()) == 207
    assert result.metrics["made_from"]["impressions"] == "logged"
    assert result.metrics["counts"]["items with neither"] == 80
