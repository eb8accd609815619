"""Two successive builds of samples: the second day's training goes on from the first day's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mim_ray import artifacts
from mim_ray.ciubm import train
from mim_ray.ciubm.continuing import copy_later_rows, grown_state, times_of
from mim_ray.ciubm.export import load_ranker
from mim_ray.ciubm.tables.optimizers import OptimizerName
from mim_ray.ciubm.tables.replicated import IdTables
from mim_ray.ciubm.vocabulary import ItemIndex, Vocabulary
from mim_ray.config import Scenario
from mim_ray.data.catalogue import Catalogue, write_catalogue
from mim_ray.errors import ArtifactError, DataError, VersionMismatchError
from mim_ray.representation_center.snapshot import Snapshot, write_snapshot

SETTINGS: dict[str, Any] = {
    "id_dim": 4,
    "hidden": [16],
    "batch_size": 64,
    "max_behaviors": 8,
    "threads_per_worker": 1,
    "in_driver": True,
}
FIRST_ITEMS, FIRST_ROWS = 45, 2_000
_OUTPUTS = ("network", "tables", "optimizer")


def scenario_of(**changes: Any) -> Scenario:
    return Scenario.model_validate({"ciubm": {**SETTINGS, **changes}})


@pytest.fixture(scope="module")
def first_day(small_shop: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Samples: the shop's first 2,000 train rows, then 500 of validation, and the 45 items that it had by then."""
    root = tmp_path_factory.mktemp("first_day")
    rows = pq.read_table(f"{small_shop.samples}/impressions/train")
    for split, part in (("train", rows.slice(0, FIRST_ROWS)), ("validation", rows.slice(FIRST_ROWS, 500))):
        (root / "impressions" / split).mkdir(parents=True)
        pq.write_table(part, root / "impressions" / split / "part-0.parquet", row_group_size=700)
    catalogue = Catalogue.open(f"{small_shop.samples}/catalogue")
    write_catalogue(f"{root}/catalogue", [catalogue.take(np.arange(FIRST_ITEMS))])
    return str(root)


