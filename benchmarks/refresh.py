"""What a refresh of 1 % of a catalogue costs, and an upsert into the embedding log beside Delta's MERGE.

    python benchmarks/refresh.py --json refresh.json --quick     20,000 items in the rounds, under a minute
    python benchmarks/refresh.py --json refresh.json             100,000 items

The catalogue is a Delta table of titles and JPEG pictures (64 x 64) with its change data feed on, the encoder the tiny one of
the scenario `tiny` with random weights. Rounds are those of a running refresher, as jobs/refresh.py --every makes them.
benchmarks/README.md says what each key means.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not spin: workers share the cores
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import io
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GOALS = {"one_percent_cost": 2.0, "upsert_vs_merge": 0.3}
"""Each figure's highest welcome value."""


@dataclass(frozen=True)
class Plan:
    """Sizes of a run. The defaults are the goals' sizes."""

    num_items: int = 100_000
    num_upsert_items: int = 100_000
    files: int = 10
    rounds: int = 7
    upserts: int = 8
    width: int = 128
    cpus: int = 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the report goes")
    parser.add_argument("--quick", action="store_true", help="20,000 items in the rounds, fewer of them")
    parser.add_argument("--check", action="store_true", help="leave with 1 when a goal is missed")
    parser.add_argument("--cpus", type=int, default=Plan.cpus, help=f"CPUs of the embedded Ray ({Plan.cpus})")
    args = parser.parse_args(argv)
    if args.cpus < 1:
        parser.error("--cpus must be 1 or more")
    plan = (
        Plan(num_items=20_000, num_upsert_items=100_000, files=2, rounds=3, upserts=4, cpus=args.cpus)
        if args.quick
        else Plan(cpus=args.cpus)
    )
    folder = Path(tempfile.mkdtemp(prefix="mim-ray-refresh-benchmark-"))
    try:
        report = measure(plan, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    missed = [key for key, most in GOALS.items() if report[key] > most]
    for key, most in GOALS.items():
        print(f"{key:20} {report[key]:8.3f}   goal ≤ {most:g}{'   MISSED' if key in missed else ''}")
    print(json.dumps(report["details"], indent=1))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if args.check and missed else 0


def measure(plan: Plan, folder: Path) -> dict[str, Any]:
    """All figures."""
    from measuring import machine

    from mim_ray.config.scenario import Run
    from mim_ray.runtime.cluster import cluster

    upserts = measure_upserts(plan, folder)
    with cluster(Run(num_cpus=plan.cpus, object_store_mb=400)):
        rounds = measure_rounds(plan, folder)
    return {
        "one_percent_cost": rounds["one_percent_cost"],
        "upsert_vs_merge": upserts["upsert_vs_merge"],
        "goals": GOALS,
        "details": {"rounds": rounds, "upserts": upserts},
        "plan": asdict(plan),
        "machine": machine(plan.cpus),
    }


def measure_rounds(plan: Plan, folder: Path) -> dict[str, Any]:
    """Seconds of rounds of a running refresher."""
    import numpy as np
    from deltalake import DeltaTable, write_deltalake

    catalogue = f"{folder}/items"
    items = make_items(plan.num_items)
    feed = "delta.enableChangeDataFeed"
    write_deltalake(catalogue, items, target_file_size=max(1, items.nbytes // plan.files), configuration={feed: "true"})
    single = f"{folder}/single"
    write_deltalake(single, items.slice(0, 1))
    encoder, described = make_encoder(folder, items["title"].to_pylist()[:2_000])

    pool, scanners = warm_parts(encoder)  # running, as between the rounds of --every
    empty = []
    for number in range(5):
        with refresher(single, f"{folder}/empty-{number}", encoder, described, pool, scanners) as running:
            empty.append(seconds_of_round(running)[0])
    random = np.random.default_rng(1)
    num_changed = plan.num_items // 100
    appended: list[float] = []

    def merge_rounds(running: Any, name: str, rounds: int, by_feed: bool) -> list[tuple[float, float, float]]:
        """Seconds of (a round after a MERGE of 1 %, without the snapshot; the snapshot; a round without changes)."""
        times = []
        for number in range(rounds + 1):  # the first pair warms up
            chosen = random.choice(plan.num_items, num_changed, replace=False)
            titles = [f"{name} {number} title {row}" for row in chosen]
            table = DeltaTable(catalogue)
            merge = table.merge(items.take(chosen).set_column(1, "title", [titles]), "t.item_id = s.item_id", "s", "t")
            merge.when_matched_update_all().execute()
            seconds, done = seconds_of_round(running)
            assert (done.encoded, done.changed, done.built) == (num_changed, num_changed, True), done
            assert by_feed == (not done.notes), done
            idle, still = seconds_of_round(running)
            assert not still.found_changes
            assert not still.built
            times.append((seconds - done.snapshot_s, done.snapshot_s, idle))
        return times[1:]

    with refresher(catalogue, f"{folder}/center", encoder, described, pool, scanners) as running:
        full, first = seconds_of_round(running)
        assert first.encoded == plan.num_items, first
        fed = merge_rounds(running, "fed", plan.rounds, by_feed=True)
        for number in range(3):
            new = make_items(num_changed, prefix=f"new-{number}-")
            write_deltalake(catalogue, new, mode="append")
            seconds, done = seconds_of_round(running)
            assert done.new == num_changed, done
            appended.append(seconds - done.snapshot_s)
        DeltaTable(catalogue).alter.set_table_properties({feed: "false"})
        compared = merge_rounds(running, "compared", max(2, plan.rounds // 2), by_feed=False)
    share = 0.01 * (full - statistics.median(empty))
    merged, snapshots, nothing = (list(column) for column in zip(*fed, strict=True))
    built = statistics.median(snapshots)
    costs, by_files = (
        [(one + built / rounds_per_snapshot() - none) / share for one, _, none in times] for times in (fed, compared)
    )
    return {
        "one_percent_cost": round(statistics.median(costs), 3),
        "quartiles": spread(costs),
        "one_percent_cost_with_a_snapshot_each": round(
            (statistics.median(merged) + built - statistics.median(nothing)) / share, 3
        ),
        "one_percent_cost_appended": round(
            (statistics.median(appended) + built / rounds_per_snapshot() - statistics.median(nothing)) / share, 3
        ),
        "one_percent_cost_by_files": round(statistics.median(by_files), 3),
        "by_files_quartiles": spread(by_files),
        "snapshot_s": round(built, 3),
        "rounds_per_snapshot": rounds_per_snapshot(),
        "items": plan.num_items,
        "changed": num_changed,
        "full_s": round(full, 2),
        "empty_s": [round(value, 2) for value in empty],
        "one_percent_s": [round(value, 3) for value in merged],
        "one_percent_by_files_s": [round(value, 3) for value, _, _ in compared],
        "one_percent_appended_s": [round(value, 3) for value in appended],
        "nothing_s": [round(value, 4) for value in nothing],
        "items_per_s": round(plan.num_items / full, 1),
    }


def measure_upserts(plan: Plan, folder: Path) -> dict[str, Any]:
    """An upsert of 1 % of the rows: into the log, with its share of compaction and a snapshot, against MERGE."""
    import numpy as np
    import pyarrow as pa
    from deltalake import DeltaTable, write_deltalake

    from mim_ray.representation_center.build import build_snapshot
    from mim_ray.representation_center.compaction import compact
    from mim_ray.representation_center.table import EmbeddingTable

    random = np.random.default_rng(0)

    def rows(numbers: Any, day: int) -> pa.Table:
        num = len(numbers)
        matrix = random.standard_normal((num, plan.width), np.float32)
        lists = pa.ListArray.from_arrays(
            pa.array(np.arange(num + 1, dtype=np.int32) * plan.width), pa.array(matrix.reshape(-1))
        )
        columns = {
            "item_id": pa.array([f"item-{number:09d}" for number in numbers]),
            "embedding": lists,
            "content_hash": pa.array([f"{number:016x}{day:016x}" for number in numbers]),
            "content_at": pa.array([day * 86_400_000_000] * num, pa.timestamp("us", tz="UTC")),
        }
        return pa.table(columns)

    table = EmbeddingTable(f"{folder}/log/table").create()
    line = f"{folder}/log/snapshots/v1"
    merge_uri = f"{folder}/merge"
    shard = 10_000
    for start in range(0, plan.num_upsert_items, shard):
        part = rows(range(start, min(start + shard, plan.num_upsert_items)), 1)
        table.append(part, encoder_version="v1")
        write_deltalake(merge_uri, part, mode="append")
    compact(table, "v1")
    build_snapshot(table, "v1", line)
    appends, builds, whole_builds, merges, compactions = [], [], [], [], []
    for number in range(plan.upserts):
        chosen = np.sort(random.choice(plan.num_upsert_items, plan.num_upsert_items // 100, replace=False))
        part = rows(chosen, 2 + number)

        def merge(part: pa.Table = part) -> None:
            source = DeltaTable(merge_uri).merge(part, "t.item_id = s.item_id", "s", "t")
            source.when_matched_update_all().when_not_matched_insert_all().execute()

        if number % 2:
            merges.append(seconds_of(merge))
        appends.append(seconds_of(lambda part=part: table.append(part, encoder_version="v1")))
        compactions.append(seconds_of(lambda: compact(table, "v1")))
        builds.append(seconds_of(lambda: build_snapshot(table, "v1", line)))
        whole_builds.append(seconds_of(lambda: build_snapshot(table, "v1", f"{line}-whole", keep=1, whole_log=True)))
        if not number % 2:
            merges.append(seconds_of(merge))
    share = sum(compactions) / len(compactions)
    per = rounds_per_snapshot()
    ours = [append + share + build / per for append, build in zip(appends, builds, strict=True)]
    ratios = [a / b for a, b in zip(ours, merges, strict=True)]
    strict = [(append + share + build) / b for append, build, b in zip(appends, builds, merges, strict=True)]
    return {
        "upsert_vs_merge": round(statistics.median(ratios), 3),
        "quartiles": spread(ratios),
        "upsert_vs_merge_with_a_snapshot_each": round(statistics.median(strict), 3),
        "rounds_per_snapshot": per,
        "rows": plan.num_upsert_items,
        "upserted": plan.num_upsert_items // 100,
        "width": plan.width,
        "append_s": round(statistics.median(appends), 4),
        "compaction_share_s": round(share, 4),
        "snapshot_s": round(statistics.median(builds), 4),
        "snapshot_of_the_whole_log_s": round(statistics.median(whole_builds), 4),
        "merge_s": round(statistics.median(merges), 4),
        "rounds": plan.upserts,
    }


def rounds_per_snapshot() -> int:
    """Rounds of `--every 60s` that share a snapshot with the default settings."""
    from mim_ray.config.scenario import Refresh

    return max(1, int(Refresh().snapshot_every_s // 60))


def make_items(num: int, prefix: str = "item-") -> Any:
    """A catalogue table; every picture is different."""
    import numpy as np
    import pyarrow as pa
    from PIL import Image

    random = np.random.default_rng(0)
    images = []
    for _ in range(num):
        coarse = random.integers(0, 256, (8, 8, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
        images.append(file.getvalue())
    return pa.table(
        {
            "item_id": [f"{prefix}{number:09d}" for number in range(num)],
            "title": [f"{prefix} title {number}" for number in range(num)],
            "image": pa.array(images, pa.binary()),
        }
    )


def make_encoder(folder: Path, titles: list[str]) -> tuple[str, Any]:
    """The tiny encoder with random weights, saved: (URI, (version, picture))."""
    from mim_ray.config import load_scenario
    from mim_ray.encoders.item_encoder import ItemEncoder
    from mim_ray.encoders.tokenizer import train_tokenizer
    from mim_ray.extraction.run import describe_encoder

    settings = load_scenario("tiny").encoders
    uri = f"{folder}/encoder"
    ItemEncoder.build(settings, train_tokenizer(titles, settings.text.vocabulary_size), seed=0).save(uri, stage="csft")
    return uri, describe_encoder(uri)


def warm_parts(encoder: str) -> tuple[Any, Any]:
    """Encoder actors and scanners that are running."""
    from mim_ray.config.scenario import Extraction
    from mim_ray.extraction.run import encoder_pool
    from mim_ray.extraction.scanners import Scanners

    pool = encoder_pool(encoder, Extraction()).__enter__()
    pool.wait()
    scanners = Scanners()
    scanners.start()
    return pool, scanners


def refresher(items: str, center: str, encoder: str, described: Any, pool: Any, scanners: Any) -> Any:
    from mim_ray.config.scenario import Extraction, Refresh
    from mim_ray.extraction.read import Decoding
    from mim_ray.extraction.refresh import Refresher

    version, picture = described
    return Refresher(
        items,
        center,
        encoder=encoder,
        encoder_version=version,
        decoding=Decoding(picture, 8_000_000, 50_000_000, 2_000, center),
        settings=Extraction(),
        refresh=Refresh(snapshot_every_s=0.0),  # each round builds one, so that its time is measured; its share counts
        rejects=f"{center}-rejects",
        pool=pool,
        scanners=scanners,
    )


def seconds_of_round(running: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    done = running.round()
    return time.perf_counter() - start, done


def seconds_of(step: Any) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> list[float]:
    """Lower and upper quartile."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [round(low, 3), round(high, 3)]


if __name__ == "__main__":
    sys.exit(main())
