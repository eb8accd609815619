import shlex
import socket
import subprocess
from pathlib import Path

import pytest

from mim_ray.config import load_scenario
from mim_ray.errors import ArtifactError, ConfigError
from mim_ray.pipeline.cli import serve_main
from mim_ray.pipeline.layout import Layout
from mim_ray.pipeline.live_check import UnseenItem
from mim_ray.pipeline.serve_run import _check_port, requests_to_try, serve_run
from mim_ray.serving.keys import new_key


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


@pytest.mark.parametrize("with_keys", [True, False])
def test_where_keys_are_set_the_printed_lines_send_the_callers(tmp_path, monkeypatch, with_keys):
    monkeypatch.delenv("MIM_RAY_API_KEYS", raising=False)
    monkeypatch.setattr("mim_ray.pipeline.serve_run.unseen_item", lambda *_: UnseenItem("new", "a mug", None, None))
    monkeypatch.setattr("mim_ray.pipeline.serve_run.a_user", lambda *_: ("u1", [], ["i1"]))
    settings = [f"run.root={tmp_path}"]
    if with_keys:
        (tmp_path / "keys").write_text(new_key("shop", ["rank", "write"])[1])
        settings.append(f"serving.keys_file={tmp_path}/keys")
    scenario = load_scenario("tiny", settings)
    requests = requests_to_try(scenario, Layout.of(scenario), "http://127.0.0.1:8000", tmp_path)
    assert len(requests) == 3
    for request in requests:
        pasted = f"curl() {{ printf '%s\\n' \"$@\"; }}; {request.line}"
        sent = subprocess.run(["bash", "-c", pasted], env={"MIM_RAY_KEY": "mim_x y"}, capture_output=True, text=True)
        assert ("Authorization: Bearer mim_x y" in sent.stdout.splitlines()) == with_keys, sent


def test_make_serve_runs_this_job_on_the_demos_folder():
    root = Path(__file__).parents[2]
    (line,) = [line for line in (root / "Makefile").read_text().splitlines() if "jobs/serve_run.py" in line]
    assert shlex.split(line)[-2:] == ["jobs/serve_run.py", "serving.port=$(PORT)"]
    assert '"run.root=runs/demo"' in (root / "jobs" / "serve_run.py").read_text()
    assert '"run.root=runs/demo"' in (root / "jobs" / "demo.py").read_text()