@pytest.fixture(scope="module")
def first_model(ray_cluster: None, first_day: str, small_shop: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder that holds din-mim, trained on the first day."""
    root = str(tmp_path_factory.mktemp("first_model"))
    output = f"{root}/din-mim"
    train.run(scenario_of(), variant="din-mim", samples=first_day, snapshot=small_shop.snapshot, output=output)
    return root


def go_on(small_shop: Any, output: str, continue_from: str, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "variant": changes.pop("variant", "din-mim"),
        "samples": changes.pop("samples", small_shop.samples),
        "snapshot": changes.pop("snapshot", small_shop.snapshot),
    }
    train.run(scenario_of(continue_from=continue_from, **changes), output=output, **arguments)
    return artifacts.read_json(f"{output}/ctr.json")


@pytest.mark.ray
def test_the_later_model_begins_with_the_earlier_one_and_grows(
    first_model: str, small_shop: Any, tmp_path: Path
) -> None:
    info = go_on(small_shop, str(tmp_path), first_model, learning_rate=1e-9)
    assert info["continued_from"] == f"{first_model}/din-mim"
    assert info["metrics"]["num_train_rows"] == 1_000  # only what is later than the first day's train rows
    uris = (f"{first_model}/din-mim", str(tmp_path))
    earlier, later = (
        {name: artifacts.read_tensors(f"{uri}/seed-0/{name}.safetensors") for name in _OUTPUTS} for uri in uris
    )
    assert all(torch.allclose(later["network"][name], value, atol=1e-6) for name, value in earlier["network"].items())
    items, more = (ItemIndex.load(f"{uri}/vocabulary") for uri in uris)
    assert (items.num_table_rows, more.num_table_rows) == (46, 51)
    known = [f"item-{number}" for number in range(FIRST_ITEMS)]
    assert np.array_equal(*(index.table_row[index.vocabulary.encode(known)] for index in (items, more)))
    users, more_users = (Vocabulary.load(f"{uri}/vocabulary/users.arrow") for uri in uris)
    assert users.ids.equals(more_users.ids.slice(0, len(users)))
    for name, weight in earlier["tables"].items():
        assert torch.allclose(later["tables"][name][: len(weight)], weight, atol=1e-6), name
    assert later["tables"]["item"].shape == (51, 4)
    assert torch.allclose(later["tables"]["item"][46:], earlier["tables"]["item"][:1], atol=1e-6)  # as the unknown item
    for key, value in earlier["optimizer"].items():
        assert key in later["optimizer"]
        if key.endswith("num_steps"):
            assert later["optimizer"][key] > value  # of one course


@pytest.mark.ray
def test_a_second_day_helps_and_new_items_are_ranked(first_model: str, small_shop: Any, tmp_path: Path) -> None:
    """Judged by the validation rows of the second day, which neither has trained on."""
    again = go_on(small_shop, f"{tmp_path}/again", f"{first_model}/din-mim")
    still = go_on(small_shop, f"{tmp_path}/still", f"{first_model}/din-mim", learning_rate=1e-9)
    assert again["metrics"]["validation_log_loss"] < still["metrics"]["validation_log_loss"]
    ranker, snapshot = load_ranker(f"{tmp_path}/again"), Snapshot.open(small_shop.snapshot)

    def multi_get(ids: Any) -> Any:
        rows = snapshot.lookup(ids)
        return snapshot.gather(rows), rows >= 0, [None] * len(ids)

    assert np.isfinite(ranker.score("user-1", ["item-2", "item-47"], ["item-46", "unheard-of"], multi_get)).all()


@pytest.mark.ray
def test_another_encoder_version_is_refused_naming_both(first_model: str, small_shop: Any, tmp_path: Path) -> None:
    snapshot = Snapshot.open(small_shop.snapshot)
    other = f"{tmp_path}/snapshot"
    write_snapshot(other, snapshot.ids, snapshot.gather(np.arange(snapshot.num_rows)), encoder_version="csft-2")
    with pytest.raises(VersionMismatchError, match=r"trained on embeddings of test-1, .* are of csft-2"):
        go_on(small_shop, f"{tmp_path}/out", first_model, snapshot=other)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": [8]}, r"hidden .*16.* -> .*8"),
        ({"seeds": [0, 3]}, r"seeds \[0\] -> \[0, 3\]"),
        ({"vocabulary": "hashed", "hash_rows": 30}, r"vocabulary explicit -> hashed to 30 rows"),
        ({"table_optimizer": "rowwise_adagrad"}, "table_optimizer adam -> rowwise_adagrad"),
    ],
)
def test_settings_that_do_not_fit_are_refused_naming_them(
    first_model: str, small_shop: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        go_on(small_shop, str(tmp_path), first_model, **changes)


@pytest.mark.ray
def test_a_model_that_is_not_there_or_another_variant_is_refused(
    first_model: str, small_shop: Any, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="holds no finished CTR model, neither itself nor in sim-mim"):
        go_on(small_shop, str(tmp_path), first_model, variant="sim-mim")
    with pytest.raises(ArtifactError, match="is a model din-mim and cannot go on as sim-mim"):
        go_on(small_shop, str(tmp_path), f"{first_model}/din-mim", variant="sim-mim")


@pytest.mark.ray
def test_rows_that_the_earlier_model_has_seen_judge_no_later_one(
    first_model: str, first_day: str, small_shop: Any, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"no row later than 2023-11-14T.*, where the earlier model's train rows end"):
        go_on(small_shop, f"{tmp_path}/same", first_model, samples=first_day)
    info = artifacts.read_json(f"{first_model}/din-mim/ctr.json")
    info["times"]["train"][1] = times_of(small_shop.samples)["validation"][0]  # type: ignore[index]
    seen = f"{tmp_path}/seen"
    artifacts.write_json(f"{seen}/ctr.json", info)
    (Path(seen) / "vocabulary").symlink_to(f"{first_model}/din-mim/vocabulary")
    with pytest.raises(DataError, match=r"The validation rows .* begin at .*, but .* was trained on rows up to"):
        go_on(small_shop, f"{tmp_path}/out", seen)
    info["times"] = times_of(small_shop.samples)
    info["times"] = {**info["times"], "validation": info["times"]["test"], "train": [0, 1]}
    artifacts.write_json(f"{seen}/ctr.json", info)
    with pytest.raises(DataError, match=r"The test rows .* begin at .*, but .* was chosen by rows up to"):
        go_on(small_shop, f"{tmp_path}/out", seen)


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
def test_grown_rows_start_as_the_unknown_one_without_history(optimizer: OptimizerName) -> None:
    tables = IdTables.create({"item": 3}, 4, seed=0, optimizer=optimizer)
    tables.embed({"item": torch.arange(3)}, train=True)["item"].sum().backward()
    tables.step(0.1)
    state = {f"tables/{name}": weight for name, weight in tables.state().items()}
    state |= {f"table_optimizer/{name}": slot for name, slot in tables.optimizer_state().items()}
    grown = grown_state(state, {"item": 5})
    assert torch.equal(grown["tables/item"][:3], tables["item"].weight)
    assert all(torch.equal(row, tables["item"].weight[0]) for row in grown["tables/item"][3:])
    slots = [slot for key, slot in grown.items() if key.startswith("table_optimizer/") and slot.ndim]
    assert slots
    assert all(slot[:3].any() and len(slot) == 5 and not slot[3:].any() for slot in slots)
    assert grown_state(state, {"item": 2})["tables/item"] is state["tables/item"]


def test_later_rows_are_copied_in_order_without_those_at_the_limit(small_shop: Any, tmp_path: Path) -> None:
    source = f"{small_shop.samples}/impressions/train"
    rows = pq.read_table(source)
    limit = int(rows["timestamp"].cast("int64")[2_499].as_py())
    assert copy_later_rows(source, limit, str(tmp_path / "later")) == 500
    assert pq.read_table(tmp_path / "later").equals(rows.slice(2_500))
    with pytest.raises(DataError, match="has no row later than"):
        copy_later_rows(source, limit + 10**12, str(tmp_path / "none"))
