from pathlib import Path

import pytest

from mim_ray import artifacts
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.machine_release import (
    MachineRelease,
    TableSource,
    read_shape,
    read_wanted,
    write_wanted,
)
from mim_ray.representation_center.release import promote


def test_a_promoted_release_says_what_the_machines_hold(tmp_path: Path) -> None:
    center = str(tmp_path)
    release = promote(center, encoder_version="v1", snapshot=f"{center}/snapshots/v1/s1")
    held = MachineRelease.of(center, release, id_tables={"item_id": "ids/s1"}, dense={"ctr": "ctr.safetensors"})
    assert held.release_id == "1"
    assert held.tables == {
        "mm": TableSource(f"{center}/snapshots/v1/s1", f"{center}/table", f"{center}/window"),
        "item_id": TableSource("ids/s1"),
    }
    assert MachineRelease.from_json(held.to_json()) == held


def test_what_is_wanted_is_written_after_it_was_prepared_and_keeps_the_shape(tmp_path: Path) -> None:
    state = f"{tmp_path}/state.json"
    first, second = (MachineRelease(name, {"mm": TableSource("s")}) for name in ("a", "b"))
    assert write_wanted(state, first, shape=(2, 3)) == 1

    def refuse(serial: int, release: MachineRelease) -> None:
        raise ArtifactError(f"{release.release_id} {serial}")

    with pytest.raises(ArtifactError, match="b 2"):
        write_wanted(state, second, prepare=refuse)
    assert read_wanted(state) == (1, first)
    assert write_wanted(state, second) == 2
    assert (read_wanted(state), read_shape(state)) == ((2, second), (2, 3))
    artifacts.write_json(state, {"serial": 1, "release": {}})
    with pytest.raises(ArtifactError, match="is damaged"):
        read_wanted(state)
