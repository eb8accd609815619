"""Extraction from s3:// to s3://; Ray's workers have the credentials from their own environment."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from mim_ray import artifacts
from mim_ray.config.scenario import Extraction
from mim_ray.data.rejects import read_rejects, write_rejects
from mim_ray.data.sources import require_table
from mim_ray.data.transforms import PictureFormat
from mim_ray.extraction.read import Decoding
from mim_ray.extraction.run import extract
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.table import EmbeddingTable

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_items_on_s3_become_a_table_rejects_and_a_snapshot_on_s3_without_credentials(
    s3: Any,
    tmp_path: Path,
    make_items: Callable[..., str],
    stand_in: Callable[..., Any],
    capfd: pytest.CaptureFixture[str],
) -> None:
    make_items(tmp_path / "data", num=40, row_group_rows=20, image={3: b"broken", 4: None}, title={3: None, 5: None})
    for file in sorted((tmp_path / "data").rglob("part-*.parquet")):
        artifacts.write_bytes(f"{s3.uri}/data/{file.relative_to(tmp_path / 'data')}", file.read_bytes())
    center = f"{s3.uri}/center"
    table = EmbeddingTable(f"{center}/table").create()
    job = partial(
        extract,
        require_table(f"{s3.uri}/data", "items"),
        table,
        encoder="stand-in",
        encoder_version="v1",
        decoding=Decoding(PictureFormat(8, "squash"), 100_000, 10_000, 40, f"{s3.uri}/data"),
        settings=Extraction(shard_rows=16, batch_size=8, commit_every_s=0.1),
        rejects=f"{center}/rejects/v1",
        load=stand_in(),
    )
    done = job()
    again = job()
    assert (done.num_shards_found, again.num_shards_found) == (0, done.num_shards)
    assert write_rejects(f"{s3.uri}/rejects", "extraction", again.rejects) == {"image format": 1, "no content": 1}
    assert read_rejects(f"{s3.uri}/rejects").num_rows == 2
    assert table.current_rows("v1").num_rows == 39
    build_snapshot(table, "v1", f"{center}/snapshots/v1")
    rows = Snapshot.open(f"{center}/snapshots/v1").lookup([f"item-{number}" for number in range(40)])
    assert np.flatnonzero(rows < 0).tolist() == [3]

    written = [artifacts.read_bytes(uri) for uri in artifacts.list_files(s3.uri)]
    written += [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    logs = Path(ray._private.worker._global_node.get_logs_dir_path()).rglob("*")
    written += [path.read_bytes() for path in logs if path.is_file()]
    assert len(written) > 20
    printed = "".join(capfd.readouterr()).encode()
    assert not [content for content in [printed, *written] if s3.secret.encode() in content]
