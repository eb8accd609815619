"""`ray start --head`, then `ray job submit --working-dir .`: what a user of a cluster types."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINIEST = (
    "synthetic.num_items=150",
    "synthetic.num_users=60",
    "synthetic.num_impressions=2000",
    "synthetic.num_image_searches=200",
    "pretraining.num_workers=1",
    "pretraining.batch_size=16",
    "pretraining.vision_dda_steps=2",
    "pretraining.text_dda_steps=2",
    "pretraining.dma_steps=2",
    "csft.num_workers=1",
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


def test_a_submitted_job_runs_csft_and_what_it_needs(head):
    root = head.folder / "run"
    answer = head.submit("python", "jobs/csft.py", "--config", "tiny", f"run.root={root}", *TINIEST)
    assert answer.returncode == 0, answer.stdout[-6000:]
    assert "C-SFT" in answer.stdout
    assert (root / "csft" / "encoder" / "encoder.json").is_file()
    assert (root / "csft" / "artifact.json").is_file()


def test_a_submitted_job_refuses_a_relative_root_in_a_sentence(head):
    for setting in ("run.root=runs/here", "data.root=data"):
        answer = head.submit("python", "jobs/csft.py", "--config", "tiny", setting)
        assert answer.returncode != 0
        path = setting.partition("=")[2]
        assert f"ConfigError: {path} is a relative path, but a submitted job runs in an uploaded copy" in answer.stdout
        assert "Traceback" not in answer.stdout
