"""Train one CTR model (paper Section 3.4): base or +MIM around one user behavior model, one network per seed.

P Ray Train workers, each with its part of every epoch (data.batches.RowBatches); the network's gradients are averaged over
workers, the met table rows' by the tables. The state with the best validation AUC is kept; test rows are never read here.
Killed workers and jobs go on from the newest checkpoint below train/ (trainer.py); finished seeds are not trained again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mim_ray import artifacts
from mim_ray.ciubm.continuing import Earlier, copy_later_rows, times_of
from mim_ray.ciubm.dataset import Content, ImpressionEncoder
from mim_ray.ciubm.export import load_state, save_model
from mim_ray.ciubm.features import Features
from mim_ray.ciubm.recipe import network_config
from mim_ray.ciubm.trainer import Trainer
from mim_ray.ciubm.vocabulary_build import Vocabularies, build_vocabularies
from mim_ray.config import Scenario
from mim_ray.config.scenario import Ciubm
from mim_ray.data.features import check_features
from mim_ray.errors import ArtifactError, DataError
from mim_ray.representation_center.release import check_versions
from mim_ray.representation_center.snapshot import Snapshot
from mim_ray.representation_center.snapshot_line import keep_snapshot, kept_snapshots
from mim_ray.runtime.summary import StageResult
from mim_ray.training.run import rank, report, run_workers


def run(
    scenario: Scenario, *, variant: str, samples: str, snapshot: str | None, output: str, queries: str | None = None
) -> StageResult:
    """Train `variant` (BACKBONE-base, -mim or -style) and leave it at `output`, as ciubm/export.py describes.

    An interrupted run goes on from what it left in `output` when it is called again. With ciubm.continue_from it begins
    with an earlier model and trains on later rows only (continuing.py).

    Args:
        samples: URI of the samples. snapshot: URI of the embeddings behind Eqs. 7-9, None for base.
        queries: URI of the vectors by query id, of the same encoder; None where there are none.

    Raises:
        ArtifactError: content is asked for and there is no snapshot; or the earlier model does not fit.
        VersionMismatchError: the earlier model is of another encoder version.
        NonFiniteLossError: training diverged.
        ConfigError: declared features that cannot be meant.
        DataError: there are no training rows, they have labels other than 0 and 1, or they lack the times or queries that
            the settings ask for.
    """
    backbone, _, content = variant.partition("-")
    settings = scenario.ciubm
    if content != "base" and snapshot is None:
        raise ArtifactError(f"{variant} needs embeddings. Run jobs/extract.py first, or train {backbone}-base.")
    owner = f"training-{artifacts.fingerprint(output)}"
    vocabularies = Vocabularies.load(f"{output}/vocabulary")
    goes_on = vocabularies is not None
    opened = None if content == "base" or snapshot is None else _opened(snapshot, owner if goes_on else None)
    earlier = (
        None
        if settings.continue_from is None
        else Earlier.open(artifacts.absolute_uri(settings.continue_from), variant)
    )
    times = times_of(samples)
    rows = f"{samples}/impressions/train"
    if earlier is not None:
        kinds = {feature.name: feature.kind for feature in scenario.data.features}
        earlier.check(settings, kinds, None if opened is None else opened.encoder_version)
        rows = _later_rows(rows, earlier.check_times(times, samples), f"{output}/train/rows")
    if vocabularies is None:
        check_features(scenario)
        vocabularies = build_vocabularies(
            samples,
            min_item_count=settings.min_item_count,
            hash_rows=settings.num_hash_rows,
            declared=scenario.data.features,
            transforms=settings.features,
            earlier=None if earlier is None else earlier.vocabularies,
        )
        vocabularies.save(f"{output}/vocabulary")
    items, users, features = vocabularies.items, vocabularies.users, vocabularies.features
    if opened is not None and not (Content(opened, items).rows >= 0).any():
        raise ArtifactError(
            f"{snapshot} holds no embedding of any item of the catalogue. Run jobs/extract.py again on these samples."
        )
    asked = _queries(settings, content, opened, queries, samples)
    network = replace(
        network_config(settings, backbone, None if opened is None else opened.width),
        time_gaps=_time_gaps(settings, features, samples),
        context_width=features.context_width(settings.id_dim),
        query_interest=settings.query_interest and content == "mim",
        query_width=asked.width if asked is not None and settings.query_vector else 0,
    )
    if earlier is not None:
        earlier.check_network(network)
    config = {
        "settings": settings.model_dump(mode="json"),
        "network": network.to_json(),
        "samples": samples,
        "rows": rows,
        "earlier": None if earlier is None else earlier.uri,
        "snapshot": None if opened is None else opened.uri,
        "queries": None if asked is None else asked.line,
        "output": output,
        "label": variant,
        "positive_ratio": vocabularies.positive_ratio,
        "run_seed": scenario.run.seed,
    }
    with _kept(opened, owner):
        run_workers(train_loop, config, workers=settings, name=variant, storage=f"{output}/train")
    results = [artifacts.read_json(f"{output}/seed-{seed}/metrics.json") for seed in settings.seeds]
    metrics = {
        "seeds": {str(seed): result for seed, result in zip(settings.seeds, results, strict=True)},
        "validation_auc": _mean([result["validation_auc"] for result in results]),
        "validation_log_loss": _mean([result["validation_log_loss"] for result in results]),
        "num_train_rows": results[0]["num_train_rows"],
        "rows_per_s": _mean([result["rows_per_s"] for result in results]),
    }
    info = {
        "variant": variant,
        "backbone": backbone,
        "content": content,
        "encoder_version": None if opened is None else opened.encoder_version,
        "snapshot": config["snapshot"],
        "queries": None
        if asked is None
        else {"line": asked.line, "width": asked.width, "encoder_version": asked.encoder_version},
        "network": config["network"],
        "max_behaviors": settings.max_behaviors,
        "id_dim": settings.id_dim,
        "seeds": list(settings.seeds),
        "table_optimizer": settings.table_optimizer,
        "times": times,
        "continued_from": config["earlier"],
        "metrics": metrics,
    }
    artifacts.write_json(f"{output}/ctr.json", info)
    artifacts.remove(f"{output}/train")
    validation = metrics["validation_auc"]
    lines = [
        ("train", f"{metrics['num_train_rows']:,} rows, {metrics['rows_per_s']:,.0f} rows/s"),
        ("tables", f"{items.num_table_rows:,} items, {items.num_category_rows:,} categories, {len(users) + 1:,} users"),
        *([("features", features.describe())] if features.kinds else []),
        *_input(results[0]["input"], with_content=opened is not None),
        ("content", "none" if opened is None else f"{opened.encoder_version}, width {opened.width}"),
        ("validation AUC", "no rows of both labels" if validation is None else f"{validation:.4f} (mean over seeds)"),
        *_stopped(results),
        *([] if earlier is None else [("goes on from", f"{earlier.uri}, on later rows only")]),
    ]
    return StageResult(metrics=metrics, rows=lines)


def train_loop(config: dict[str, Any]) -> None:
    """What each worker does: one model after the other, one per seed."""
    settings = Ciubm.model_validate(config["settings"])
    encoder = make_encoder(config)
    for seed in settings.seeds:
        folder = f"{config['output']}/seed-{seed}"
        if artifacts.exists(f"{folder}/metrics.json"):
            continue
        trainer = Trainer(config, encoder, seed)
        if config["earlier"] is not None:
            trainer.go_on(load_state(f"{config['earlier']}/seed-{seed}"))
        trainer.resume()
        metrics = trainer.fit()
        state = trainer.state()
        if rank() == 0:
            save_model(folder, state)
            artifacts.write_json(f"{folder}/metrics.json", metrics)
            artifacts.remove(trainer.folder)
    report({"finished": True})


def make_encoder(config: dict[str, Any]) -> ImpressionEncoder:
    """The encoder of a run's rows, from the vocabulary and the snapshot that `run` has chosen."""
    vocabularies = Vocabularies.load(f"{config['output']}/vocabulary")
    assert vocabularies is not None, config["output"]
    items = vocabularies.items
    content = None if config["snapshot"] is None else Content(Snapshot.open(config["snapshot"], verify=False), items)
    queries = None if config["queries"] is None else Snapshot.open(config["queries"], verify=False)
    settings = config["settings"]
    return ImpressionEncoder(
        items, vocabularies.users, content, settings["max_behaviors"], vocabularies.features, queries
    )


