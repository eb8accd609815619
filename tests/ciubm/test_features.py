"""What the network is told beside ids and content is the same offline and online, whatever is absent."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mim_ray.ciubm import train
from mim_ray.ciubm.dataset import ImpressionEncoder, gather_batch
from mim_ray.ciubm.export import Ranker, load_ranker
from mim_ray.ciubm.feature_learning import learn_features
from mim_ray.ciubm.features import FeatureBatch, Features, Number
from mim_ray.ciubm.predict import predict
from mim_ray.ciubm.tables import IdTables
from mim_ray.ciubm.vocabulary import ItemIndex, Vocabulary
from mim_ray.config import Scenario, load_scenario
from mim_ray.config.scenario import Feature, FeatureTransform
from mim_ray.data.features import check_features
from mim_ray.data.schema import TIME
from mim_ray.errors import ArtifactError, ConfigError, DataError, VersionMismatchError
from mim_ray.evaluation.metrics import auc
from mim_ray.representation_center.snapshot import Snapshot, write_snapshot
from mim_ray.serving.request_context import context_table

SECOND, DAY_S = 1_000_000, 86_400.0
AT = 1_700_000_000 * SECOND
TIMES = pa.list_(TIME)


@pytest.fixture
def items() -> ItemIndex:
    return ItemIndex.build(pa.array(["a", "b", "c"]), np.array([0, 1, -1]), ["x", "y"], np.array([5, 2, 1]), 1)


def _rows(behaviors: list[Any], times: list[Any] | None, at: list[Any] | None = None) -> pa.Table:
    num = len(behaviors)
    columns = {
        "user_id": pa.array(["u"] * num),
        "item_id": pa.array(["a"] * num),
        "behaviors": pa.array(behaviors, pa.list_(pa.string())),
        "timestamp": pa.array(at or [AT] * num, TIME),
    }
    if times is not None:
        columns["behavior_times"] = pa.array(times, TIMES)
    return pa.table(columns)


def _encoder(items: ItemIndex, features: Features, max_behaviors: int = 10) -> ImpressionEncoder:
    return ImpressionEncoder(items, Vocabulary(pa.array(["u"])), None, max_behaviors, features)


def _ages(encoder: ImpressionEncoder, rows: pa.Table) -> list[list[float]]:
    ages = encoder.encode(rows).behavior_age_s
    assert ages is not None
    assert ages.dtype == torch.float32
    return ages.tolist()  # type: ignore[no-any-return]


def test_ages_are_seconds_from_behavior_to_impression(items: ItemIndex) -> None:
    rows = _rows(
        [["a", "b", "c"], ["b"], [], None], [[AT - 30 * SECOND, AT - 2 * SECOND, AT - SECOND // 2], [AT - 7], [], None]
    )
    encoder = _encoder(items, Features(typical_age_s=5.0))
    assert _ages(encoder, rows) == [[30.0, 2.0, 0.5], [pytest.approx(7e-6), 0, 0], [0, 0, 0], [0, 0, 0]]
    assert _ages(encoder, rows.slice(1)) == [[pytest.approx(7e-6)], [0], [0]]
    newest = _encoder(items, Features(typical_age_s=5.0), max_behaviors=2)
    assert _ages(newest, rows)[0] == [2.0, 0.5]


def test_a_behavior_without_a_time_has_the_typical_age_and_none_is_negative(items: ItemIndex) -> None:
    times = [None, [AT - SECOND], [AT - SECOND, None], [AT + SECOND, AT - SECOND], [AT, AT]]
    rows = _rows([["a", "b"]] * 5, times, [AT, AT, AT, AT, None])
    encoder = _encoder(items, Features(typical_age_s=9.0))
    assert _ages(encoder, rows) == [[9, 9], [9, 9], [1, 9], [0, 1], [9, 9]]
    assert _ages(encoder, _rows([["a"]], None)) == [[9]]
    assert _ages(encoder, _rows([["a"]], [[AT]]).drop_columns(["timestamp"])) == [[9]]


def test_without_times_in_train_there_are_no_ages(items: ItemIndex) -> None:
    assert _encoder(items, Features()).encode(_rows([["a"]], [[AT - SECOND]])).behavior_age_s is None


def test_the_typical_age_is_the_geometric_mean_over_train(tmp_path: Any) -> None:
    times = [[AT - 99 * SECOND, AT - 9 * SECOND], [AT - 9_999 * SECOND, None], None, [], [AT + SECOND]]
    pq.write_table(_rows([["a"]] * 5, times), tmp_path / "part-0.parquet", row_group_size=2)
    typical = learn_features(str(tmp_path), [], {}).typical_age_s
    assert typical == pytest.approx((100 * 10 * 10_000 * 1) ** 0.25 - 1)
    features = Features(typical_age_s=typical)
    features.save(str(tmp_path))
    assert Features.load(str(tmp_path)) == features


@pytest.mark.parametrize("times", [None, [[None], [None]], "absent"])
def test_train_without_times_teaches_no_age(tmp_path: Any, times: Any) -> None:
    rows = _rows([["a"], ["b"]], None if times == "absent" else times or [None, None])
    pq.write_table(rows, tmp_path / "part-0.parquet")
    assert learn_features(str(tmp_path), [], {}) == Features()


def test_ages_of_a_request_are_those_of_the_row(items: ItemIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features(typical_age_s=100.0)
    info = {"variant": "sim-base", "encoder_version": None, "max_behaviors": 2, "network": {"content_width": None}}
    ranker = Ranker(info, items, Vocabulary(pa.array(["u"])), features, [])
    seen: list[Any] = []
    monkeypatch.setattr(ranker, "predict", lambda batch: seen.append(batch))
    behaviors, times = ["a", "b", "c"], [AT - 40 * SECOND, AT - 5_123_457, AT - 1]
    ranker.score("u", behaviors, ["a", "b"], behavior_times=times, timestamp=AT)
    ranker.score("u", behaviors, ["a"])
    ranker.score("u", [], ["a"], behavior_times=[], timestamp=AT)
    offline = _encoder(items, features, 2).encode(_rows([behaviors], [times])).behavior_age_s
    assert offline is not None
    assert torch.equal(seen[0].behavior_age_s, offline), "once for all candidates"
    assert seen[1].behavior_age_s.tolist() == [[100, 100]]
    assert seen[2].behavior_age_s.tolist() == [[0]]


def test_time_gaps_without_times_are_refused(small_shop: Any, tmp_path: Any) -> None:
    scenario = load_scenario("tiny", ["ciubm.time_gaps=true"])
    with pytest.raises(DataError, match=r"ciubm.time_gaps is true, but no impression .* has behavior_times"):
        train.run(scenario, variant="sim-base", samples=small_shop.samples, snapshot=None, output=str(tmp_path))


DECLARED = [
    Feature(name="device", kind="categorical"),
    Feature(name="tags", kind="multi"),
    Feature(name="price", kind="dense"),
]
LISTS = pa.list_(pa.string())


def _features_table(devices: list[Any], tags: list[Any], prices: list[Any]) -> pa.Table:
    return pa.table(
        {
            "timestamp": pa.array([AT] * len(devices), TIME),
            "device": pa.array(devices, pa.string()),
            "tags": pa.array(tags, LISTS),
            "price": pa.array(prices, pa.float64()),
        }
    )


def _learn(folder: Path, table: pa.Table, **settings: dict[str, Any]) -> Features:
    pq.write_table(table, folder / "part-0.parquet", row_group_size=3)
    chosen = {name: FeatureTransform(**values) for name, values in settings.items()}
    return learn_features(str(folder), DECLARED, chosen)


@pytest.fixture
def learnt(tmp_path: Path) -> Features:
    """device: a 2, b 2 (c too seldom); tags: x 3, y 1; price: mean 2, deviation 1."""
    devices = ["a", "b", "a", "b", "c", None]
    tags = [["x", "y"], ["x"], None, [], ["x", None], []]
    prices = [1.0, 3.0, 1.0, 3.0, float("nan"), float("-inf")]
    return _learn(tmp_path, _features_table(devices, tags, prices), device={"min_count": 2})


def _numbers(features: Features, table: pa.Table) -> tuple[list[int], list[list[int]], list[float]]:
    """By row: the device's table row, the tags' sorted table rows, and the price."""
    batch = features.encode(table)
    assert batch is not None
    device, tags = batch.values["device"], batch.values["tags"]
    assert tags.impression is not None
    by_row = [sorted(tags.rows[tags.place[tags.impression == row]].tolist()) for row in range(len(table))]
    return device.rows[device.place].tolist(), by_row, batch.dense[:, 0].tolist()


def test_transforms_are_learnt_of_train_and_survive_a_file(learnt: Features, tmp_path: Path) -> None:
    rows = _features_table(["b", "a", "c", None], [["y"], ["x", "y"], ["z"], None], [1.0, 2.0, 4.0, None])
    assert _numbers(learnt, rows) == ([2, 1, 0, 0], [[2], [1, 2], [0], [0]], [-1.0, 0.0, 2.0, 0.0])
    assert learnt.num_table_rows == {"feature.device": 3, "feature.tags": 3}
    assert learnt.context_width(4) == 9
    learnt.save(str(tmp_path))
    again = Features.load(str(tmp_path))
    assert _numbers(again, rows) == _numbers(learnt, rows)
    assert again.kinds == {"device": "categorical", "tags": "multi", "price": "dense"}
    (tmp_path / "feature.tags.arrow").unlink()
    with pytest.raises(ArtifactError, match=r"feature.tags.arrow is not there"):
        Features.load(str(tmp_path))


@pytest.mark.parametrize(
    ("device", "tags", "price", "expected"),
    [
        (None, None, None, (0, [0], 0.0)),
        ("never met", [], float("nan"), (0, [0], 0.0)),
        ("", ["never met", None], float("inf"), (0, [0], 0.0)),
        ("a", ["never met", "x", None, "x"], 1e308, (1, [1, 1], 10.0)),
        ("b", ["z"] * 19 + ["x", "y"], -1e308, (2, [1], -10.0)),
    ],
)
def test_what_is_absent_or_strange_has_its_default(
    learnt: Features, device: Any, tags: Any, price: Any, expected: Any
) -> None:
    around = _features_table(["a", device, "a"], [["y"], tags, ["y"]], [2.0, price, 2.0])
    devices, by_row, prices = _numbers(learnt, around)
    assert (devices[1], by_row[1], prices[1]) == expected
    assert (devices[::2], by_row[::2], prices[::2]) == ([1, 1], [[2], [2]], [0.0, 0.0])
    assert _numbers(learnt, around.slice(1, 1)) == ([expected[0]], [expected[1]], [expected[2]])


def test_columns_that_are_not_there_are_absent_in_every_row(learnt: Features) -> None:
    assert _numbers(learnt, pa.table({"timestamp": pa.array([AT, AT], TIME)})) == ([0, 0], [[0], [0]], [0.0, 0.0])
    assert Features().encode(_features_table(["a"], [["x"]], [1.0])) is None


def test_hash_buckets_need_no_vocabulary_and_null_is_still_unknown(tmp_path: Path) -> None:
    names = [f"v{number}" for number in range(500)]
    table = _features_table(names, [[name, name] for name in names], [0.0] * 500)
    features = _learn(tmp_path, table, device={"num_buckets": 7}, tags={"num_buckets": 3, "max_values": 1})
    devices, tags, _ = _numbers(features, table)
    assert set(devices) == set(range(1, 8))
    assert {tuple(rows) for rows in tags} == {(1,), (2,), (3,)}
    assert features.num_table_rows == {"feature.device": 8, "feature.tags": 4}
    features.save(str(tmp_path))
    assert _numbers(Features.load(str(tmp_path)), table) == (devices, tags, [0.0] * 500)
    assert _numbers(features, _features_table([None], [None], [None])) == ([0], [[0]], [0.0])


def test_quantiles_give_the_place_among_trains_values(tmp_path: Path) -> None:
    prices = [float(10**number) for number in range(101)]
    features = _learn(tmp_path, _features_table(["a"] * 101, [None] * 101, prices), price={"normalise": "quantile"})
    rows = _features_table(["a"] * 6, [None] * 6, [1.0, 1e50, 1e100, -5.0, 1e300, None])
    assert _numbers(features, rows)[2] == pytest.approx([-1.0, 0.0, 1.0, -1.0, 1.0, 0.0])
    half = Number("price", quantiles=(0.0, 0.0, 0.0, 5.0, 9.0)).encode(pa.array([0.0, 5.0, 9.0, 2.5]))
    assert half.tolist() == pytest.approx([-0.5, 0.5, 1.0, 0.0])  # half of the values are 0


@pytest.mark.parametrize("prices", [[None, None], [float("nan"), None], [7.0, 7.0]])
@pytest.mark.parametrize("normalise", ["standard", "quantile"])
def test_a_feature_that_says_nothing_is_zero(tmp_path: Path, prices: list[Any], normalise: str) -> None:
    table = _features_table([None, None], [None, None], prices)
    features = _learn(tmp_path, table, price={"normalise": normalise})
    devices, tags, numbers = _numbers(features, table)
    assert (devices, tags) == ([0, 0], [[0], [0]])
    assert numbers == pytest.approx([0.0, 0.0])


def test_the_context_is_each_features_embedding_then_the_numbers(learnt: Features, items: ItemIndex) -> None:
    rows = _features_table(["b", None], [["x", "y"], ["z"]], [3.0, None])
    rows = rows.append_column("user_id", [["u", "u"]]).append_column("item_id", [["a", "b"]])
    rows = rows.append_column("behaviors", pa.array([["a"], []], LISTS))
    encoder = _encoder(items, learnt)
    tables = IdTables.create(encoder.num_table_rows(with_user=False), 2, seed=0)
    context = gather_batch(encoder.encode(rows), tables).context
    device, tags = tables["feature.device"].weight, tables["feature.tags"].weight
    expected = [[*device[2], *((tags[1] + tags[2]) / 2), 1.0], [*device[0], *tags[0], 0.0]]
    assert context is not None
    assert torch.allclose(context, torch.tensor(expected))


def test_dropped_impressions_train_the_unknown_rows(learnt: Features, items: ItemIndex) -> None:
    rows = _features_table(["b"] * 3, [["x", "y"], ["x"], []], [3.0] * 3)
    batch = learnt.encode(rows, np.array([True, False, True]))
    assert batch is not None
    device, tags = batch.values["device"], batch.values["tags"]
    assert device.rows[device.place].tolist() == [0, 2, 0]
    assert sorted(zip(tags.impression.tolist(), tags.rows[tags.place].tolist(), strict=True)) == [
        (0, 0),
        (1, 1),
        (2, 0),
    ]  # type: ignore[union-attr]
    assert batch.dense.tolist() == [[1.0]] * 3


def test_a_request_gives_the_tensors_of_the_same_row(learnt: Features, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("b", ["y", "new", None], 2.5), (None, None, None), ("a", [], float("nan")), ("seldom", ["x"] * 30, 1e200)]
    offline = learnt.encode(_features_table(*(list(column) for column in zip(*rows, strict=True))))
    keys = ("device", "tags", "price")
    by_item = {key: [row[number] for row in rows] for number, key in enumerate(keys)}
    table, absent = context_table(learnt, {}, by_item, range(4), 4)
    online = learnt.encode(table)
    assert offline is not None
    assert online is not None
    _equal(offline, online)
    assert absent == ["device", "tags", "price"]
    for number, row in enumerate(rows):
        table, _ = context_table(learnt, dict(zip(keys, row, strict=True)), {}, [0], 1)
        one, of_row = learnt.encode(table), learnt.encode(_features_table(*([value] for value in row)))
        assert one is not None
        assert of_row is not None
        _equal(one, of_row)
        assert torch.equal(one.dense[0], offline.dense[number])


def _equal(one: FeatureBatch, other: FeatureBatch) -> None:
    assert torch.equal(one.dense, other.dense)
    for name, values in one.values.items():
        same = other.values[name]
        assert torch.equal(values.rows[values.place], same.rows[same.place])
        assert (values.impression is None) == (same.impression is None)
        assert values.impression is None or torch.equal(values.impression, same.impression)  # type: ignore[arg-type]


@pytest.fixture
def shop_with_devices(small_shop: Any, tmp_path: Path) -> str:
    """The small shop's samples where a click depends on the device and on the price, and on nothing else."""
    root = tmp_path / "samples"
    shutil.copytree(small_shop.samples, root)
    generator = np.random.default_rng(1)
    for split in ("train", "validation", "test"):
        path = root / "impressions" / split / "part-00000.parquet"
        table = pq.read_table(path)
        device, price = generator.integers(0, 3, len(table)), generator.normal(50, 20, len(table))
        label = generator.random(len(table)) < 1 / (1 + np.exp(-(3.0 * (device == 1) + (price - 50) / 20 - 2.0)))
        table = table.set_column(table.schema.get_field_index("label"), "label", pa.array(label.astype(np.int8)))
        table = table.append_column("device", pa.array(["phone", "tablet", "desk"]).take(pa.array(device)))
        table = table.append_column("price", pa.array(price))
        pq.write_table(table, path, row_group_size=700)
    return str(root)


