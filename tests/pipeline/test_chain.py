"""The whole chain on small synthetic shops: what the demo promises, and the control in which content must find nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mim_ray.config import load_scenario
from mim_ray.data.batches import ordered_batches
from mim_ray.errors import ConfigError, DataError
from mim_ray.pipeline.graph import pipeline
from mim_ray.pipeline.reproduce.reproduce import reproduce
from mim_ray.pipeline.run_all import full_pipeline, run_all
from mim_ray.representation_center.snapshot import Snapshot

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SMALL = (
    "synthetic.num_items=900",
    "synthetic.num_users=700",
    "synthetic.num_impressions=40000",
    "synthetic.num_image_searches=4000",
    "synthetic.base_ctr=0.25",
    "pretraining.num_workers=1",
    "pretraining.batch_size=256",
    "pretraining.in_driver=true",
    "pretraining.vision_dda_steps=10",
    "pretraining.text_dda_steps=20",
    "pretraining.dma_steps=40",
    "csft.num_decoders=0",  # Ray Data and two workers take longer to start than these steps; other tests have them
    "csft.num_workers=1",
    "csft.in_driver=true",
    "csft.batch_size=192",
    "csft.steps=100",
    "csft.past_warmup_steps=90",
    "ciubm.batch_size=128",
    "evaluation.num_bootstrap=100",
)


@pytest.fixture(scope="module")
def run(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("chain")
    return root, run_all(load_scenario("tiny", [f"run.root={root}", *SMALL]))


def test_the_report_holds_every_figure_of_the_chain(run: tuple[Path, dict[str, Any]]) -> None:
    root, figures = run
    assert json.loads((root / "report.json").read_text()) == figures
    assert set(figures["ctr"]) == {"base", "mim", "oracle", "closed_ratio"}
    assert 0.5 < figures["ctr"]["base"]["auc"] < figures["ctr"]["mim"]["auc"] < figures["ctr"]["oracle"]["auc"] < 1
    assert 0 < figures["ctr"]["closed_ratio"] < 1.5
    assert [row["bucket"] for row in figures["cold"]] == [f"S{n}" for n in range(1, 11)]
    assert figures["http"]["rank_ok"] is True
    assert 0 < figures["http"]["new_item_rankable_s"] < 30
    assert {"shop", "samples", "pretraining", "csft", "extraction", "ctr/sim-mim", "evaluation", "serving"} <= set(
        figures["stages"]
    )


def test_each_stage_makes_neighbors_more_alike_in_true_style(run: tuple[Path, dict[str, Any]]) -> None:
    _, figures = run
    assert figures["neighbors"]["C-SFT"] > figures["neighbors"]["untrained"] + 0.05


def test_the_page_is_self_contained_and_shows_pictures_and_plots(run: tuple[Path, dict[str, Any]]) -> None:
    text = (run[0] / "report.html").read_text()
    assert text.count("<svg") >= 3
    assert text.count("data:image/jpeg;base64,") >= 12
    references = re.findall(r'(?:src|href)="([^"]{0,40})', text)
    assert all(reference.startswith(("data:", "#")) for reference in references)
    assert "<script" not in text


def test_the_papers_tables_reuse_the_run_and_go_on(run: tuple[Path, dict[str, Any]]) -> None:
    root, _ = run
    scenario = load_scenario("tiny", [f"run.root={root}", *SMALL])
    pages = reproduce(scenario, tables=[1, 7], figures=[6], num_seeds=1)
    table_1 = {row[0]: row[1] for row in pages.tables[0].rows}
    evaluation = json.loads((root / "evaluation" / "evaluation.json").read_text())
    assert int(table_1["data (impressions)"].replace(",", "")) > evaluation["num_rows"]
    assert 0 < int(table_1["users"].replace(",", "")) <= 700
    assert [table.title for table in pages.tables[1:]] == ["Table 7: gains by category", "Figure 6: gains by item age"]
    assert len(pages.tables[2].rows) == 10
    default = root / "reproduce" / "seed-0" / "default"
    assert (default / "evaluation" / "evaluation.json").is_file()
    assert not (default / "csft").exists()  # read in the run itself
    assert "closed ratio" in " ".join(pages.remarks).lower()
    before = (default / "evaluation" / "evaluation.json").stat().st_mtime_ns
    reproduce(scenario, tables=[7], figures=[], num_seeds=1)
    assert (default / "evaluation" / "evaluation.json").stat().st_mtime_ns == before
    assert "<svg" in (root / "reproduce" / "tables.html").read_text()


def test_every_test_row_has_a_prediction_of_every_model(run: tuple[Path, dict[str, Any]]) -> None:
    root, _ = run
    batches = ordered_batches(f"{root}/samples/impressions/test", ["impression_id"], 4_096)
    rows = [value for batch in batches for value in batch["impression_id"].to_pylist()]
    for variant in ("sim-base", "sim-mim", "sim-style", "din-base", "din-mim"):
        predictions = pq.read_table(root / "evaluation" / "predictions" / f"{variant}.parquet")
        assert predictions["impression_id"].to_pylist() == rows
        assert predictions["prob"].null_count == 0


def test_a_second_run_reuses_every_stage(run: tuple[Path, dict[str, Any]]) -> None:
    root, _ = run
    chain = full_pipeline(load_scenario("tiny", [f"run.root={root}", *SMALL]))
    assert chain.plan(list(chain.stages)) == []
    changed = full_pipeline(load_scenario("tiny", [f"run.root={root}", *SMALL, "csft.temperature=0.1"]))
    assert changed.plan(["ctr/sim-base", "ctr/sim-style"]) == []
    assert changed.plan(["ctr/sim-mim"]) == ["csft", "extraction", "ctr/sim-mim"]


def test_the_snapshot_names_the_encoder_that_made_it(run: tuple[Path, dict[str, Any]]) -> None:
    root, _ = run
    encoder = json.loads((root / "csft" / "encoder" / "encoder.json").read_text())
    manifest = json.loads((root / "extraction" / "artifact.json").read_text())
    snapshot = Snapshot.open(manifest["metrics"]["snapshot"])
    assert snapshot.encoder_version == encoder["encoder_version"]
    assert (
        json.loads((root / "ctr" / "sim-mim" / "ctr.json").read_text())["encoder_version"] == snapshot.encoder_version
    )


def test_without_taste_for_style_content_finds_nothing(ray_cluster: None, tmp_path: Path) -> None:
    """The negative control. `test_the_report_holds_every_figure_of_the_chain` shows that a shop of this size has the power."""
    settings = ["synthetic.style_share=0", "ciubm.variants=[sim-base, sim-mim]", "ciubm.seeds=[0, 1]"]
    settings += ["csft.num_workers=1", "csft.in_driver=true", "csft.steps=60", "csft.past_warmup_steps=50"]
    chain = pipeline(load_scenario("tiny", [f"run.root={tmp_path}", *SMALL, *settings]))
    gain = chain.run(["evaluation"])["evaluation"].metrics["differences"]["sim-mim"]["auc"]
    assert gain["low"] <= 0 <= gain["high"]


def test_a_folder_without_tables_is_refused_with_the_remedy(tmp_path: Path) -> None:
    chain = pipeline(load_scenario("tiny", [f"run.root={tmp_path}/run", f"data.root={tmp_path}"]))
    with pytest.raises(DataError, match=r"no items table.*Set data\.root"):
        chain.plan(["samples"])


def test_models_on_true_styles_need_the_synthetic_shop(tmp_path: Path) -> None:
    chain = pipeline(load_scenario("tiny", [f"data.root={tmp_path}"]))
    assert "ctr/sim-mim" in chain.stages
    assert "ctr/sim-style" not in chain.stages
    with pytest.raises(ConfigError, match="true styles are known of the synthetic shop only"):
        pipeline(load_scenario("tiny", [f"data.root={tmp_path}", "ciubm.variants=[sim-style]"]))
