import sys

import numpy as np
import pytest

from mim_ray.errors import ConfigError
from mim_ray.representation_center.snapshot import Snapshot, write_snapshot
from mim_ray.serving import nearest_rows
from mim_ray.serving.nearest_rows import NearestRows, unit

NUM_ROWS, WIDTH = 3_000, 16


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIM_RAY_CACHE", str(tmp_path / "cache"))


def make(tmp_path, num_rows=NUM_ROWS, dtype="float16", seed=0) -> Snapshot:
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(num_rows, WIDTH)).astype(np.float32) * rng.uniform(0.5, 2, (num_rows, 1)).astype(
        np.float32
    )
    ids = [f"i{row}" for row in range(num_rows)]
    write_snapshot(str(tmp_path / "line"), ids, matrix, encoder_version="v", delta_version=0, dtype=dtype)
    return Snapshot.open(str(tmp_path / "line"))


def truth(snapshot, vector, allowed=None):
    """All rows by falling cosine, in a loop."""
    cosines = []
    for row in range(snapshot.num_rows):
        held = snapshot.gather(np.array([row]))[0].astype(np.float64)
        cosines.append(float(held @ vector / np.linalg.norm(held) / np.linalg.norm(vector)))
    rows = range(snapshot.num_rows) if allowed is None else np.flatnonzero(allowed)
    return sorted(((cosines[row], row) for row in rows), reverse=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_small_snapshot_is_searched_exactly(tmp_path, dtype):
    snapshot = make(tmp_path, 200, dtype)
    nearest = NearestRows.open(snapshot, exact_rows=200, recall=0.9)
    vector = np.arange(WIDTH, dtype=np.float32) - 5
    rows, cosines = nearest.search(vector, 7)
    expected = truth(snapshot, vector)[:7]
    assert rows.tolist() == [row for _, row in expected]
    np.testing.assert_allclose(cosines, [cosine for cosine, _ in expected], atol=1e-5)
    assert (nearest.recall, nearest.num_lists_read) == (1.0, 0)


def test_a_large_snapshots_index_reaches_the_recall_that_was_asked_for(tmp_path):
    snapshot = make(tmp_path)
    found = {}
    for wanted in (0.5, 0.95):
        nearest = NearestRows.open(snapshot, exact_rows=100, recall=wanted)
        queries = snapshot.gather(np.arange(0, NUM_ROWS, 60))
        hits = [
            len(set(nearest.search(query, 10)[0].tolist()) & {row for _, row in truth(snapshot, query)[:10]}) / 10
            for query in queries[:20]
        ]
        assert nearest.recall >= wanted
        found[wanted] = (np.mean(hits), nearest.num_lists_read)
        assert np.mean(hits) >= wanted - 0.15  # other queries than those that chose it, few of them
    assert found[0.5][1] < found[0.95][1], "more recall reads more lists"


def test_similarities_of_a_large_snapshot_are_exact_though_its_codes_are_not(tmp_path):
    snapshot = make(tmp_path)
    nearest = NearestRows.open(snapshot, exact_rows=100, recall=0.95)
    vector = snapshot.gather(np.array([17]))[0]
    rows, cosines = nearest.search(vector, 10)
    assert rows[0] == 17
    np.testing.assert_allclose(cosines, unit(snapshot.gather(rows)) @ unit(vector[None])[0], atol=1e-6)
    assert (np.diff(cosines) <= 0).all()


@pytest.mark.parametrize("exact_rows", [10, NUM_ROWS])
def test_only_allowed_rows_are_found_however_rare(tmp_path, exact_rows, monkeypatch):
    monkeypatch.setattr(nearest_rows, "FEW_ROWS", 100)
    snapshot = make(tmp_path)
    nearest = NearestRows.open(snapshot, exact_rows=exact_rows, recall=0.95)
    vector = np.ones(WIDTH, np.float32)
    allowed = np.zeros(NUM_ROWS, bool)
    allowed[::700] = True
    rows, _ = nearest.search(vector, 10, allowed=allowed)
    assert rows.tolist() == [row for _, row in truth(snapshot, vector, allowed)]
    half = np.arange(NUM_ROWS) % 2 == 0
    rows, _ = nearest.search(vector, 10, allowed=half)
    assert (len(rows), (rows % 2).max()) == (10, 0)
    assert len(nearest.search(vector, 10, allowed=np.zeros(NUM_ROWS, bool))[0]) == 0


def test_a_second_reader_maps_the_index_of_the_first(tmp_path, monkeypatch):
    snapshot = make(tmp_path)
    first = NearestRows.open(snapshot, exact_rows=100, recall=0.9)
    monkeypatch.setattr(nearest_rows, "_build", None)  # would fail
    second = NearestRows.open(Snapshot.open(snapshot.uri), exact_rows=100, recall=0.9)
    vector = np.ones(WIDTH, np.float32)
    np.testing.assert_array_equal(first.search(vector, 9)[0], second.search(vector, 9)[0])
    assert second.recall == first.recall


def test_another_snapshot_has_an_index_of_its_own_and_the_oldest_is_deleted(tmp_path):
    for seed in range(3):
        snapshot = make(tmp_path, 50, seed=seed)
        nearest = NearestRows.open(snapshot, exact_rows=100, recall=0.9)
        own = snapshot.gather(np.array([3]))[0]
        assert nearest.search(own, 1)[0].tolist() == [3]
    assert len(list((tmp_path / "cache" / "nearest").glob("*.faiss"))) == nearest_rows.KEPT_INDEXES


def test_a_roll_back_to_an_older_snapshot_keeps_the_index_that_it_builds(tmp_path):
    older, *_ = snapshots = [make(tmp_path, 50, seed=seed) for seed in range(4)]
    for snapshot in (*snapshots, older):
        nearest = NearestRows.open(snapshot, exact_rows=100, recall=0.9)
        assert nearest.search(snapshot.gather(np.array([3]))[0], 1)[0].tolist() == [3]
    assert len(list((tmp_path / "cache" / "nearest").glob("*.faiss"))) == nearest_rows.KEPT_INDEXES


def test_an_empty_snapshot_has_no_neighbors(tmp_path):
    nearest = NearestRows.open(make(tmp_path, 0), exact_rows=100, recall=0.9)
    assert len(nearest.search(np.ones(WIDTH, np.float32), 5)[0]) == 0


def test_without_faiss_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"pip install \"mim_ray\[search\]\""):
        NearestRows.open(make(tmp_path, 10), exact_rows=100, recall=0.9)
