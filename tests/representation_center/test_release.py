"""mim_ray/representation_center/release.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from mim_ray.errors import ArtifactError, VersionMismatchError
from mim_ray.representation_center.release import check_versions, promote, read_release, roll_back


def test_promotion_switches_and_roll_back_returns(tmp_path: Path) -> None:
    center = str(tmp_path)
    assert read_release(center) is None
    first = promote(center, encoder_version="v1", snapshot="s1", ctr_model="m1")
    with pytest.raises(ArtifactError, match="no release before"):
        roll_back(center)
    second = promote(center, encoder_version="v2", snapshot="s2")
    assert read_release(center) == second
    assert roll_back(center) == first
    assert read_release(center) == first
    assert roll_back(center) == second


def test_a_damaged_release_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "current.json").write_text('{"current": {"x": 1}}')
    with pytest.raises(ArtifactError, match="damaged"):
        read_release(str(tmp_path))


def test_a_version_mismatch_names_both() -> None:
    check_versions("v1", "v1", expected_by="Model m", found_in="snapshot s")
    with pytest.raises(VersionMismatchError, match=r"Model m .* v1, but snapshot s holds v2"):
        check_versions("v1", "v2", expected_by="Model m", found_in="snapshot s")