@pytest.mark.ray
def test_a_model_learns_declared_features_and_ranks_with_them(
    ray_cluster: None, shop_with_devices: str, tmp_path: Path
) -> None:
    declared = [{"name": "device", "kind": "categorical"}, {"name": "price", "kind": "dense"}]
    settings = {"id_dim": 4, "hidden": [16], "batch_size": 64, "num_epochs": 2, "max_behaviors": 4, "in_driver": True}
    scenario = Scenario.model_validate({"data": {"features": declared}, "ciubm": settings | {"threads_per_worker": 1}})
    uri = str(tmp_path / "model")
    train.run(scenario, variant="din-base", samples=shop_with_devices, snapshot=None, output=uri)
    ranker = load_ranker(uri)
    test = f"{shop_with_devices}/impressions/test"
    expected = np.concatenate([probs.mean(axis=0) for _, probs in predict(ranker, None, test)])
    rows = pq.read_table(test)
    found = auc(rows["label"].to_numpy(), expected)
    assert found is not None
    assert found > 0.75
    for number, row in enumerate(rows.slice(0, 10).to_pylist()):
        table, absent = context_table(ranker.features, {key: row[key] for key in ("device", "price")}, {}, [0], 1)
        score = ranker.score(row["user_id"], row["behaviors"], [row["item_id"]], context=table)
        assert score[0] == pytest.approx(expected[number], abs=1e-6)
        assert absent == []
    row = rows.slice(0, 1).to_pylist()[0]
    assert np.isfinite(ranker.score(row["user_id"], row["behaviors"], [row["item_id"]])).all()
    (Path(uri) / "vocabulary" / "features.json").write_text('{"categories": [], "numbers": [], "typical_age_s": null}')
    with pytest.raises(ArtifactError, match=r"features.json does not fit ctr.json"):
        load_ranker(uri)


