"""MFM's writer (paper Section 3.5): the embeddings of all items, from the items table into the Delta log and a snapshot.

    read and decode (CPU tasks) -> encode (a fixed pool of actors) -> write files (tasks) -> commit whole shards (driver)

Rows become visible while the job runs. A job that died is started again as it was: shards that the table has are skipped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from mim_ray import artifacts
from mim_ray.config.scenario import Data, Extraction, Scenario
from mim_ray.data.image_files import images_root
from mim_ray.data.rejects import write_rejects
from mim_ray.data.sources import require_table
from mim_ray.data.transforms import PictureFormat
from mim_ray.errors import ArtifactError
from mim_ray.extraction.embed import Embedder, Encode, load_encoder
from mim_ray.extraction.plan import Unit, plan, without
from mim_ray.extraction.read import Decoding, ItemShards
from mim_ray.extraction.write import STAGE, Committer, OpenShards, read_rejects_of, write_pieces
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.data_files import Fragment
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.runtime.cluster import user_error
from mim_ray.runtime.progress import Progress, format_seconds
from mim_ray.runtime.summary import StageResult


@dataclass(frozen=True)
class Extracted:
    """What `extract` did: rows and shards of the plan, shards found done, seconds of encoding, rejects."""

    num_rows: int
    num_shards: int
    num_shards_found: int
    num_rows_done: int
    seconds: float
    rejects: pa.Table


def run(
    scenario: Scenario, *, data_root: str, samples: str, encoder: str, output: str, center: str, rejects: str
) -> StageResult:
    """Bring the table up to the items below `data_root` for the encoder saved at `encoder`, then build its snapshot.

    Args:
        samples: not read; the items table itself is what embeddings show.
        center: the Delta log is center/table, the snapshot center/snapshots/<encoder version>.

    Raises:
        DataError: there is no usable items table. ArtifactError: there is no usable encoder.
    """
    version, picture = describe_encoder(encoder)
    decoding = decoding_of(scenario.data, data_root, picture)
    table = EmbeddingTable(f"{center}/table").create()
    done = extract(
        require_table(data_root, "items"),
        table,
        encoder=encoder,
        encoder_version=version,
        decoding=decoding,
        settings=scenario.extraction,
        rejects=f"{center}/rejects/{version}",
        load=partial(load_encoder, precision=scenario.extraction.precision, compile=scenario.extraction.compile),
    )
    counts = write_rejects(rejects, STAGE, done.rejects)
    uri = f"{center}/snapshots/{version}"
    settings = scenario.extraction
    snapshot = build_snapshot(table, version, uri, dtype=settings.snapshot_dtype, keep=settings.snapshot_keep)
    rate = done.num_rows_done / done.seconds if done.num_rows_done else 0.0
    metrics = {
        "encoder_version": version,
        "snapshot": uri,
        "num_items": done.num_rows,
        "num_embeddings": snapshot.num_rows,
        "width": snapshot.width,
        "num_shards": done.num_shards,
        "num_shards_found": done.num_shards_found,
        "items_per_s": rate,
        "delta_version": snapshot.delta_version,
    }
    artifacts.write_json(f"{output}/extraction.json", metrics | {"rejects": counts})
    found = f", {done.num_shards_found:,} of them found done" if done.num_shards_found else ""
    rows = [
        ("items", f"{done.num_rows:,} in {done.num_shards:,} shards{found}"),
        ("encoded", f"{done.num_rows_done:,} in {format_seconds(done.seconds)}, {rate:,.0f}/s"),
        ("snapshot", f"{snapshot.num_rows:,} × {snapshot.width} {snapshot.dtype}, encoder {version}"),
    ]
    return StageResult(metrics, rows, counts)


def describe_encoder(encoder: str) -> tuple[str, PictureFormat]:
    """(version, what pictures it takes) of the encoder saved at `encoder`.

    Raises:
        ArtifactError: there is none.
    """
    described = artifacts.read_json(f"{encoder}/encoder.json")
    try:
        return str(described["encoder_version"]), PictureFormat.from_json(described["picture"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{encoder}/encoder.json describes no encoder ({error}). Run its stage again.") from None


def decoding_of(data: Data, data_root: str, picture: PictureFormat) -> Decoding:
    """How the content of the tables below `data_root` becomes the encoder's input."""
    return Decoding(
        picture, data.max_image_bytes, data.max_image_pixels, data.max_title_chars, images_root(data, data_root)
    )


