"""Raw events to interest_pairs and impressions, point-in-time correct (SPEC section 2), with Ray.

    catalogue/           the cleaned items (catalogue.py)
    impressions/{train,validation,test}/    in the order of time inside each file
    queries/             each distinct query of the impressions once (queries.py), where there are any
    interest_pairs/      only from before the validation start
    behaviors/           each user's newest behaviors, for serving
    first_positive.parquet   item_id, first_positive_at, num_train_positives (of train impressions)
    samples.json         the splits' times, counts, share of positives by age bucket, what everything was made from

The log is read in fixed shards (event_log.py checks them side by side); Ray Data brings the events of each user together
by a shuffle; user_parts.py makes the samples of one part of the users. The driver holds the item ids with 40 bytes
an item, and where negatives are drawn 16 bytes a positive event; never the log.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data.context import ShuffleStrategy

from mim_ray import artifacts
from mim_ray.config import Scenario
from mim_ray.data.catalogue import write_index
from mim_ray.data.event_log import STAGE, UNKNOWN_TIME, Items, ShardStats, clean_shard
from mim_ray.data.features import check_features, feature_fields
from mim_ray.data.ids import IdIndex
from mim_ray.data.image_files import ImageFiles, images_root
from mim_ray.data.items import choose_items, write_items_part
from mim_ray.data.own_tables import OwnSplit, newest_of_users, own_split, write_own_impressions
from mim_ray.data.pairs import write_own_pairs, write_search_pairs
from mim_ray.data.queries import drop_repeated
from mim_ray.data.rejects import reject_rows, write_rejects
from mim_ray.data.sample_files import BEHAVIORS, PAIR_GROUP, write_parquet
from mim_ray.data.schema import INTEREST_PAIRS, SPLITS, TIME
from mim_ray.data.sources import Shard, find_table, require_table, shards
from mim_ray.data.splits import Split, age_shares, iso, split_by_time
from mim_ray.data.user_parts import PartJob, write_part_of_users
from mim_ray.data.user_samples import Pool
from mim_ray.errors import DataError
from mim_ray.runtime.progress import Progress
from mim_ray.runtime.summary import StageResult

_PART_EVENTS = 500_000  # of a part of the users, on average
_MAX_SAMPLED_TIMES = 5_000_000  # beyond that, split times come from an even sample
_TOLD = (
    "queries",
    "negatives not found",
    "events below samples.min_rating",
    "test rows without label",
    "future behaviors dropped",
    "impressions with unsorted behaviors",
)  # counts that the summary shows where there are any


def run(scenario: Scenario, *, data_root: str, output: str, rejects: str) -> StageResult:
    """Make the samples of the tables under `data_root`.

    Args:
        output: URI of the stage's folder, empty. rejects: URI of the Delta table of rejects.

    Raises:
        DataError: a table is missing, has wrong columns, is empty, or nothing in it counts as positive.
        ConfigError: the times of the splits contradict each other.
    """
    return _Build(scenario, data_root, output, rejects).run()


@dataclass
class _Log:
    """The checked interactions."""

    shards: list[Shard]
    events: list[Any]
    positives: list[ray.ObjectRef]
    stats: list[ShardStats]
    num_parts: int

    def sampled(self, name: str) -> np.ndarray:
        return np.concatenate([getattr(stats, name) for stats in self.stats])


@dataclass
class _Build:
    scenario: Scenario
    data_root: str
    output: str
    rejects_uri: str
    rejects: list[pa.Table] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def run(self) -> StageResult:
        check_features(self.scenario)
        self.features = feature_fields(self.scenario.data.features)
        own_impressions = find_table(self.data_root, "impressions")
        own_pairs = find_table(self.data_root, "interest_pairs")
        item_shards = shards(require_table(self.data_root, "items"), "items", 4_096)
        keep, ids, created, bad = choose_items(item_shards)
        self.rejects.append(bad)
        items = Items(IdIndex(ids), created)
        self.items_ref = ray.put(items)
        log = self._read_log(required=own_impressions is None)
        self._write_catalogue(item_shards, keep, items, log)

        impressions, pairs = "own", "own"
        if own_impressions is not None:
            own_shards = shards(own_impressions, "impressions", 50_000, features=self.features)
            decided = own_split(own_shards, self.scenario.samples)
            split = decided.by_time
            if decided.not_by_time:
                self.counts["train rows are later than the first validation or test rows: split not by time"] = 1
        else:
            assert log is not None
            impressions = "logged" if self.counts["impression events"] else "drawn"
            times = log.sampled("shown_times" if impressions == "logged" else "positive_times")
            split = split_by_time(times, self.scenario.samples)
        if own_pairs is None:
            pairs = "searched" if self.counts["image searches"] else "built" if log is not None else "none"

        results: list[pa.Table] = []
        if log is not None:
            results += self._write_users(
                log, items, split, "none" if impressions == "own" else impressions, pairs == "built"
            )
        if own_impressions is not None:
            results += self._write_own_impressions(own_shards, decided, with_behaviors=log is None)
        if own_pairs is not None:
            parts = shards(own_pairs, "interest_pairs", 20_000)
            self._write_pairs(write_own_pairs, "check interest pairs", parts, split)
        elif pairs == "searched" and log is not None:
            self._write_pairs(write_search_pairs, "collect image searches", log.shards, split)
        if not artifacts.list_files(f"{self.output}/interest_pairs", ".parquet"):
            empty = INTEREST_PAIRS.schema.empty_table()
            write_parquet(f"{self.output}/interest_pairs/part-00000.parquet", empty, PAIR_GROUP)
        return self._finish(results, split, {"impressions": impressions, "interest_pairs": pairs})

    def _read_log(self, required: bool) -> _Log | None:
        if not required and find_table(self.data_root, "interactions") is None:
            return None
        features = self.features if required else ()  # else they come from the user's own impressions
        parts = shards(require_table(self.data_root, "interactions"), "interactions", features=features)
        num_rows = sum(shard.num_rows for shard in parts)
        num_parts = max(4, -(-num_rows // _PART_EVENTS))
        stride = max(1, num_rows // _MAX_SAMPLED_TIMES)
        clean = ray.remote(num_returns=3)(clean_shard)
        settings = self.scenario.samples
        refs: list[Any] = [clean.remote(shard, self.items_ref, settings, num_parts, stride) for shard in parts]
        done = _gather("check events", [ref[2] for ref in refs], [shard.num_rows for shard in parts], "events")
        log = _Log(parts, [ref[0] for ref in refs], [ref[1] for ref in refs], done, num_parts)
        for stats in done:
            self.rejects.append(stats.rejects)
            self.counts.update(stats.counts)
        if not self.counts["positives"] and required:
            self.rejects_written()
            raise DataError(
                f"No usable event of {self.data_root}/interactions is positive: samples.positive_events is "
                f"{list(settings.positive_events)}, samples.min_rating is {settings.min_rating}, and "
                f"{self.counts['usable events']:,} of {num_rows:,} rows are usable (the others are in {self.rejects_uri}). "
                "Name the events that show interest in samples.positive_events."
            )
        return log

    def _write_catalogue(self, item_shards: list[Shard], keep: np.ndarray, items: Items, log: _Log | None) -> None:
        first_seen = np.full(len(items.index), UNKNOWN_TIME)
        for stats in log.stats if log is not None else ():
            np.minimum.at(first_seen, *stats.first_seen)
        write = ray.remote(write_items_part)
        uri, tasks, start, settings = f"{self.output}/catalogue", [], 0, self.scenario.data
        files = ImageFiles(images_root(settings, self.data_root), settings.max_image_bytes)
        for number, shard in enumerate(item_shards):
            part = keep[shard.first_row : shard.first_row + shard.num_rows]
            stop = start + int(part.sum())
            tasks.append(write.remote(shard, part, first_seen[start:stop], settings, files, uri, number))
            start = stop
        done = _gather("check items", tasks, [shard.num_rows for shard in item_shards], "items")
        write_index(uri)
        self.categories = pa.concat_arrays([part[0].cast(pa.string()) for part in done])
        self.has_image = np.concatenate([part[1] for part in done])
        self.known_since = np.where(items.created == UNKNOWN_TIME, first_seen, items.created)
        for _, _, bad, counts in done:
            self.rejects.append(bad)
            self.counts.update(counts)

    def _write_users(self, log: _Log, items: Items, split: Split, impressions: str, build: bool) -> list[pa.Table]:
        job = PartJob(
            settings=self.scenario.samples,
            seed=self.scenario.run.seed,
            output=self.output,
            impressions=impressions,
            build_pairs=build,
            split=split,
            ids=items.index.ids,
            categories=self.categories,
            has_image=self.has_image,
            pool=self._pool(log) if impressions == "drawn" else None,
        )
        job_ref = ray.put(job)
        write: Callable[[pa.Table], pa.Table] = lambda rows: write_part_of_users(rows, ray.get(job_ref))  # noqa: E731
        events = ray.data.from_arrow_refs(log.events)
        # By tasks that reuse warm workers. The default starts an actor per partition: seconds each, for little to move.
        events.context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
        parts = events.groupby("part", num_partitions=log.num_parts).map_groups(write, batch_format="pyarrow")
        results = []
        with Progress("make samples", total=log.num_parts, unit="parts of the users") as progress:
            for batch in parts.iter_batches(batch_size=None, batch_format="pyarrow"):
                assert isinstance(batch, pa.Table)
                results.append(batch)
                progress.add(batch.num_rows)
        return results

    def _pool(self, log: _Log) -> Pool:
        found = [ray.get(ref) for ref in log.positives]
        time, item = (np.concatenate([part[i] for part in found]) for i in range(2))
        order = np.argsort(time, kind="stable")
        known = np.argsort(self.known_since, kind="stable")
        known = known[: int((self.known_since != UNKNOWN_TIME).sum())]
        return Pool(time[order], item[order], self.known_since[known], known)

    def _write_pairs(self, write: Callable[..., Any], label: str, parts: list[Shard], split: Split) -> None:
        data, settings, before = self.scenario.data, self.scenario.samples, split.validation_start
        task, categories = ray.remote(write), ray.put(self.categories)
        tasks = [
            task.remote(shard, number, self.items_ref, categories, settings, data, before, self.output)
            for number, shard in enumerate(parts)
        ]
        for counts, bad in _gather(label, tasks, [shard.num_rows for shard in parts], "rows"):
            self.counts.update(counts)
            self.rejects.append(bad)

    def _write_own_impressions(
        self, own_shards: list[Shard], decided: OwnSplit, with_behaviors: bool
    ) -> list[pa.Table]:
        write = ray.remote(write_own_impressions)
        tasks = [
            write.remote(shard, number, decided, self.scenario.samples, self.output)
            for number, shard in enumerate(own_shards)
        ]
        done = _gather("check impressions", tasks, [shard.num_rows for shard in own_shards], "rows")
        self.rejects += [part[2] for part in done]
        if with_behaviors:
            newest = newest_of_users(pa.concat_tables([part[1] for part in done]))
            behaviors = newest.select(BEHAVIORS.names).cast(BEHAVIORS)
            write_parquet(f"{self.output}/behaviors/part-00000.parquet", behaviors, PAIR_GROUP)
            self.counts["users with behaviors"] = behaviors.num_rows
        return [part[0] for part in done]

    def rejects_written(self) -> dict[str, int]:
        return write_rejects(self.rejects_uri, STAGE, pa.concat_tables(self.rejects))

    def _finish(self, results: list[pa.Table], split: Split, made_from: dict[str, str]) -> StageResult:
        rows = [row for table in results for row in table.to_pylist()]
        for row in rows:
            self.counts.update(json.loads(row["counts"]))
            self.rejects.append(reject_rows(STAGE, "interactions", json.loads(row["rejects"])))
        rejected = self.rejects_written()
        self.counts["queries"] = drop_repeated(self.output)
        first = _merge(rows, ("train_items", "train_first", "train_positives"))
        first = first.group_by("item").aggregate([("a", "min"), ("b", "sum")]).sort_by("item")
        table = pa.table(
            {
                "item_id": first["item"],
                "first_positive_at": first["a_min"].cast(TIME),
                "num_train_positives": first["b_sum"],
            }
        )
        write_parquet(f"{self.output}/first_positive.parquet", table, PAIR_GROUP * 16)
        test = _merge(rows, ("test_items", "test_rows", "test_positives")).group_by("item")
        test = test.aggregate([("a", "sum"), ("b", "sum")]).sort_by("item")
        place = IdIndex(table["item_id"].combine_chunks()).rows(test["item"])
        at = np.append(np.asarray(first["a_min"]), -1)[place]
        buckets = age_shares(at, np.asarray(test["a_sum"]), np.asarray(test["b_sum"]))
        metrics = {
            "validation_start": iso(split.validation_start),
            "test_start": iso(split.test_start),
            "validation_start_us": split.validation_start,
            "test_start_us": split.test_start,
            "time_resolution": self.scenario.samples.time_resolution,
            "made_from": made_from,
            "counts": dict(sorted(self.counts.items())),
            "age_buckets": buckets,
        }
        artifacts.write_json(f"{self.output}/samples.json", metrics)
        if not self.counts["train rows"] or not self.counts["test rows"]:
            sizes = ", ".join(f"{name} {self.counts[f'{name} rows']:,}" for name in SPLITS)
            raise DataError(
                f"The splits of {self.data_root} leave a part empty ({sizes}). Set samples.validation_start and "
                "samples.test_start inside the time of the log, or give it more events."
            )
        return StageResult(metrics=metrics, rows=_summary(self.counts, metrics), rejects=rejected)


def _merge(rows: list[dict[str, Any]], names: tuple[str, str, str]) -> pa.Table:
    kinds = (pa.string(), pa.int64(), pa.int64())
    columns = [pa.array([v for row in rows for v in row[name]], kind) for name, kind in zip(names, kinds, strict=True)]
    return pa.table(columns, names=["item", "a", "b"])


def _summary(counts: Counter[str], metrics: dict[str, Any]) -> list[tuple[str, str]]:
    made = metrics["made_from"]
    words = {"own": "from your table", "logged": "as logged", "drawn": "positives with drawn negatives"}
    words |= {
        "searched": "from image searches",
        "built": "built from consecutive positives",
        "none": "no source for them",
    }
    rows = [
        (
            "items",
            f"{counts['items']:,}: {counts['items with image']:,} with image, {counts['items with title']:,} with title, "
            f"{counts['items with neither']:,} with neither",
        ),
        ("events", f"{counts['usable events']:,} of {counts['events']:,} usable, {counts['positives']:,} positive"),
        ("impressions", words[made["impressions"]]),
    ]
    for name in SPLITS:
        num = counts[f"{name} rows"]
        share = counts[f"{name} positives"] / num if num else 0.0
        start = "" if name == "train" else f", from {metrics[f'{name}_start'][:19]}"
        rows.append((f"  {name}", f"{num:,} rows, {share:.1%} positive{start}"))
    rows.append(("interest pairs", f"{counts['interest pairs']:,} {words[made['interest_pairs']]}, before validation"))
    rows.append(("users with behaviors", f"{counts['users with behaviors']:,}"))
    new = metrics["age_buckets"][0]
    if new["num_rows"]:
        text = f"{new['num_rows']:,} rows, {new['positive_ratio']:.1%} positive"
        rows.append(("test rows of unseen items (S1)", text))
    for name in _TOLD:
        if counts[name]:
            rows.append((name, f"{counts[name]:,}"))
    rows += [(name, f"{count:,}") for name, count in counts.items() if name.startswith("impressions without ")]
    rows += [("note", name) for name in counts if name.startswith("train rows are later")]
    if not counts["interest pairs"]:
        rows.append(("note", "without interest pairs C-SFT cannot train; see samples.pair_events"))
    return rows


def _gather(label: str, tasks: Sequence[ray.ObjectRef], sizes: Sequence[int], unit: str) -> list[Any]:
    """Results in the order of the tasks, with progress."""
    place = {task: number for number, task in enumerate(tasks)}
    results: list[Any] = [None] * len(tasks)
    with Progress(label, total=sum(sizes), unit=unit) as progress:
        pending = list(tasks)
        while pending:
            done, pending = ray.wait(pending)
            for task in done:
                results[place[task]] = ray.get(task)
                progress.add(sizes[place[task]])
    return results
