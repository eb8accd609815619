"""`ray start --head`, then `ray job submit --working-dir .`: what a user of a cluster types."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import pytest
import requests
import yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINIEST = (
    "synthetic.num_items=150",
    "synthetic.num_users=60",
    "synthetic.num_impressions=2000",
    "synthetic.num_image_searches=200",
    "pretraining.num_workers=1",
    "pretraining.batch_size=16",
    "pretraining.in_driver=true",  # C-SFT runs in a Train worker
    "pretraining.vision_dda_steps=2",
    "pretraining.text_dda_steps=2",
    "pretraining.dma_steps=2",
    "csft.num_workers=1",
    "csft.num_decoders=0",
    "csft.batch_size=16",
    "csft.steps=2",
)


def test_the_upload_is_small_and_leaves_environment_and_runs_behind(head):
    answer = head.submit("python", "-c", "import mim_ray; print('from', mim_ray.__file__)")
    assert answer.returncode == 0, answer.stdout
    (uploaded,) = (head.folder / "ray" / "session_latest" / "runtime_resources" / "working_dir_files").glob(
        "_ray_pkg_*/"
    )
    names = {path.name for path in uploaded.iterdir()}
    assert {"mim_ray", "jobs", "serve"} <= names
    assert not names & {".venv", ".uv", ".git", "runs"}
    size = sum(path.stat().st_size for path in uploaded.rglob("*") if path.is_file())
    assert size < 20e6, f"{size / 1e6:.1f} MB"
    assert f"from {uploaded.resolve()}" in answer.stdout, "the job must run the uploaded code"


@pytest.mark.chaos  # half a minute; the sentence itself: tests/test_artifacts.py
def test_a_submitted_job_refuses_a_relative_data_root_in_a_sentence(head):
    settings = (f"run.root={head.folder / 'refused'}", "data.root=data")
    answer = head.submit("python", "jobs/csft.py", "--config", "tiny", *settings)
    assert answer.returncode != 0
    assert "ConfigError: data is a relative path, but a submitted job runs in an uploaded copy" in answer.stdout
    assert "Traceback" not in answer.stdout


@pytest.fixture(scope="module")
def finished_run(head):
    """The root of a run whose stages were made by a submitted job."""
    root = head.folder / "run"
    settings = (f"run.root={root}", *TINIEST, "ciubm.variants=[din-mim]")
    answer = head.submit("python", "jobs/train_ciubm.py", "--config", "tiny", *settings)
    assert answer.returncode == 0, answer.stdout[-6000:]
    return root


def test_a_submitted_job_runs_its_stage_and_what_it_needs(finished_run):
    for stage in ("shop", "samples", "pretraining", "csft", "extraction", "ctr/din-mim"):
        assert (finished_run / stage / "artifact.json").is_file(), stage
    assert (finished_run / "csft" / "encoder" / "encoder.json").is_file()


@pytest.fixture(scope="module")
def url(head):
    """Serve without apps yet, on a port of its own (`serve run` alone takes 8000)."""
    port = str(head.free_port())
    answer = head.run("serve", "start", "--address", head.address, "--http-host", "127.0.0.1", "--http-port", port)
    assert answer.returncode == 0, answer.stdout
    return f"http://127.0.0.1:{port}"


@pytest.mark.chaos  # half a minute; serve deploy starts the same apps below
def test_serve_run_serves_what_a_submitted_job_made(head, finished_run, url):
    arguments = ("config=tiny", f"run.root={finished_run}", "ciubm.variants=[din-mim]")
    command = ("serve", "run", "--non-blocking", "--address", head.address, "serve.ranking:app", *arguments)
    answer = head.run(*command)
    assert answer.returncode == 0, answer.stdout[-6000:]
    ranked = requests.post(f"{url}/v1/rank", json={"user_id": "nobody", "candidates": ["a", "b"]}, timeout=30)
    assert ranked.status_code == 200, ranked.text
    assert ranked.json()["model_version"].startswith("din-mim-")
    assert len(ranked.json()["items"]) == 2


def test_serve_deploy_of_the_configuration_file_serves_both_apps(head, finished_run, url):
    config = yaml.safe_load((head.checkout / "serve" / "app.yaml").read_text())
    config["http_options"]["port"] = int(url.rpartition(":")[2])
    for app in config["applications"]:
        app["args"] |= {"run.root": str(finished_run), "ciubm.variants": ["din-mim"]}
    (head.checkout / "here.yaml").write_text(yaml.safe_dump(config))
    answer = head.run("serve", "deploy", "--address", head.dashboard, "here.yaml")
    assert answer.returncode == 0, answer.stdout[-6000:]
    for path in ("/readyz", "/v1/items/readyz"):
        wait_for(f"{url}{path}", lambda: head.run("serve", "status", "--address", head.dashboard).stdout)
    posted = requests.post(f"{url}/v1/items", json={"item_id": "new", "title": "a mug"}, timeout=30)
    assert posted.json()["items"][0]["rankable"], posted.text
    ranked = requests.post(f"{url}/v1/rank", json={"user_id": "nobody", "candidates": ["new"]}, timeout=30)
    assert ranked.json()["items"][0]["unknown_item"]


def wait_for(address: str, status: Callable[[], str], patience_s: float = 240) -> None:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.RequestException):
            if requests.get(address, timeout=10).status_code == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"{address} does not answer: {status()[-4000:]}")


def test_serve_run_tells_a_mistake_in_a_sentence(head):
    arguments = ("--non-blocking", "--address", head.address, "serve.ranking:app", "run.root=/nowhere/at/all")
    answer = head.run("serve", "run", *arguments)
    assert answer.returncode != 0
    assert "ArtifactError: /nowhere/at/all/extraction holds no finished extraction" in answer.stdout
    assert "Traceback" not in answer.stdout
