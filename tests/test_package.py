import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mim_ray.config import load_scenario

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("jobs/*.py"), *ROOT.glob("serve/*")])


def commands(pattern: str) -> list[tuple[str, str]]:
    return [
        (document.name, match)
        for document in DOCUMENTS
        if document.is_file()
        for match in re.findall(pattern, document.read_text())
    ]


def test_importing_starts_nothing_and_loads_no_library() -> None:
    code = (
        "import sys, threading, mim_ray; print(threading.active_count(), 'ray' in sys.modules, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert out.stdout.split() == ["1", "False", "False"]


def test_the_wheel_builds_with_its_scenarios_inside(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"mim_ray/config/scenarios/tiny.yaml", "mim_ray/pipeline/measured_rates.json"} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "mim_ray").rglob("*.py")} <= names
    assert not any(name.startswith(("tests/", "jobs/", "runs/")) for name in names)


def test_every_documented_script_and_target_exists() -> None:
    scripts = commands(r"python ((?:jobs|benchmarks)/\w+\.py)")
    assert len(scripts) > 5
    missing = [(document, script) for document, script in scripts if not (ROOT / script).is_file()]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    missing += [
        (document, target) for document, target in commands(r"(?m)(?:^|`)make ([a-z]+)") if target not in targets
    ]
    assert missing == []


def test_every_documented_setting_is_accepted() -> None:
    lines = commands(r"--config (\w+)((?: +'?[a-z_]+\.[a-z_]+=(?:\[[^\]]*\]|[^\s'`]+)'?)*)")
    assert len(lines) > 5
    for _, (config, settings) in lines:
        load_scenario(config, re.findall(r"[a-z_]+\.[a-z_]+=(?:\[[^\]]*\]|[^\s'`]+)", settings))


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "jobs").glob("*.py")))
def test_every_job_teaches_with_help(script: str) -> None:
    command = [sys.executable, str(ROOT / "jobs" / script), "--help"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--config" in out.stdout
    assert f"python jobs/{script}" in out.stdout


def test_the_lock_pins_every_package_and_names_no_address() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
    assert len(lines) > 50
    assert all(re.match(r"[A-Za-z0-9._-]+==\S+", line) for line in lines)
    assert not any("://" in line or line.startswith("-") for line in lines)
