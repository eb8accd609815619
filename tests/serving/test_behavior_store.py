import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_ray.data.schema import TIME
from mim_ray.errors import ArtifactError
from mim_ray.serving.behavior_store import BehaviorStore


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MIM_RAY_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "behaviors"
    folder.mkdir()
    pq.write_table(
        pa.table({"user_id": ["u9", "Ä", "u10"], "behaviors": [["a", "b"], ["c"], []]}), folder / "part-0.parquet"
    )
    pq.write_table(pa.table({"user_id": ["u1"], "behaviors": [["d", "e", "f"]]}), folder / "part-1.parquet")
    return folder


def test_each_user_of_each_file_is_found_with_behaviors_in_order(folder):
    store = BehaviorStore.open(str(folder))
    assert len(store) == 4
    assert store.history("u9") == (["a", "b"], None)
    assert store.history("Ä") == (["c"], None)
    assert store.history("u10") == ([], None)
    assert store.history("u1") == (["d", "e", "f"], None)


def test_times_are_there_where_every_behavior_has_one(folder):
    times = pa.array([[1_000, 2_000], [3_000], None], pa.list_(TIME))
    table = pa.table({"user_id": ["t1", "t2", "t3"], "behaviors": [["a", "b"], ["a", "b"], ["a"]]})
    pq.write_table(table.append_column("behavior_times", times), folder / "part-2.parquet")
    store = BehaviorStore.open(str(folder))
    assert store.history("t1") == (["a", "b"], [1_000, 2_000])
    assert store.history("t2") == (["a", "b"], None)
    assert store.history("t3") == (["a"], None)
    assert store.history("u9") == (["a", "b"], None)


@pytest.mark.parametrize("user", ["", "u", "u100", "ä", "zzz", "a" * 300])
def test_an_unknown_user_has_no_behaviors(folder, user):
    assert BehaviorStore.open(str(folder)).history(user) == ([], None)


def test_the_lookup_agrees_with_a_dict(tmp_path, monkeypatch):
    monkeypatch.setenv("MIM_RAY_CACHE", str(tmp_path / "cache"))
    users = {f"user-{(i * 7919) % 1009}": [str(i), str(i + 1)] for i in range(1009)}
    pq.write_table(pa.table({"user_id": list(users), "behaviors": list(users.values())}), tmp_path / "b.parquet")
    store = BehaviorStore.open(str(tmp_path / "b.parquet"))
    assert {user: store.history(user)[0] for user in users} == users


def test_a_second_open_maps_the_same_file_and_a_changed_table_another(folder, tmp_path):
    BehaviorStore.open(str(folder))
    first = set((tmp_path / "cache").iterdir())
    BehaviorStore.open(str(folder))
    assert set((tmp_path / "cache").iterdir()) == first
    pq.write_table(pa.table({"user_id": ["u2"], "behaviors": [["z"]]}), folder / "part-2.parquet")
    assert BehaviorStore.open(str(folder)).history("u2") == (["z"], None)


def test_an_empty_table_knows_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("MIM_RAY_CACHE", str(tmp_path / "cache"))
    empty = pa.table({"user_id": pa.array([], pa.string()), "behaviors": pa.array([], pa.list_(pa.string()))})
    pq.write_table(empty, tmp_path / "b.parquet")
    assert BehaviorStore.open(str(tmp_path / "b.parquet")).history("u") == ([], None)


def test_a_missing_folder_or_column_is_a_sentence(tmp_path):
    with pytest.raises(ArtifactError, match="build_samples"):
        BehaviorStore.open(str(tmp_path / "none"))
    pq.write_table(pa.table({"user": ["u"]}), tmp_path / "b.parquet")
    with pytest.raises(ArtifactError, match=r"b\.parquet is no table of user_id and behaviors"):
        BehaviorStore.open(str(tmp_path / "b.parquet"))


def test_the_cache_keeps_two_builds_of_a_store_and_those_of_other_stores(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    pq.write_table(pa.table({"user_id": ["u"], "behaviors": [["a"]]}), other / "part-0.parquet")
    BehaviorStore.open(str(other))
    opened = []
    for number in range(4):
        pq.write_table(
            pa.table({"user_id": [f"n{number}"], "behaviors": [["a"]]}), folder / f"part-{number + 2}.parquet"
        )
        opened.append(BehaviorStore.open(str(folder)))
    assert len(list((tmp_path / "cache").glob("behaviors-*.arrow"))) == 3
    assert opened[0].history("n0") == (["a"], None), "who has it open reads on"
    assert BehaviorStore.open(str(folder)).history("n3") == (["a"], None)
