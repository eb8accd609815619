"""Judging tables of predictions, and the rows that need no model. Models of our own are judged in test_train.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deltalake
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from mim_ray import artifacts
from mim_ray.ciubm import evaluate
from mim_ray.ciubm.predict import PredictionsWriter, mean_cosines
from mim_ray.config import Scenario
from mim_ray.errors import DataError
from mim_ray.evaluation import rows as rows_module
from mim_ray.representation_center.snapshot import Snapshot


@pytest.fixture(scope="module")
def truth(small_shop: Any) -> pa.Table:
    """impression_id and true prob of all splits."""
    return pq.read_table(small_shop.truth)


@pytest.fixture(scope="module")
def test_rows(small_shop: Any) -> pa.Table:
    return pq.read_table(f"{small_shop.samples}/impressions/test")


def _compare(shop: Any, output: Path, predictions: dict[str, str], snapshot: bool = True) -> dict[str, Any]:
    scenario = Scenario.model_validate({"evaluation": {"num_bootstrap": 50}, "ciubm": {"max_behaviors": 8}})
    evaluate.compare(
        scenario,
        samples=shop.samples,
        predictions=predictions,
        snapshot=shop.snapshot if snapshot else None,
        truth=shop.truth,
        output=f"{output}/compared.json",
    )
    return artifacts.read_json(f"{output}/compared.json")


def test_a_table_from_elsewhere_is_joined_by_impression_whatever_its_order_and_format(
    small_shop: Any, truth: pa.Table, test_rows: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "PART_ROWS", 100)
    generator = np.random.default_rng(0)
    shuffled = truth.take(generator.permutation(len(truth)))
    deltalake.write_deltalake(f"{tmp_path}/mine", shuffled)
    noisy = np.clip(np.asarray(truth["prob"]) + generator.normal(size=len(truth)), 0, 1)
    pq.write_table(
        pa.table({"impression_id": truth["impression_id"], "prob": noisy.astype(np.float32)}),
        tmp_path / "theirs.parquet",
    )
    found = _compare(small_shop, tmp_path, {"theirs": f"{tmp_path}/theirs.parquet", "mine": f"{tmp_path}/mine"})
    prob = dict(zip(truth["impression_id"].to_pylist(), truth["prob"].to_pylist(), strict=True))
    expected = roc_auc_score(test_rows["label"], [prob[name] for name in test_rows["impression_id"].to_pylist()])
    assert found["models"]["mine"]["auc"]["value"] == pytest.approx(expected, abs=1e-12)
    assert found["references"]["oracle"]["value"] == pytest.approx(expected, abs=1e-12)
    gain = found["differences"]["mine over theirs"]
    assert (gain["model"], gain["over"]) == ("mine", "theirs")
    assert 0 < gain["auc"]["low"] < gain["auc"]["value"] < gain["auc"]["high"]


def test_a_table_that_does_not_fit_the_test_rows_is_refused_with_counts(
    small_shop: Any, test_rows: pa.Table, tmp_path: Path
) -> None:
    names = test_rows["impression_id"].to_pylist()
    prob = np.full(len(names), 0.5)
    prob[:3] = [np.nan, -0.1, 1.1]
    table = pa.table({"impression_id": [*names[:-2], names[10]], "prob": [*prob[:-2], 0.5]})
    pq.write_table(table, tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=r"2 test impressions are not in it; 1 .* more than once; 3 values .* 0 to 1"):
        _compare(small_shop, tmp_path, {"bad": f"{tmp_path}/bad.parquet"})
    pq.write_table(table.rename_columns(["impression_id", "score"]), tmp_path / "worse.parquet")
    with pytest.raises(DataError, match="no column 'prob'"):
        _compare(small_shop, tmp_path, {"worse": f"{tmp_path}/worse.parquet"})


def test_a_mim_model_below_the_mean_cosine_is_called_a_defect(
    small_shop: Any, test_rows: pa.Table, truth: pa.Table, tmp_path: Path
) -> None:
    blind = pa.table({"impression_id": test_rows["impression_id"], "prob": np.full(len(test_rows), 0.3)})
    pq.write_table(blind, tmp_path / "blind.parquet")
    uris = {"din-mim": f"{tmp_path}/blind.parquet", "sim-mim": small_shop.truth}
    (warning,) = _compare(small_shop, tmp_path, uris)["warnings"]
    assert "din-mim (AUC 0.5000) is below the mean cosine" in warning
    assert "a defect to be understood" in warning
    found = _compare(small_shop, tmp_path, uris, snapshot=False)
    assert (found["warnings"], set(found["references"])) == ([], {"popularity", "oracle"})


def test_mean_cosine_equals_a_loop(small_shop: Any, test_rows: pa.Table) -> None:
    snapshot = Snapshot.open(small_shop.snapshot)
    ids = snapshot.ids.to_pylist()
    vector = dict(zip(ids, snapshot.gather(np.arange(snapshot.num_rows)), strict=True))
    found = np.concatenate(list(mean_cosines(snapshot, f"{small_shop.samples}/impressions/test", 5)))
    for value, row in zip(found, test_rows.to_pylist(), strict=True):
        known = [vector[item] for item in row["behaviors"][-5:] if item in vector]
        target = vector.get(row["item_id"], np.zeros(snapshot.width))
        cosines = [float(v @ target) / max(np.linalg.norm(v) * np.linalg.norm(target), 1e-9) for v in known]
        assert value == pytest.approx(np.mean(cosines) if cosines else 0.0, abs=1e-6)


def test_mean_cosine_of_rows_without_ids_or_behaviors_is_zero(small_shop: Any, tmp_path: Path) -> None:
    rows = {
        "item_id": pa.array(["item-3", None, "unheard-of", "item-3", "item-3"]),
        "behaviors": pa.array([None, ["item-3"], ["item-3"], [], [None, "item-59"]], pa.list_(pa.string())),
    }
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    found = np.concatenate(list(mean_cosines(Snapshot.open(small_shop.snapshot), f"{tmp_path}/rows.parquet", 5)))
    assert found.tolist() == [0.0] * 5


def test_predictions_are_written_in_order_in_row_groups(tmp_path: Path) -> None:
    uri = f"{tmp_path}/below/predictions.parquet"
    with PredictionsWriter(uri) as writer:
        for start in (0, 200_000, 400_000):
            ids = pa.array([f"{start + number}" for number in range(200_000)])
            writer.add(ids, np.arange(start, start + 200_000) / 1e6)
    assert pq.read_metadata(uri).num_row_groups == 2
    assert np.array_equal(pq.read_table(uri)["prob"], np.arange(600_000) / 1e6)
    with PredictionsWriter(f"{tmp_path}/none.parquet"):
        pass
    assert pq.read_table(f"{tmp_path}/none.parquet").column_names == ["impression_id", "prob"]
