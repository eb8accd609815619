"""jobs/refresh.py as a process: rounds with a real encoder, a second one beside it, mistakes as sentences."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_ray.config import load_scenario
from mim_ray.encoders.item_encoder import ItemEncoder
from mim_ray.encoders.tokenizer import train_tokenizer
from mim_ray.errors import ConfigError
from mim_ray.pipeline.refresh import main

ROOT = Path(__file__).parents[2]


def job(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "jobs/refresh.py"), "--config", "tiny", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def line_with(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return line
    raise AssertionError("".join(seen))


@pytest.mark.chaos  # a minute
def test_rounds_follow_the_catalogue_and_a_second_job_leaves_with_a_sentence(tmp_path: Path) -> None:
    titles = [f"a red shoe {number}" for number in range(30)]
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.table({"item_id": [f"item-{n}" for n in range(30)], "title": titles}), folder / "items.parquet")
    settings = load_scenario("tiny").encoders
    encoder = ItemEncoder.build(settings, train_tokenizer(titles, settings.text.vocabulary_size), seed=0)
    encoder.save(f"{tmp_path}/run/csft/encoder", stage="csft")
    places = [f"run.root={tmp_path}/run", f"data.root={folder}", "run.num_cpus=1"]
    running = job("--every", "1s", *places)
    try:
        assert "new 30, changed 0, deleted 0" in line_with(running, "| encoded")
        second = job(*places)
        output, _ = second.communicate(timeout=60)
        assert second.returncode == 0, output
        assert f"Another refresh is running: process {running.pid} on " in output
        assert "Traceback" not in output
        changed = pa.table({"item_id": [f"item-{n}" for n in range(1, 31)], "title": ["new", *titles[2:], "other"]})
        pq.write_table(changed, folder / "items.parquet")
        assert "new 1, changed 1, deleted 1, unchanged 28" in line_with(running, "changed 1")
        (folder / "items.parquet").write_bytes(b"no parquet")
        assert "cannot be read as Parquet" in line_with(running, "nothing done")
        pq.write_table(changed, folder / "items.parquet")
        line_with(running, "unchanged 30")
    finally:
        running.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        running.kill()
    assert running.returncode == 130
    assert not list((tmp_path / "run/center/refresh").rglob("lease/*.json"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--every", "soon"], "--every soon is no duration. Give a number with a unit: 60s, 5min, 2h."),
        (["--every", "60s", "--full"], "--full compares the whole catalogue"),
        (["refresh.warm_row=3"], "did you mean 'refresh.warm_rows'"),
        (["run.root=/nowhere/run", "data.root=/nowhere"], "/nowhere/run/csft/encoder/encoder.json is not there"),
    ],
)
def test_mistakes_are_sentences(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main("", arguments)
    assert left.value.code == 2
    assert sentence in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main("Refresh.", ["--help"])
    assert "--every DURATION" in capsys.readouterr().out
    assert issubclass(ConfigError, ValueError)