def _time_gaps(settings: Ciubm, features: Features, samples: str) -> bool:
    if settings.time_gaps and features.typical_age_s is None:
        raise DataError(
            f"ciubm.time_gaps is true, but no impression of {samples}/impressions/train has behavior_times. Add that column "
            "to your impressions table, or set ciubm.time_gaps=false."
        )
    return settings.time_gaps


def _queries(
    settings: Ciubm, content: str, snapshot: Snapshot | None, queries: str | None, samples: str
) -> Snapshot | None:
    """The queries' vectors, None where the model uses none."""
    if not settings.query_vector and not (settings.query_interest and content == "mim"):
        return None
    if queries is None:
        raise DataError(
            f"ciubm.query_interest or ciubm.query_vector is true, but no impression of {samples} has a query that was "
            "encoded. Add query_text or query_image to the impressions, or set both to false."
        )
    opened = Snapshot.open(queries)
    if content == "mim" and snapshot is not None:
        check_versions(snapshot.encoder_version, opened.encoder_version, expected_by=snapshot.uri, found_in=opened.uri)
    return opened


def _opened(snapshot: str, owner: str | None) -> Snapshot:
    """The state that the interrupted attempt of `owner` has kept, else the current one."""
    opened = Snapshot.open(snapshot)
    kept = None if owner is None else kept_snapshots(opened.line).get(owner)
    return opened if kept in (None, opened.snapshot_id) else Snapshot.open(f"{opened.line}/{kept}")


