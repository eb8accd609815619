"""mim_ray/extraction/run.py: the whole job on Ray, also killed in the middle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mim_ray.config import load_scenario
from mim_ray.config.scenario import Extraction
from mim_ray.data.queries import QUERIES, write_queries
from mim_ray.data.rejects import read_rejects
from mim_ray.data.transforms import PictureFormat
from mim_ray.encoders.item_encoder import ItemEncoder, encode_batch
from mim_ray.encoders.tokenizer import train_tokenizer
from mim_ray.errors import ArtifactError
from mim_ray.extraction.read import Decoding
from mim_ray.extraction.run import Extracted, extract, extract_queries, run
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.table import EmbeddingTable

DECODING = Decoding(PictureFormat(8, "squash"), 100_000, 10_000, 40, "/nowhere")
SETTINGS = Extraction(shard_rows=50, batch_size=25, commit_every_s=0.1, num_actors=2)

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def fill(
    items: str, folder: Path, load: Any, settings: Extraction = SETTINGS, snapshots: str | None = None
) -> tuple[EmbeddingTable, Extracted]:
    table = EmbeddingTable(f"{folder}/table").create()
    done = extract(
        items,
        table,
        encoder="stand-in",
        encoder_version="v1",
        decoding=DECODING,
        settings=settings,
        rejects=f"{folder}/rejects",
        load=load,
        snapshots=snapshots,
    )
    return table, done


def log(table: EmbeddingTable) -> pa.Table:
    """Every row of the table, sorted."""
    _, files = table.scan("v1")
    return pa.concat_tables([file.read() for file in files]).sort_by("item_id")


BAD = {
    "image": {3: b"broken", 4: None, 160: None},
    "title": {3: None, 5: None, 160: None},
    "item_id": {7: "item-6", 8: None, 299: "item-0"},
}


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory, make_items: Callable[..., str]) -> str:
    return make_items(tmp_path_factory.mktemp("data"), num=300, row_group_rows=80, **BAD)


@pytest.fixture(scope="module")
def undisturbed(
    items: str, tmp_path_factory: pytest.TempPathFactory, stand_in: Callable[..., Any], ray_cluster: None
) -> tuple[EmbeddingTable, Extracted]:
    return fill(items, tmp_path_factory.mktemp("undisturbed"), stand_in())


def test_every_usable_item_is_in_the_table_once_and_a_second_run_does_nothing(
    items: str, undisturbed: tuple[EmbeddingTable, Extracted], stand_in: Callable[..., Any]
) -> None:
    table, done = undisturbed
    expected = sorted(f"item-{number}" for number in range(300) if number not in (3, 7, 8, 160, 299))
    assert log(table)["item_id"].to_pylist() == expected
    assert (done.num_rows, done.num_rows_done, done.num_shards_found) == (300, 300, 0)
    reasons = sorted((row["key"], row["reason"]) for row in done.rejects.to_pylist())
    assert reasons == [
        ("item-0", "duplicate item id"),
        ("item-160", "no content"),
        ("item-3", "image format"),
        ("item-3", "no content"),
        ("item-6", "duplicate item id"),
        ("row 8", "no item id"),
    ]
    version = table.version
    _, again = fill(items, Path(table.uri).parent, stand_in())
    assert (again.num_rows_done, again.num_shards_found, table.version) == (0, done.num_shards, version)
    assert again.rejects.num_rows == done.rejects.num_rows


def test_content_that_the_snapshot_has_is_copied_unless_it_was_rounded(
    items: str, undisturbed: tuple[EmbeddingTable, Extracted], tmp_path: Path, make_items: Callable[..., str]
) -> None:
    """A changed title changes the file, so all of its shards are made again; only the changed row is encoded."""
    changed = make_items(
        tmp_path / "data", num=300, row_group_rows=80, **(BAD | {"title": {**BAD["title"], 10: "new"}})
    )

    def counting(folder: Path) -> Any:
        def load(uri: str, use_gpu: bool) -> Any:
            def encode(titles: Any, images: Any, has_image: Any) -> Any:
                with open(f"{folder}-encoded", "a") as file:
                    file.write("".join(f"{title}\n" for title in titles))
                return np.eye(4, dtype=np.float32)[np.zeros(len(titles), int)]

            return encode

        return load

    before = undisturbed[0]
    for dtype, encoded in (("float32", {"new"}), ("float16", None)):
        line = f"{tmp_path}/{dtype}"
        build_snapshot(before, "v1", line, dtype=dtype)
        table, done = fill(changed, tmp_path / f"b-{dtype}", counting(tmp_path / dtype), snapshots=line)
        assert done.num_rows_done == 300
        titles = (tmp_path / f"{dtype}-encoded").read_text().splitlines()
        if encoded is None:
            assert len(titles) > 250
            continue
        assert set(titles) == encoded
        found, expected = log(table), log(before)
        assert found["item_id"].to_pylist() == expected["item_id"].to_pylist()
        same = np.array(found["item_id"].to_pylist()) != "item-10"
        for name in ("content_hash", "embedding"):
            assert found.filter(pa.array(same))[name].equals(expected.filter(pa.array(same))[name])


def test_actors_that_ask_for_a_gpu_are_given_one(tmp_path: Path, make_items: Callable[..., str], stand_in: Any) -> None:
    uri = make_items(tmp_path / "data", num=60)
    settings = SETTINGS.model_copy(update={"gpus_per_actor": 1.0, "num_actors": 1})
    table, _ = fill(uri, tmp_path / "a", stand_in(need_gpu=True), settings)
    assert log(table).num_rows == 60


def test_the_stage_fills_table_rejects_and_snapshot_with_a_real_encoder(
    tmp_path: Path, make_items: Callable[..., str]
) -> None:
    scenario = load_scenario("tiny")
    uri = make_items(tmp_path / "data", num=40, image={3: b"broken", 4: None}, title={3: None, 5: None})
    titles = [f"title number {number}" for number in range(40)]
    tokenizer = train_tokenizer(titles, scenario.encoders.text.vocabulary_size)
    encoder = ItemEncoder.build(scenario.encoders, tokenizer, seed=0)
    version = encoder.save(f"{tmp_path}/encoder", stage="csft")
    result = run(
        scenario,
        data_root=str(tmp_path / "data"),
        samples="unused",
        encoder=f"{tmp_path}/encoder",
        output=f"{tmp_path}/extraction",
        center=f"{tmp_path}/center",
        rejects=f"{tmp_path}/rejects",
    )
    assert result.rejects == {"image format": 1, "no content": 1}
    assert read_rejects(f"{tmp_path}/rejects", "extraction").num_rows == 2
    snapshot = Snapshot.open(result.metrics["snapshot"])
    assert result.metrics["snapshot"] == f"{tmp_path}/center/snapshots/{version}"
    assert (snapshot.encoder_version, snapshot.num_rows, snapshot.width) == (version, 39, scenario.encoders.width)
    rows = snapshot.lookup([f"item-{number}" for number in range(40)])
    assert rows[3] == -1
    found = snapshot.gather(rows)
    size = scenario.encoders.vision.image_size
    image = np.zeros((1, 3, size, size), np.uint8)
    expected = encode_batch(encoder, [titles[4]], image, np.array([False]))
    np.testing.assert_allclose(found[4], expected[0], atol=1e-5)  # a title alone gets an embedding
    np.testing.assert_allclose(np.linalg.norm(np.delete(found, 3, axis=0), axis=1), 1, atol=1e-5)
    assert uri.endswith("items.parquet")


def test_an_encoder_that_cannot_be_loaded_is_a_sentence(tmp_path: Path, make_items: Callable[..., str]) -> None:
    def load(uri: str, use_gpu: bool) -> Any:
        from mim_ray.errors import ArtifactError

        raise ArtifactError("weights are damaged, run the stage again")

    with pytest.raises(ArtifactError, match=r"^weights are damaged"):
        fill(make_items(tmp_path / "data", num=20), tmp_path / "a", load)


def test_queries_are_encoded_once_each_into_a_snapshot_of_their_own(
    tmp_path: Path, stand_in: Callable[..., Any], picture: Callable[[int], bytes]
) -> None:
    rows = [
        {"item_id": "picture", "title": None, "image": picture(1)},
        {"item_id": "text", "title": "red mug", "image": None},
        {"item_id": "broken", "title": None, "image": b"no picture"},
    ]
    write_queries(pa.Table.from_pylist(rows, schema=QUERIES), str(tmp_path), "00000")
    arguments: dict[str, Any] = {
        "encoder": "stand-in",
        "encoder_version": "v1",
        "decoding": DECODING,
        "settings": SETTINGS,
        "load": stand_in(),
    }
    snapshot, rejects = extract_queries(f"{tmp_path}/queries", f"{tmp_path}/center", **arguments)
    assert snapshot is not None
    assert sorted(snapshot.ids.to_pylist()) == ["picture", "text"]
    text = snapshot.gather(snapshot.lookup(["text"]))[0]
    assert text[1] / text[0] == pytest.approx(sum(b"red mug") % 97 / len("red mug"), abs=1e-4)
    assert {(row["source"], row["key"], row["reason"]) for row in rejects.to_pylist()} == {
        ("queries", "broken", "image format"),
        ("queries", "broken", "no content"),
    }
    none, rejects = extract_queries(only_broken(tmp_path / "other", rows[2]), f"{tmp_path}/other-center", **arguments)
    assert none is None
    assert rejects.num_rows == 2


def only_broken(folder: Path, row: dict[str, Any]) -> str:
    write_queries(pa.Table.from_pylist([row], schema=QUERIES), str(folder), "00000")
    return f"{folder}/queries"
