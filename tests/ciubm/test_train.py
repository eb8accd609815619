"""Training, export and evaluation of small models, through Ray Train and without it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mim_ray import artifacts
from mim_ray.ciubm import evaluate, train
from mim_ray.ciubm.dataset import ImpressionEncoder, gather_batch
from mim_ray.ciubm.export import load_ranker
from mim_ray.ciubm.machine_export import write_for_machines
from mim_ray.ciubm.model import CtrNetwork
from mim_ray.ciubm.predict import predict
from mim_ray.ciubm.recipe import network_config
from mim_ray.ciubm.tables import IdTables
from mim_ray.ciubm.vocabulary_build import build_vocabularies
from mim_ray.config import Scenario
from mim_ray.config.scenario import ParameterMachines as ParameterMachinesSettings
from mim_ray.data.batches import ordered_batches
from mim_ray.errors import ArtifactError, VersionMismatchError
from mim_ray.representation_center.machine_release import MachineRelease, TableSource
from mim_ray.representation_center.parameter_machines import ParameterMachines
from mim_ray.representation_center.snapshot import Snapshot, write_snapshot
from mim_ray.representation_center.snapshot_line import kept_snapshots
from mim_ray.training.optim import average_gradients

SETTINGS: dict[str, Any] = {
    "id_dim": 4,
    "hidden": [16],
    "batch_size": 64,
    "num_epochs": 2,
    "max_behaviors": 8,
    "threads_per_worker": 1,
    "in_driver": True,
}


def _scenario(**changes: Any) -> Scenario:
    return Scenario.model_validate({"ciubm": {**SETTINGS, **changes}, "evaluation": {"num_bootstrap": 20}})


@pytest.fixture(scope="module")
def models(ray_cluster: None, small_shop: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """sim-base and sim-mim with two seeds, trained inside this process."""
    root = tmp_path_factory.mktemp("ctr")
    uris = {}
    for variant, snapshot in (("sim-base", None), ("sim-mim", small_shop.snapshot)):
        uris[variant] = f"{root}/{variant}"
        train.run(
            _scenario(seeds=[0, 1]),
            variant=variant,
            samples=small_shop.samples,
            snapshot=snapshot,
            output=uris[variant],
        )
    return uris


@pytest.mark.ray
def test_content_is_learnt_and_every_row_predicted(models: dict[str, str], small_shop: Any, tmp_path: Path) -> None:
    snapshots = {"sim-base": None, "sim-mim": small_shop.snapshot}
    result = evaluate.run(
        _scenario(),
        samples=small_shop.samples,
        variants=models,
        snapshots=snapshots,
        snapshot=small_shop.snapshot,
        truth=small_shop.truth,
        output=str(tmp_path),
    )
    found = artifacts.read_json(f"{tmp_path}/evaluation.json")
    assert found["num_rows"] == 800
    assert found["models"]["sim-mim"]["auc"]["value"] > found["models"]["sim-base"]["auc"]["value"] + 0.02
    assert found["references"]["oracle"]["value"] > found["models"]["sim-mim"]["auc"]["value"]
    assert found["differences"]["sim-mim"]["over"] == "sim-base"
    assert [bucket["bucket"] for bucket in found["age_buckets"]] == [f"S{number}" for number in range(1, 11)]
    assert sum(bucket["num_rows"] for bucket in found["age_buckets"]) == 800
    assert len(found["models"]["sim-mim"]["seed_aucs"]) == 2
    predictions = pq.read_table(f"{tmp_path}/predictions/sim-mim.parquet")
    test = pq.read_table(f"{small_shop.samples}/impressions/test")
    assert predictions["impression_id"].to_pylist() == test["impression_id"].to_pylist()
    assert np.isfinite(predictions["prob"].to_numpy()).all()
    assert sum(bucket["num_rows"] for bucket in found["exposure"]) == 800
    assert any(label == "mean cosine" for label, _ in result.rows)


@pytest.mark.ray
@pytest.mark.parametrize("unlabelled", ["half", "all"])
def test_rows_without_a_label_are_predicted_but_not_judged(
    models: dict[str, str], small_shop: Any, tmp_path: Path, unlabelled: str
) -> None:
    samples = tmp_path / "samples"
    shutil.copytree(small_shop.samples, samples)
    table = pq.read_table(samples / "impressions" / "test")
    hidden = np.arange(len(table)) % 2 == 0 if unlabelled == "half" else np.ones(len(table), bool)
    labels = pa.array(table["label"].to_numpy(), pa.int8(), mask=hidden)
    shutil.rmtree(samples / "impressions" / "test")
    (samples / "impressions" / "test").mkdir()
    column = table.schema.get_field_index("label")
    pq.write_table(table.set_column(column, "label", labels), samples / "impressions" / "test" / "part-00000.parquet")
    evaluate.run(
        _scenario(),
        samples=str(samples),
        variants={"sim-base": models["sim-base"]},
        snapshots={"sim-base": None},
        snapshot=None,
        truth=None,
        output=str(tmp_path),
    )
    found = artifacts.read_json(f"{tmp_path}/evaluation.json")
    assert found["num_rows"] == len(table) - hidden.sum()
    assert found["num_rows_without_label"] == hidden.sum()
    assert (found["models"]["sim-base"]["auc"]["value"] is None) == (unlabelled == "all")
    assert pq.read_metadata(f"{tmp_path}/predictions/sim-base.parquet").num_rows == len(table)


@pytest.mark.ray
def test_content_that_has_nothing_to_do_with_clicks_changes_nothing(
    ray_cluster: None, indifferent_shop: Any, tmp_path: Path
) -> None:
    snapshots = {"sim-base": None, "sim-mim": indifferent_shop.snapshot}
    samples = indifferent_shop.samples
    for variant, snapshot in snapshots.items():
        output = f"{tmp_path}/{variant}"
        train.run(
            _scenario(seeds=[0, 1], num_epochs=1), variant=variant, samples=samples, snapshot=snapshot, output=output
        )
    evaluate.run(
        _scenario(),
        samples=samples,
        variants={variant: f"{tmp_path}/{variant}" for variant in snapshots},
        snapshots=snapshots,
        snapshot=indifferent_shop.snapshot,
        truth=None,
        output=str(tmp_path),
    )
    gain = artifacts.read_json(f"{tmp_path}/evaluation.json")["differences"]["sim-mim"]["auc"]
    assert gain["low"] <= 0 <= gain["high"], gain


@pytest.mark.ray
@pytest.mark.parametrize("variant", ["sim-base", "sim-mim"])
def test_the_ranker_scores_as_the_evaluation_predicts(variant: str, models: dict[str, str], small_shop: Any) -> None:
    snapshot = Snapshot.open(small_shop.snapshot)
    ranker = load_ranker(models[variant], encoder_version=snapshot.encoder_version if variant == "sim-mim" else None)
    test = f"{small_shop.samples}/impressions/test"
    expected = [
        prob
        for _, probs in predict(ranker, snapshot if variant == "sim-mim" else None, test)
        for prob in probs.mean(axis=0)
    ]

    def multi_get(ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
        rows = snapshot.lookup(ids)
        return snapshot.gather(rows), rows >= 0, [None] * len(ids)

    for number, row in enumerate(pq.read_table(test).slice(0, 40).to_pylist()):
        scores = ranker.score(row["user_id"], row["behaviors"], ["item-3", row["item_id"]], multi_get)
        assert scores.shape == (2,)
        assert scores[1] == pytest.approx(expected[number], abs=1e-5)


@pytest.mark.ray
def test_tables_from_the_parameter_machines_rank_as_those_from_files(
    models: dict[str, str], small_shop: Any, tmp_path: Path
) -> None:
    """MM embeddings, ID tables and networks of both seeds come from 2 shards; one call of the client for the embeddings."""
    tables, dense = write_for_machines(models["sim-mim"], f"{tmp_path}/id_tables")
    assert sorted(tables) == ["category-0", "category-1", "item-0", "item-1", "user-0", "user-1"]
    sources = {name: TableSource(line) for name, line in {"mm": small_shop.snapshot, **tables}.items()}
    settings = ParameterMachinesSettings(
        shards=2, replicas=1, cpus_per_machine=0, folder=f"{tmp_path}/machines", deadline_ms=60_000
    )
    machines = ParameterMachines.start(f"{tmp_path}/state.json", MachineRelease("r1", sources, dense), settings)
    try:
        client = machines.client()
        snapshot, plain = Snapshot.open(small_shop.snapshot), load_ranker(models["sim-mim"])
        served = load_ranker(models["sim-mim"], machines=client)

        def from_snapshot(ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
            rows = snapshot.lookup(ids)
            return snapshot.gather(rows), rows >= 0, [None] * len(ids)

        def from_machines(ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
            answer = client.multi_get(ids)
            return answer.matrix, answer.found, answer.category.to_pylist()

        candidates = ["item-3", "item-55", "unheard-of", "item-59"]
        for user, behaviors in (("user-1", ["item-2", "item-7", "new"]), ("nobody", [])):
            expected = plain.score(user, behaviors, candidates, from_snapshot)
            assert served.score(user, behaviors, candidates, from_machines) == pytest.approx(expected, abs=1e-5)
            assert len(set(expected.round(6))) > 1
        with pytest.raises(ArtifactError, match="hold another model's tables"):
            served.models[0][1].embed({"item": torch.tensor([10_000])})
    finally:
        machines.stop()


@pytest.mark.ray
def test_a_new_item_is_ranked_by_its_content_and_category(models: dict[str, str], small_shop: Any) -> None:
    ranker, snapshot = load_ranker(models["sim-mim"]), Snapshot.open(small_shop.snapshot)

    def multi_get(ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
        rows = snapshot.lookup(["item-55" if one == "brand-new" else one for one in ids])
        return snapshot.gather(rows), rows >= 0, ["category-0" if one == "brand-new" else None for one in ids]

    # item-55 was in no train row and is of category-0 (55 % 5): its twin, unknown to the catalogue, scores alike.
    scores = ranker.score("user-1", ["item-2", "item-7"], ["item-55", "brand-new"], multi_get)
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert np.isfinite(ranker.score("nobody", [], ["unheard-of"], multi_get)).all()


@pytest.mark.ray
def test_hashed_vocabularies_rank_new_users_and_items_by_the_rows_of_their_hashes(
    ray_cluster: None, small_shop: Any, tmp_path: Path
) -> None:
    settings = _scenario(vocabulary="hashed", hash_rows=37, num_epochs=1)
    train.run(settings, variant="din-base", samples=small_shop.samples, snapshot=None, output=str(tmp_path))
    ranker = load_ranker(str(tmp_path))
    weights = artifacts.read_tensors(f"{tmp_path}/seed-0/tables.safetensors")
    assert (len(weights["item"]), len(weights["user"])) == (38, 38)
    names = [f"new-{number}" for number in range(60)]
    rows = ranker.users.encode(names)
    scores = np.array([ranker.score(name, ["item-1"], ["item-2"])[0] for name in names])
    of_items = ranker.score("user-1", ["item-1"], names)
    for row in set(rows.tolist()):
        assert np.ptp(scores[rows == row]) < 1e-6
        assert np.ptp(of_items[rows == row]) < 1e-6
    assert np.ptp(scores) > 1e-4
    assert np.ptp(of_items) > 1e-4


@pytest.mark.ray
def test_a_mix_of_encoder_versions_is_refused_naming_both(models: dict[str, str]) -> None:
    with pytest.raises(VersionMismatchError, match=r"test-1.*other-2"):
        load_ranker(models["sim-mim"], encoder_version="other-2")
    load_ranker(models["sim-base"], encoder_version="other-2")  # uses no content


@pytest.mark.ray
def test_finished_seeds_are_kept_and_the_same_seed_gives_the_same_model(
    models: dict[str, str], small_shop: Any, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"variant": "sim-base", "samples": small_shop.samples, "snapshot": None}
    train.run(_scenario(seeds=[0]), output=str(tmp_path), **arguments)
    first = artifacts.read_tensors(f"{tmp_path}/seed-0/network.safetensors")
    again = artifacts.read_tensors(f"{models['sim-base']}/seed-0/network.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    stamp = (tmp_path / "seed-0" / "metrics.json").stat().st_mtime_ns
    train.run(_scenario(seeds=[0]), output=str(tmp_path), **arguments)
    assert (tmp_path / "seed-0" / "metrics.json").stat().st_mtime_ns == stamp


def test_mim_without_a_snapshot_is_refused(small_shop: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"sim-mim needs embeddings.*jobs/extract.py"):
        train.run(_scenario(), variant="sim-mim", samples=small_shop.samples, snapshot=None, output=str(tmp_path))


def test_a_model_names_the_one_snapshot_it_was_trained_on_and_keeps_it_only_while_training(
    small_shop: Any, models: dict[str, str]
) -> None:
    info = artifacts.read_json(f"{models['sim-mim']}/ctr.json")
    snapshot = Snapshot.open(small_shop.snapshot)
    assert (info["snapshot"], info["encoder_version"]) == (snapshot.uri, snapshot.encoder_version)
    assert kept_snapshots(small_shop.snapshot) == {}


def test_evaluation_with_the_embeddings_of_another_encoder_version_is_refused_naming_both(
    small_shop: Any, models: dict[str, str], tmp_path: Path
) -> None:
    snapshot = Snapshot.open(small_shop.snapshot)
    other = str(tmp_path / "other")
    rows = snapshot.gather(np.arange(snapshot.num_rows))
    write_snapshot(other, snapshot.ids, rows, encoder_version="csft-of-tomorrow")
    with pytest.raises(VersionMismatchError, match=rf"trained on .*{snapshot.encoder_version}.*of csft-of-tomorrow"):
        evaluate.run(
            _scenario(),
            samples=small_shop.samples,
            variants={"sim-mim": models["sim-mim"]},
            snapshots={"sim-mim": other},
            snapshot=other,
            truth=None,
            output=str(tmp_path / "evaluation"),
        )


def test_a_snapshot_of_other_items_is_refused(small_shop: Any, tmp_path: Path) -> None:
    other = f"{tmp_path}/other"
    write_snapshot(other, ["x", "y"], np.eye(2, dtype=np.float32), encoder_version="test-1")
    with pytest.raises(ArtifactError, match="no embedding of any item"):
        train.run(_scenario(), variant="sim-mim", samples=small_shop.samples, snapshot=other, output=str(tmp_path))


@pytest.mark.distributed
def test_two_workers_match_one_on_the_joined_batch(
    gloo_workers: Callable[..., list[dict[str, Any]]], small_shop: Any, tmp_path: Path
) -> None:
    vocabularies = build_vocabularies(small_shop.samples, min_item_count=1)
    users = vocabularies.users
    encoder = ImpressionEncoder(vocabularies.items, users, None, 8)
    columns = ["user_id", "item_id", "behaviors", "label"]
    rows = next(ordered_batches(f"{small_shop.samples}/impressions/train", columns, 256))
    config = network_config(_scenario().ciubm, "sim", None)

    def steps(rank: int, world: int) -> dict[str, Any]:
        torch.manual_seed(0)
        network = CtrNetwork(config)
        tables = IdTables.create({"item": 51, "category": 6, "user": len(users) + 1}, 4, seed=0)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        for start in (0, 128):
            size = 128 // world
            batch = encoder.encode(rows.slice(start + rank * size, size))
            loss, _ = network.loss(gather_batch(batch, tables, train=True), batch.label)
            optimizer.zero_grad()
            loss.backward()
            average_gradients(network.parameters())
            optimizer.step()
            tables.step(0.01)
        return {**{f"network.{k}": v for k, v in network.state_dict().items()}, **tables.state()}

    alone = steps(0, 1)
    for result in gloo_workers(lambda rank: steps(rank, 2), 2):
        for name, value in alone.items():
            assert torch.allclose(torch.as_tensor(result[name]), value, atol=2e-4), name
