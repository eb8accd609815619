"""MFM's writer (paper Section 3.5): the embeddings of all items, from the items table into the Delta log and a snapshot.

    read and decode -> encode -> write a file (a fixed pool of actors, with decoding tasks on CPUs where they have GPUs)
      -> commit whole shards every few seconds (the job)

Rows become visible while the job runs. A job that died is started again as it was: shards that the table has are skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial

import pyarrow as pa
import ray

from mim_ray import artifacts
from mim_ray.config.scenario import Data, Extraction, Scenario
from mim_ray.data.image_files import images_root
from mim_ray.data.rejects import write_rejects
from mim_ray.data.sources import require_table
from mim_ray.data.transforms import PictureFormat
from mim_ray.errors import ArtifactError
from mim_ray.extraction.embed import Encode, Model, Work, load_encoder
from mim_ray.extraction.plan import plan
from mim_ray.extraction.pool import EncoderPool
from mim_ray.extraction.read import Decoding
from mim_ray.extraction.schedule import shares
from mim_ray.extraction.write import STAGE, Committer, read_rejects_of
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.snapshot_line import current_snapshot
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
        samples: of its items nothing is read, the items table itself is what embeddings show; its queries are encoded, too.
        center: the Delta log is center/table, the snapshot center/snapshots/<encoder version>; the same below
            center/queries for queries.

    Raises:
        DataError: there is no usable items table. ArtifactError: there is no usable encoder.
    """
    version, picture = describe_encoder(encoder)
    decoding = decoding_of(scenario.data, data_root, picture)
    table = EmbeddingTable(f"{center}/table").create()
    settings = scenario.extraction
    uri = f"{center}/snapshots/{version}"
    load = partial(load_encoder, precision=settings.precision, compile=settings.compile)
    done = extract(
        require_table(data_root, "items"),
        table,
        encoder=encoder,
        encoder_version=version,
        decoding=decoding,
        settings=settings,
        rejects=f"{center}/rejects/{version}",
        snapshots=uri,
        load=load,
    )
    queries, unusable = None, []
    if artifacts.exists(f"{samples}/queries"):
        queries, of_queries = extract_queries(
            f"{samples}/queries",
            f"{center}/queries",
            encoder=encoder,
            encoder_version=version,
            decoding=decoding,
            settings=settings,
            load=partial(load, queries=True),
        )
        unusable.append(of_queries)
    counts = write_rejects(rejects, STAGE, pa.concat_tables([done.rejects, *unusable]))
    snapshot = build_snapshot(table, version, uri, dtype=settings.snapshot_dtype, keep=settings.snapshot_keep)
    rate = done.num_rows_done / done.seconds if done.num_rows_done else 0.0
    metrics = {
        "encoder_version": version,
        "snapshot": uri,
        "queries": None if queries is None else queries.line,
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
    if queries is not None:
        rows.append(("queries", f"{queries.num_rows:,}"))
    return StageResult(metrics, rows, counts)


def extract_queries(
    queries: str,
    center: str,
    *,
    encoder: str,
    encoder_version: str,
    decoding: Decoding,
    settings: Extraction,
    load: Callable[[str, bool], Encode],
) -> tuple[Snapshot | None, pa.Table]:
    """Encode the distinct queries at `queries` (data/queries.py) into a log and a snapshot of their own below `center`.

    Returns:
        the snapshot, by query id, None where no query can be encoded; and the rejects.
    """
    table = EmbeddingTable(f"{center}/table").create()
    line = f"{center}/snapshots/{encoder_version}"
    done = extract(
        queries,
        table,
        encoder=encoder,
        encoder_version=encoder_version,
        decoding=decoding,
        settings=settings,
        rejects=f"{center}/rejects/{encoder_version}",
        snapshots=line,
        load=load,
    )
    source = pa.repeat(pa.scalar("queries"), len(done.rejects))
    rejects = done.rejects.set_column(done.rejects.schema.get_field_index("source"), "source", source)
    if not sum(file.num_rows for file in table.scan(encoder_version)[1]):
        return None, rejects
    return build_snapshot(
        table, encoder_version, line, dtype=settings.snapshot_dtype, keep=settings.snapshot_keep
    ), rejects


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
    snapshots: str | None = None,
    pool: EncoderPool | None = None,
) -> Extracted:
    """Fill the table with the embeddings of the items table at `items`; each shard exactly once, however often it starts.

    Args:
        encoder: URI that `load` understands. rejects: folder for what cannot be used, kept for restarts.
        snapshots: line of this encoder version; content that its snapshot has is copied instead of encoded.
        pool: of actors that hold this encoder already; without one actors are started for this job.
    """
    start = time.monotonic()
    planned = plan(items, settings.shard_rows, [encoder_version, asdict(decoding)])
    done = table.committed_shards(encoder_version)
    num_found, rows_found = planned.count(done)
    num_left = planned.num_rows - rows_found
    if num_left:
        work = Work(
            encoder_version=encoder_version,
            decoding=decoding,
            batch_size=settings.batch_size,
            table=table.uri,
            rejects=rejects,
            snapshot=_known_content(snapshots, encoder_version) if settings.reuse_snapshot else None,
        )
        try:
            with (
                nullcontext(pool) if pool is not None else encoder_pool(encoder, settings, load) as actors,
                Committer(table, settings.commit_every_s) as committer,
                Progress("extraction", total=num_left, unit="items") as progress,
            ):
                for file in actors.run(planned.units(done), work):
                    committer.add([file.fragment])
                    progress.add(file.num_rows)
        except Exception as error:  # Ray wraps what its workers raise; tell the user's own mistake plainly
            known = user_error(error)
            if known is None:
                raise
            raise known from None
        done = table.committed_shards(encoder_version)
        lost = planned.num_shards - planned.count(done)[0]
        if lost:
            raise ArtifactError(f"{lost} shards of {items} did not reach {table.uri}. Run the extraction again.")
    return Extracted(
        num_rows=planned.num_rows,
        num_shards=planned.num_shards,
        num_shards_found=num_found,
        num_rows_done=num_left,
        seconds=time.monotonic() - start,
        rejects=read_rejects_of(planned, rejects),
    )


def encoder_pool(encoder: str, settings: Extraction, load: Callable[[str, bool], Encode] = load_encoder) -> EncoderPool:
    """The actors that `settings` ask for of this cluster, with the encoder saved at `encoder`."""
    there = ray.cluster_resources()
    parts = shares(settings, there.get("CPU", 0.0), there.get("GPU", 0.0))
    return EncoderPool(Model(encoder, load, settings.gpus_per_actor > 0), parts)


def _known_content(line: str | None, encoder_version: str) -> str | None:
    """The snapshot of this encoder version whose content is copied: exactly as the encoder gave it, so in float32 only."""
    if line is None or current_snapshot(line) is None:
        return None
    try:
        snapshot = Snapshot.open(line)
    except ArtifactError:
        return None  # damaged: the job needs it for speed only, and builds the next one
    exact = snapshot.encoder_version == encoder_version and snapshot.dtype == "float32" and snapshot.num_rows > 0
    return snapshot.uri if exact else None
