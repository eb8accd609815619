"""The extraction's benchmark with tiny sizes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The benchmark's files by name, imported as its command does: their folder comes first on the path."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("measuring", "extraction_data", "extraction_sides", "extraction_memory", "extraction")
    return {name: __import__(name) for name in names}


def test_the_workload_is_the_same_each_time(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    data = modules["extraction_data"]
    assert data.jpeg(3) == data.jpeg(3) != data.jpeg(4)
    made = data.make(tmp_path, 3)
    (file,) = Path(made.items).glob("*.parquet")
    rows = pq.read_table(file)
    assert rows["image"].to_pylist() == [data.jpeg(row) for row in range(3)]
    before = file.stat().st_mtime_ns
    assert data.make(tmp_path, 3) == made
    assert file.stat().st_mtime_ns == before


@pytest.mark.slow
def test_both_sides_make_the_same_embeddings(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    data, sides = modules["extraction_data"], modules["extraction_sides"]
    made = data.make(tmp_path, 3)
    sides._start_worker(made.encoder)
    path = next(str(path) for path in Path(made.items).glob("*.parquet"))
    ids, vectors = sides._do_group((path, 0, True))
    assert ids == [f"item-{row:09d}" for row in range(3)]
    from mim_ray.extraction.embed import embed, load_encoder
    from mim_ray.extraction.plan import plan
    from mim_ray.extraction.read import Decoding, ShardReader

    (unit,) = plan(made.items, 64, []).units(set())
    decoding = Decoding(sides._WORKER["picture"], 10**6, 10**6, 10, "/nowhere")
    (block,) = ShardReader(unit, decoding, None, 16).read(unit.slices[0])
    ours = np.array(embed(block, load_encoder(made.encoder, False), 224)["embedding"].to_pylist())
    np.testing.assert_allclose(ours, vectors, atol=1e-5)


def test_seconds_count_from_when_all_are_ready(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("100.0 ready\n100.0 104.0 10\n104.0 108.0 10\n")
    (tmp_path / "b").write_text("102.0 ready\n102.0 108.0 10\n")
    found = modules["extraction_sides"]._since_all_are_ready(tmp_path, 108.0, 30)
    assert found.seconds == pytest.approx(6.0 * 30 / 25)  # half of the first batch came before


def test_summed_memory_is_of_the_process_and_its_children(modules: dict[str, ModuleType]) -> None:
    memory = modules["extraction_memory"]
    program = "data = bytearray(b'x') * (64 * 2**20); print('there', flush=True); input()"
    before = memory.summed_pss(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "there\n"
    grown = memory.summed_pss(os.getpid()) - before
    child.communicate("\n")
    assert 60 * 2**20 < grown < 120 * 2**20


def test_report_has_every_key_and_its_table_tells_a_missed_goal(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Side:
        def __init__(self, name: str, encoder: str, cores: int) -> None:
            self.name = name

        def wait(self) -> None:
            pass

        def seconds(self, items: str, encode: bool) -> float:
            return {"extract": 2.0, "process_pool": 1.7, "daft": 4.0, "daft_threads": 3.0}[self.name]

        def close(self) -> None:
            pass

    monkeypatch.setattr(modules["extraction_sides"], "Side", Side)
    main = modules["extraction"]
    small = main.Plan(num_items=2, decode_items=2, rounds=2, cores=1, quick=True, work=tmp_path, only="speed")
    monkeypatch.setattr(main.Plan, "quickly", classmethod(lambda cls, cores, work: small))
    assert main.main(["--quick", "--check", "--json", str(tmp_path / "new" / "report.json")]) == 1
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["vs_process_pool"] == report["decode_vs_process_pool"] == 0.85
    assert report["goals"]["vs_process_pool"] == {"goal": ">= 0.9", "met": False}
    assert re.search(r"vs_process_pool +0.85 +>= 0.9 +NO", capsys.readouterr().out)
    assert report["pss_10m_over_100k"] is None
    assert "pss_10m_over_100k" not in report["goals"]
    if report["vs_daft"] is not None:  # a peer that is not installed is not measured
        assert report["goals"]["vs_daft"] == {"goal": ">= 1", "met": True}
        assert (report["vs_daft"], report["details"]["vs_daft"]["way"]) == (
            1.5,
            "daft_threads",
        )  # the faster of the two
    assert {"cpu", "cpus", "versions", "command", "measured_at", "git_commit"} <= set(report["machine"])