@pytest.mark.parametrize(
    ("features", "settings", "said"),
    [
        ([("label", "dense")], {}, "data.features declares 'label', a column that has a meaning of its own"),
        ([("device", "dense"), ("device", "multi")], {}, "declares 'device' more than once"),
        ([("device", "dense")], {"devise": {}}, "ciubm.features sets 'devise', which data.features does not declare"),
    ],
)
def test_declarations_that_cannot_be_meant_are_refused(
    small_shop: Any, tmp_path: Path, features: Sequence[tuple[str, str]], settings: Any, said: str
) -> None:
    declared = [{"name": name, "kind": kind} for name, kind in features]
    scenario = Scenario.model_validate({"data": {"features": declared}, "ciubm": {"features": settings}})
    with pytest.raises(ConfigError, match=said):
        train.run(scenario, variant="sim-base", samples=small_shop.samples, snapshot=None, output=str(tmp_path))


def test_the_documented_scenario_loads(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "features.md"
    (tmp_path / "example.yaml").write_text(page.read_text().split("```yaml\n")[1].split("```")[0])
    scenario = load_scenario(str(tmp_path / "example.yaml"))
    check_features(scenario)
    assert [feature.kind for feature in scenario.data.features] == ["categorical", "dense", "multi"]
    assert scenario.ciubm.features["tags"].max_values == 10


@pytest.fixture
def shop_with_queries(small_shop: Any, tmp_path: Path) -> tuple[str, str]:
    """The small shop's samples where a click says that the query has the target's content, and the queries' vectors."""
    root = tmp_path / "samples"
    shutil.copytree(small_shop.samples, root)
    snapshot = Snapshot.open(small_shop.snapshot)
    generator = np.random.default_rng(1)
    names = [f"q{number}" for number in range(snapshot.width)]
    for split in ("train", "validation", "test"):
        path = root / "impressions" / split / "part-00000.parquet"
        table = pq.read_table(path)
        asked = generator.integers(0, snapshot.width, len(table))
        vectors = snapshot.gather(snapshot.lookup(table["item_id"]))
        label = vectors[np.arange(len(table)), asked] > 0
        table = table.set_column(table.schema.get_field_index("label"), "label", pa.array(label.astype(np.int8)))
        queries = pa.array(names).take(pa.array(asked, mask=generator.random(len(table)) < 0.05))
        pq.write_table(table.append_column("query_id", queries), path, row_group_size=700)
    line = str(tmp_path / "queries")
    write_snapshot(line, names, np.eye(snapshot.width, dtype=np.float32), encoder_version="test-1")
    return str(root), line


def test_queries_are_joined_late_and_rows_without_one_get_zeros(items: ItemIndex, shop_with_queries: Any) -> None:
    queries = Snapshot.open(shop_with_queries[1])
    encoder = ImpressionEncoder(items, Vocabulary(pa.array(["u"])), None, 5, queries=queries)
    rows = _rows([["a"], [], ["a"], ["b"]], None)
    tables = IdTables.create(encoder.num_table_rows(with_user=False), 2, seed=0)
    asked = rows.append_column("query_id", pa.array(["q3", None, "never encoded", "q3"]))
    found = gather_batch(encoder.encode(asked), tables).query_mm
    assert found is not None
    assert found.tolist() == [np.eye(8)[3].tolist(), [0.0] * 8, [0.0] * 8, np.eye(8)[3].tolist()]
    absent = gather_batch(encoder.encode(rows), tables).query_mm
    assert absent is not None
    assert absent.tolist() == [[0.0] * 8] * 4
    assert encoder.columns[-1] == "query_id"


@pytest.mark.ray
@pytest.mark.parametrize(
    ("variant", "setting"), [("din-mim", "query_interest"), ("din-mim", "query_vector"), ("din-base", "query_vector")]
)
def test_a_model_reads_the_query_offline_and_online(
    ray_cluster: None, small_shop: Any, shop_with_queries: Any, tmp_path: Path, variant: str, setting: str
) -> None:
    samples, line = shop_with_queries
    settings = {"id_dim": 4, "hidden": [16], "batch_size": 64, "num_epochs": 3, "max_behaviors": 4, "in_driver": True}
    scenario = Scenario.model_validate({"ciubm": settings | {"threads_per_worker": 1, setting: True}})
    uri = str(tmp_path / "model")
    snapshot = small_shop.snapshot if variant.endswith("mim") else None
    train.run(scenario, variant=variant, samples=samples, snapshot=snapshot, output=uri, queries=line)
    ranker = load_ranker(uri)
    assert (ranker.query_width, ranker.query_encoder_version) == (8, "test-1")
    content = None if snapshot is None else Snapshot.open(snapshot)
    test = f"{samples}/impressions/test"
    expected = np.concatenate([probs.mean(axis=0) for _, probs in predict(ranker, content, test)])
    rows = pq.read_table(test)
    if setting == "query_interest":
        found = auc(rows["label"].to_numpy(), expected)
        assert found is not None
        assert found > 0.85

    def multi_get(ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
        assert content is not None
        places = content.lookup(ids)
        return content.gather(places), places >= 0, [None] * len(ids)

    queries = Snapshot.open(line)
    for number, row in enumerate(rows.slice(0, 20).to_pylist()):
        asked = None if row["query_id"] is None else queries.gather(queries.lookup([row["query_id"]]))[0]
        get = None if content is None else multi_get
        score = ranker.score(row["user_id"], row["behaviors"], [row["item_id"]], get, query_mm=asked)
        assert score[0] == pytest.approx(expected[number], abs=1e-6)
    write_snapshot(line, queries.ids, np.eye(8, dtype=np.float32), encoder_version="test-2")
    with pytest.raises(VersionMismatchError, match=r"trained on queries of test-1, but .* of test-2"):
        ranker.open_queries()


def test_queries_that_are_not_there_are_a_sentence(small_shop: Any, tmp_path: Path) -> None:
    scenario = load_scenario("tiny", ["ciubm.query_vector=true"])
    with pytest.raises(DataError, match=r"Add query_text or query_image to the impressions"):
        train.run(scenario, variant="sim-base", samples=small_shop.samples, snapshot=None, output=str(tmp_path))


def test_a_later_training_gives_new_values_rows_behind_the_known_ones_and_keeps_the_normalisation(
    tmp_path: Any,
) -> None:
    declared = [
        Feature(name="shop", kind="categorical"),
        Feature(name="price", kind="dense"),
        Feature(name="bucket", kind="categorical"),
    ]
    transforms = {"bucket": FeatureTransform(num_buckets=7)}
    learnt = []
    for day, shops, prices in (("1", ["b", "a", "b"], [1.0, 2.0, 3.0]), ("2", ["c", "a", "0"], [10.0, 20.0, 60.0])):
        rows = _rows([["a"]] * 3, None).append_column("shop", pa.array(shops)).append_column("price", pa.array(prices))
        (tmp_path / day).mkdir()
        pq.write_table(rows.append_column("bucket", pa.array(shops)), tmp_path / day / "part-0.parquet")
        learnt.append(learn_features(str(tmp_path / day), declared, transforms))
    grown = learnt[0].grow(learnt[1])
    assert grown.num_table_rows == {"feature.shop": 5, "feature.bucket": 8}
    (shop, bucket), both = grown.categories, pa.array(["a", "b", "0", "c", "d"])
    assert shop._rows(both).tolist() == [1, 2, 3, 4, 0]
    assert bucket == learnt[0].categories[1]
    assert grown.numbers == learnt[0].numbers
