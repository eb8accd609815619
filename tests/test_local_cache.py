"""What nobody has used for a month leaves the cache folder; what is in use stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mim_ray.local_cache import UNUSED_S, cache_folder, drop_unused, note_use


def test_the_folder_is_the_environments_else_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_RAY_CACHE", "/fast/disk")
    assert cache_folder() == Path("/fast/disk")
    monkeypatch.delenv("MIM_RAY_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "mim_ray"


def test_files_and_folders_that_were_not_used_for_a_month_are_dropped(tmp_path: Path) -> None:
    for name in ("used", "unused"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text(name)
        (tmp_path / f"{name}.arrow").write_text(name)
    long_ago = time.time() - UNUSED_S - 60
    for path in tmp_path.iterdir():
        os.utime(path, (long_ago, long_ago))
    note_use(tmp_path / "used")
    note_use(tmp_path / "used.arrow")
    note_use(tmp_path / "never there")
    mapped = (tmp_path / "unused.arrow").open()
    drop_unused([*tmp_path.iterdir(), tmp_path / "never there"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["used", "used.arrow"]
    assert (tmp_path / "used" / "part").read_text() == "used"
    assert mapped.read() == "unused", "who has it open keeps it"
    mapped.close()