def _later_rows(source: str, after_us: int, target: str) -> str:
    """The URI `target`, with the rows of `source` that are later than `after_us`; an interrupted attempt's copy is kept."""
    done = f"{target}.json"
    if not artifacts.exists(done):
        artifacts.write_json(done, {"num_rows": copy_later_rows(source, after_us, target)})
    return target


@contextlib.contextmanager
def _kept(snapshot: Snapshot | None, owner: str) -> Iterator[None]:
    """All workers, restarted ones too, read this one state; refreshes meanwhile neither change nor prune it."""
    if snapshot is None:
        yield
        return
    keep_snapshot(snapshot.line, snapshot.snapshot_id, owner=owner)
    yield  # a job that dies keeps it, for the attempt that goes on
    keep_snapshot(snapshot.line, None, owner=owner)


def _input(counts: dict[str, int], *, with_content: bool) -> list[tuple[str, str]]:
    """A line for targets and one for behaviors that are not all known with their content; the first epoch's counts."""
    lines = []
    for name in ("targets", "behaviors"):
        unknown, bare = counts.get(f"unknown_{name}", 0), counts.get(f"{name}_without_content", 0)
        if unknown or (bare and with_content):
            text = f"of {counts[name]:,} {unknown:,} not in the catalogue (trained as the unknown item)"
            lines.append((name, text + (f", {bare:,} without an embedding (a zero vector)" if with_content else "")))
    return lines


def _stopped(results: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """A line when a seed did not train to its end or its best state is not its last one."""
    early = [
        f"after {result['steps']:,} of {result['planned_steps']:,} steps, best at {result['best_step']:,}"
        for result in results
        if result["best_step"] is not None and result["best_step"] < result["planned_steps"]
    ]
    return [("stopped or best before the end", "; ".join(early))] if early else []


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
