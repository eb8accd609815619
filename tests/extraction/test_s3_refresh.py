"""Refresh of a catalogue on s3:// into a center on s3://."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deltalake
import pyarrow as pa
import pytest

from mim_ray.config.scenario import Extraction, Refresh
from mim_ray.data.schema import ITEMS
from mim_ray.data.transforms import PictureFormat
from mim_ray.extraction.pool import EncoderPool
from mim_ray.extraction.read import Decoding
from mim_ray.extraction.refresh import Refresher
from mim_ray.extraction.run import encoder_pool
from mim_ray.object_store import delta_options
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.runtime.lease import LeaseTakenError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def items(first: int, stop: int, text: str) -> pa.Table:
    columns = {"item_id": [f"i{n}" for n in range(first, stop)], "title": [f"{text} {n}" for n in range(first, stop)]}
    return pa.table({name: pa.array(values, ITEMS.schema.field(name).type) for name, values in columns.items()})


def test_rounds_find_what_changed_on_s3_and_a_second_refresh_leaves(s3: Any, stand_in: Callable[..., Any]) -> None:
    catalogue, center, options = f"{s3.uri}/data/items", f"{s3.uri}/center", delta_options(s3.uri)
    deltalake.write_deltalake(catalogue, items(0, 30, "title"), storage_options=options)

    settings = Extraction(num_actors=1, cpus_per_actor=0.25, shard_rows=20, batch_size=10, commit_every_s=0.1)

    def refresher(pool: EncoderPool) -> Refresher:
        return Refresher(
            catalogue,
            center,
            encoder="stand-in",
            encoder_version="v1",
            decoding=Decoding(PictureFormat(8, "squash"), 100_000, 10_000, 40, f"{s3.uri}/data"),
            settings=settings,
            refresh=Refresh(snapshot_every_s=0),
            rejects=f"{s3.uri}/rejects",
            pool=pool,
        )

    with encoder_pool("stand-in", settings, stand_in()) as pool:
        with refresher(pool) as first:
            done = first.round()
            assert (done.new, done.changed, done.deleted, done.built) == (30, 0, 0, True)
            with pytest.raises(LeaseTakenError), refresher(pool):
                pass
            table = deltalake.DeltaTable(catalogue, storage_options=options)
            table.delete("item_id = 'i3'")
            table.update(predicate="item_id = 'i4'", new_values={"title": "changed"})
            deltalake.write_deltalake(table, items(30, 32, "title"), mode="append")
            done = first.round()
            assert (done.new, done.changed, done.deleted) == (2, 1, 1)
        with refresher(pool) as again:
            done = again.round()
            assert (done.new, done.changed, done.deleted, done.built) == (0, 0, 0, False)
    snapshot = Snapshot.open(f"{center}/snapshots/v1")
    assert (snapshot.lookup(["i3", "i4", "i31"]) >= 0).tolist() == [False, True, True]
    assert snapshot.num_rows == 31
