import shlex
import socket
from pathlib import Path

import pytest

from mim_ray.config import load_scenario
from mim_ray.errors import ArtifactError, ConfigError
from mim_ray.pipeline.cli import serve_main
from mim_ray.pipeline.serve_run import _check_port, serve_run


def test_before_the_demo_a_sentence_says_what_to_run(tmp_path, capsys):
    with pytest.raises(ArtifactError, match="Run make demo first"):
        serve_run(load_scenario("tiny", [f"run.root={tmp_path}/demo"]))
    with pytest.raises(SystemExit) as ended:
        serve_main("doc", [f"run.root={tmp_path}/demo"])
    assert ended.value.code == 2
    assert "Run make demo first" in capsys.readouterr().err
    assert not (tmp_path / "demo" / "serve").exists()


def test_a_taken_port_is_told_before_anything_starts():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"serving.port = {port} .* make serve PORT="):
            _check_port("127.0.0.1", port)
    _check_port("127.0.0.1", port)
    _check_port("127.0.0.1", 0)


def test_make_serve_runs_this_job_on_the_demos_folder():
    root = Path(__file__).parents[2]
    (line,) = [line for line in (root / "Makefile").read_text().splitlines() if "jobs/serve_run.py" in line]
    assert shlex.split(line)[-2:] == ["jobs/serve_run.py", "serving.port=$(PORT)"]
    assert '"run.root=runs/demo"' in (root / "jobs" / "serve_run.py").read_text()
    assert '"run.root=runs/demo"' in (root / "jobs" / "demo.py").read_text()
