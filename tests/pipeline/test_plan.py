"""mim_ray/pipeline/plan.py, rates.py and jobs/plan.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mim_ray.pipeline.plan import Needs, plan
from mim_ray.pipeline.plan_cli import main
from mim_ray.pipeline.rates import Rate, load_rates


def rates(**values: float) -> dict[str, Rate]:
    return {name: Rate(value, "unit", "note", "a machine") for name, value in values.items()}


RATES = rates(
    encode_items_per_s_per_core=10,
    decode_items_per_s_per_core=200,
    log_compacted_bytes_fixed=40,
    log_compacted_bytes_per_value=4,
    snapshot_float16_bytes_fixed=44,
    snapshot_float16_bytes_per_value=2,
    mapped_float16_bytes_fixed=36,
    mapped_float16_bytes_per_value=2,
    commit_s=0.01,
    commit_s_per_file=1e-6,
    open_log_s_per_file=1e-5,
    compaction_rows_per_s=100_000,
    build_rows_per_s=200_000,
)


def figures(needs: Needs, known: dict[str, Rate] = RATES) -> dict[str, float | None]:
    found, _ = plan(needs, known)
    return {f"{figure.group}: {figure.name}": figure.value for figure in found}


def value(found: dict[str, float | None], name: str) -> float | None:
    (match,) = [figure for key, figure in found.items() if key.endswith(f": {name}")]
    return match


def test_the_figures_by_hand() -> None:
    """3.6 M items of width 128: 100 hours of one core, 1 hour of a GPU that does 1,000 a second."""
    found = figures(
        Needs(3.6e6, gpu_rate=1_000, gpus=2, cores=50, replicas=3, machine_memory_gb=1, price=10, gpu_price=4)
    )
    key = "Encoding all items (MFM)"
    assert found[f"{key}: core-hours, on CPUs only"] == pytest.approx(100)
    assert found[f"{key}: hours with 50 cores"] == pytest.approx(2)
    assert found[f"{key}: GPU-hours"] == pytest.approx(1)
    assert found[f"{key}: hours with 2 GPUs"] == pytest.approx(0.5)
    assert value(found, "cores that decode for one GPU") == pytest.approx(5)
    assert value(found, "log, bytes per item") == pytest.approx(40 + 4 * 128)
    assert value(found, "log") == pytest.approx(3.6e6 * 552 / 1e9)
    assert value(found, "snapshots") == pytest.approx(3 * 3.6e6 * 300 / 1e9)
    assert value(found, "shards") == 3_516
    assert value(found, "commits") == pytest.approx(360)  # half an hour, one every 5 s
    assert value(found, "one commit, log never compacted") == pytest.approx(0.01 + 3_516e-6)
    assert value(found, "times a row is rewritten by compaction") == 5  # 4^4 < 360 <= 4^5
    assert value(found, "compaction, core-hours in all") == pytest.approx(5 * 3.6e6 / 100_000 / 3_600)
    assert value(found, "building a snapshot, one process") == pytest.approx(3.6e6 / 200_000 / 3_600)
    assert value(found, "mapped bytes per item") == pytest.approx(36 + 256)
    assert value(found, "the paper's bytes per item") == pytest.approx(211.27, abs=0.01)
    assert value(found, "3 replicas") == pytest.approx(3 * 3.6e6 * 292 / 1e9)
    assert value(found, "machines") == 4  # 3.15 GB in 0.8 GB each
    assert value(found, "storage per month") == pytest.approx((2 * 3.6e6 * 552 + 3 * 3.6e6 * 300) / 1e9 * 10)
    assert value(found, "encoding all items on gpus") == pytest.approx(4)
    refresh = next(key for key in found if key.endswith(": items"))
    assert found[refresh] == pytest.approx(36_000)


def test_the_paper_s_table_stands_beside_ours() -> None:
    found = figures(Needs(1.42e9))
    assert value(found, "the paper's table") == pytest.approx(300)
    assert value(found, "one copy of the table") == pytest.approx(1.42 * 292)


def test_what_is_neither_measured_nor_given_is_missing_and_says_what_would_give_it() -> None:
    found, used = plan(Needs(1e6, gpus=4, core_price=1.0), rates(commit_s=1))
    missing = {f"{figure.group}: {figure.name}": figure.basis for figure in found if figure.value is None}
    assert any("GPU-hours" in name and "--gpu-rate" in basis for name, basis in missing.items())
    assert any("core-hours" in name and "--core-rate" in basis for name, basis in missing.items())
    assert any("hours with 4 GPUs" in name for name in missing)
    assert set(used) == {"commit_s"}
    assert not any("gpu" in name for name in load_rates())  # no GPU was measured: no rate of one may be shipped


def test_a_given_rate_replaces_the_measured_one_and_the_plan_says_so() -> None:
    found, used = plan(Needs(3.6e6, core_rate=20), RATES)
    (figure,) = [figure for figure in found if figure.name == "core-hours, on CPUs only" and "MFM" in figure.group]
    assert (figure.value, figure.basis) == (pytest.approx(50), "items ÷ --core-rate (yours)")
    assert "encode_items_per_s_per_core" not in used


def test_shipped_rates_name_machine_date_and_command() -> None:
    shipped = load_rates()
    assert {"build_rows_per_s", "log_compacted_bytes_fixed", "mapped_int8_bytes_per_value"} <= set(shipped)
    for rate in shipped.values():
        assert "cores" in rate.source
        assert "python benchmarks/" in rate.source
        assert "/tmp" not in rate.source
        assert rate.value >= 0


def test_the_job_prints_figures_and_the_rates_behind_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = {
        "rates": {"encode_items_per_s_per_core": {"value": 123.0, "unit": "items/s", "note": "mine"}},
        "machine": {"cpu": "My CPU", "cpus": 8, "measured_at": "2026-01-02T00:00", "command": "python benchmarks/x.py"},
    }
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    saved = str(tmp_path / "saved.json")
    command = ["--items", "1e8", "--rates", str(tmp_path / "mine.json"), "--json", str(tmp_path / "plan.json")]
    main("doc", [*command, "--save-rates", saved, "extraction.shard_rows=1000"])
    out = capsys.readouterr().out
    assert "100,000,000 items" in out
    assert "My CPU, 8 cores, 2026-01-02, python benchmarks/x.py" in out
    assert "encode_items_per_s_per_core = 123 items/s" in out
    assert "100,000 " in out.replace("  ", " ")  # shards of 1,000 rows
    assert json.loads((tmp_path / "plan.json").read_text())["needs"]["shard_rows"] == 1000
    assert load_rates([saved])["encode_items_per_s_per_core"].source.startswith("My CPU")


def test_the_extraction_benchmark_s_report_gives_rates_by_core(tmp_path: Path) -> None:
    report = {
        "benchmark": "extraction",
        "details": {
            "vs_process_pool": {"mim_ray_items_per_s": 120.0, "items": 8_000},
            "decode_vs_process_pool": {"mim_ray_items_per_s": 2_000.0, "items": 20_000},
        },
        "machine": {"cpu": "C", "cpus": 8, "threads": 4, "command": "python benchmarks/extraction.py"},
    }
    (tmp_path / "extraction.json").write_text(json.dumps(report))
    found = load_rates([str(tmp_path / "extraction.json")])
    assert found["encode_items_per_s_per_core"].value == pytest.approx(30)
    assert found["decode_items_per_s_per_core"].value == pytest.approx(500)
    assert "the job on 4 cores" in found["encode_items_per_s_per_core"].note


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--items", "-1"], "--items = -1 must be a number above 0"),
        (["--items", "nan"], "--items = nan must be a number above 0"),
        (["--items", "5", "--change-ratio", "2"], "must be at most 1"),
        (["--items", "5", "--gpu-rate", "0", "--gpus", "0"], "--gpus = 0 must be"),
        (["--items", "5", "--rates", "/none.json"], "/none.json cannot be read"),
        (["--items", "5", "--rates", __file__], "is no JSON"),
        (["--items", "5", "encoders.widht=3"], "did you mean 'encoders.width'"),
    ],
)
def test_a_mistake_is_a_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as met:
        main("doc", arguments)
    assert met.value.code == 2
    assert sentence in capsys.readouterr().err