def extract(
    items: str,
    table: EmbeddingTable,
    *,
    encoder: str,
    encoder_version: str,
    decoding: Decoding,
    settings: Extraction,
    rejects: str,
    load: Callable[[str, bool], Encode] = load_encoder,
) -> Extracted:
    """Fill the table with the embeddings of the items table at `items`; each shard exactly once, however often it starts.

    Args:
        encoder: URI that `load` understands. rejects: folder for what cannot be used, kept for restarts.
    """
    start = time.monotonic()
    units = plan(items, settings.shard_rows, [encoder_version, asdict(decoding)])
    shards = {piece.shard_id: piece.stop - piece.start for unit in units for piece in unit.slices}
    found = table.committed_shards(encoder_version) & shards.keys()
    left = without(units, found)
    num_left = sum(unit.num_rows for unit in left)
    encode_units(
        left,
        table,
        encoder=encoder,
        encoder_version=encoder_version,
        decoding=decoding,
        settings=settings,
        rejects=rejects,
        load=load,
    )
    return Extracted(
        num_rows=sum(shards.values()),
        num_shards=len(shards),
        num_shards_found=len(found),
        num_rows_done=num_left,
        seconds=time.monotonic() - start,
        rejects=read_rejects_of(shards, table=table, rejects=rejects, encoder_version=encoder_version),
    )


def encode_units(
    units: list[Unit],
    table: EmbeddingTable,
    *,
    encoder: str,
    encoder_version: str,
    decoding: Decoding,
    settings: Extraction,
    rejects: str,
    load: Callable[[str, bool], Encode],
) -> None:
    """Bring the units' shards into the table; see `extract`.

    Raises:
        ArtifactError: some of them did not get there.
    """
    if not units:
        return
    shards = {piece.shard_id: piece.stop - piece.start for unit in units for piece in unit.slices}
    open_shards = OpenShards(shards)
    files = _files(units, table, encoder, encoder_version, decoding, settings, rejects, load)
    try:
        with (
            Committer(table, settings.commit_every_s) as committer,
            Progress("extraction", total=sum(shards.values()), unit="items") as progress,
        ):
            for batch in files.iter_batches(batch_size=None, batch_format="pyarrow"):
                for row in pa.table(batch).to_pylist():
                    fragment = Fragment(**json.loads(row["fragment"]))
                    committer.add(open_shards.add(row["shard_id"], row["rows"], fragment))
                    progress.add(len(row["rows"]))
    except Exception as error:  # Ray wraps what its workers raise; tell the user's own mistake plainly
        known = user_error(error)
        if known is None:
            raise
        raise known from None
    lost = len(shards.keys() - table.contains(encoder_version, shards))
    if lost:
        raise ArtifactError(f"{lost} shards did not reach {table.uri}. Run it again.")


def _files(
    units: list,
    table: EmbeddingTable,
    encoder: str,
    encoder_version: str,
    decoding: Decoding,
    settings: Extraction,
    rejects: str,
    load: Callable[[str, bool], Encode],
) -> ray.data.Dataset:
    """The pipeline up to the written files, as a lazy dataset."""
    actor_cpus, task_cpus = cpu_shares(settings)
    prepared = ray.data.read_datasource(
        ItemShards(units, decoding, settings.batch_size), override_num_blocks=len(units), num_cpus=task_cpus
    )
    encoded = prepared.map_batches(
        Embedder,
        fn_constructor_args=(encoder, decoding.picture.size, settings.gpus_per_actor > 0, load),
        batch_size=settings.batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=settings.num_actors),
        num_cpus=actor_cpus,
        num_gpus=settings.gpus_per_actor or None,
        label_selector={},  # selects all nodes, but is unlike the tasks': decoding is then not fused into the actors
    )
    return encoded.map_batches(
        partial(write_pieces, table=table.uri, rejects=rejects, encoder_version=encoder_version),
        batch_size=settings.shard_rows,
        batch_format="pyarrow",
        num_cpus=task_cpus / 4,
    )


def cpu_shares(settings: Extraction) -> tuple[float, float]:
    """CPUs of an actor and of a decoding task: as configured, less where a machine is too small for both at once."""
    total = ray.cluster_resources().get("CPU", 0.0)
    wanted = settings.num_actors * settings.cpus_per_actor
    if total < 1 or wanted + 1 <= total:  # a cluster that still has to grow shows no CPUs
        return settings.cpus_per_actor, 1.0
    return min(settings.cpus_per_actor, total / 2 / settings.num_actors), min(1.0, total / 4)
