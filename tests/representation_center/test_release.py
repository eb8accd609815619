"""mim_ray/representation_center/release.py."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mim_ray.errors import ArtifactError, VersionMismatchError
from mim_ray.representation_center.release import check_versions, promote, read_release, releases, roll_back


@pytest.fixture(params=["local", "s3"])
def center(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.getfixturevalue('s3').uri}/center" if request.param == "s3" else str(tmp_path)


def test_promotion_switches_and_roll_back_returns(center: str) -> None:
    assert read_release(center) is None
    with pytest.raises(ArtifactError, match="no release before"):
        roll_back(center)
    first = promote(center, encoder_version="v1", snapshot="s1", ctr_model="m1", encoder="e1")
    with pytest.raises(ArtifactError, match="no release before"):
        roll_back(center)
    second = promote(center, encoder_version="v2", snapshot="s2")
    assert read_release(center) == second
    back = roll_back(center)
    assert (back.encoder_version, back.snapshot, back.ctr_model, back.encoder) == ("v1", "s1", "m1", "e1")
    assert (back.number, back.same_as) == (3, 1)
    assert read_release(center) == back
    assert roll_back(center).encoder_version == "v2"
    assert roll_back(center, first.number).same_as == 1
    assert [entry.encoder_version for entry in releases(center)] == ["v1", "v2", "v1", "v2", "v1"]
    with pytest.raises(ArtifactError, match=r"no release 9 \(it has 5\)"):
        roll_back(center, 9)


def test_a_damaged_log_of_releases_is_a_sentence(tmp_path: Path) -> None:
    promote(str(tmp_path), encoder_version="v1", snapshot="s1")
    for file in (tmp_path / "releases").glob("*.parquet"):
        file.write_bytes(b"no parquet")
    with pytest.raises(ArtifactError, match=r"is damaged .* promote a release again"):
        read_release(str(tmp_path))


def _promoter(center: str, name: str, count: int) -> None:
    for number in range(count):
        promote(center, encoder_version=f"{name}-{number}", snapshot=name)


def test_promoters_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    names = ["a", "b", "c"]
    promoters = [context.Process(target=_promoter, args=(str(tmp_path), name, 5)) for name in names]
    for process in promoters:
        process.start()
    for process in promoters:
        process.join()
        assert process.exitcode == 0
    found = releases(str(tmp_path))
    assert [release.number for release in found] == list(range(1, 16))
    for name in names:
        assert [r.encoder_version for r in found if r.snapshot == name] == [f"{name}-{n}" for n in range(5)]


def test_a_roll_back_does_not_run_over_a_promotion_that_came_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mim_ray.representation_center import release

    center = str(tmp_path)
    promote(center, encoder_version="v1", snapshot="s")
    stale = promote(center, encoder_version="v2", snapshot="s")
    promote(center, encoder_version="v3", snapshot="s")
    monkeypatch.setattr(release, "read_release", lambda _: stale)
    with pytest.raises(ArtifactError, match=r"Meanwhile release 3 \(v3\) was promoted.*Nothing was changed"):
        roll_back(center)
    assert releases(center)[-1].encoder_version == "v3"


KILLED = """
import os, signal, sys
from mim_ray.representation_center import release
center, when = sys.argv[1:]
commit = release.write_deltalake
def killed(*args, **options):
    if when == "after":
        commit(*args, **options)
    os.kill(os.getpid(), signal.SIGKILL)
release.write_deltalake = killed
release.promote(center, encoder_version="new", snapshot="s")
"""


@pytest.mark.parametrize(("when", "expected"), [("before", "old"), ("after", "new")])
def test_a_kill_leaves_the_old_or_the_new_release(tmp_path: Path, when: str, expected: str) -> None:
    center = str(tmp_path)
    promote(center, encoder_version="old", snapshot="s")
    process = subprocess.run([sys.executable, "-c", KILLED, center, when], env=os.environ, timeout=60)
    assert process.returncode == -signal.SIGKILL
    current = read_release(center)
    assert current is not None
    assert current.encoder_version == expected
    assert promote(center, encoder_version="next", snapshot="s").number == (3 if when == "after" else 2)


def test_a_center_may_be_moved(tmp_path: Path) -> None:
    promote(str(tmp_path / "a"), encoder_version="v1", snapshot="s")
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = read_release(str(tmp_path / "b"))
    assert moved is not None


def test_a_version_mismatch_names_both() -> None:
    check_versions("v1", "v1", expected_by="Model m", found_in="snapshot s")
    with pytest.raises(VersionMismatchError, match=r"Model m .* v1, but snapshot s holds v2"):
        check_versions("v1", "v2", expected_by="Model m", found_in="snapshot s")
