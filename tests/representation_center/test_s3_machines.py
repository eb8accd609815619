"""Parameter machines whose state, snapshot, table and window are on s3://."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mim_ray import artifacts
from mim_ray.config.scenario import ParameterMachines as Settings
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.machine_release import MachineRelease, TableSource
from mim_ray.representation_center.parameter_machines import ParameterMachines
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import append_segment, segment_rows

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

START = datetime(2025, 1, 1, tzinfo=UTC)
IDS = [f"i{number}" for number in range(100)]


def rows(ids: list[str], value: float, day: int) -> Any:
    at = [START + timedelta(days=day)] * len(ids)
    return segment_rows(ids, np.full((len(ids), 4), value, np.float32), content_hashes=["h"] * len(ids), content_at=at)


def test_machines_answer_from_s3_follow_the_window_and_switch(s3: Any, tmp_path: Path) -> None:
    center = f"{s3.uri}/center"
    table = EmbeddingTable(f"{center}/table").create()

    def release(name: str, value: float, day: int) -> MachineRelease:
        table.append(rows(IDS, value, day), encoder_version="v1", shard_id=name)
        snapshot = build_snapshot(table, "v1", f"{center}/snapshots/v1")
        artifacts.write_tensors(f"{center}/{name}.safetensors", {"weight": torch.full((3,), value)})
        source = TableSource(snapshot.uri, table.uri, f"{center}/window")
        return MachineRelease(name, {"mm": source}, {"ctr": f"{center}/{name}.safetensors"})

    settings = Settings(
        shards=2, replicas=1, cpus_per_machine=0, folder=str(tmp_path / "machines"), deadline_ms=30_000, freshness_s=30
    )
    machines = ParameterMachines.start(f"{s3.uri}/machines/state.json", release("one", 1.0, 0), settings)
    try:
        client = machines.client()
        answer = client.multi_get([*IDS, "unknown"])
        assert answer.matrix[:, 0].tolist() == [1.0] * 100 + [0.0]
        assert answer.found.tolist() == [True] * 100 + [False]
        append_segment(f"{center}/window", rows(["i3", "new"], 7.0, 5), encoder_version="v1")
        deadline = time.monotonic() + 60
        while client.multi_get(["i3", "new"]).matrix[:, 0].tolist() != [7.0, 7.0]:
            assert time.monotonic() < deadline, "the machines do not see the message"
            time.sleep(0.05)
        machines.load(release("two", 2.0, 1))
        answer = client.multi_get(["i3", "i4", "new"])
        assert (answer.matrix[:, 0].tolist(), answer.release) == ([7.0, 2.0, 7.0], "two")
        assert len(client.dense("ctr")) > 12
    finally:
        machines.stop()
