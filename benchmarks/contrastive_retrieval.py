"""Does each part of C-SFT earn its place? Held-out recall@10 on the synthetic shop, with one part changed at a time.

Each run is the real job's code (mim_ray.pipeline) on scenario `tiny`; shop, samples and pre-training of a seed are made once
and reused. A seed is another shop, other encoders and another order of batches; differences are taken within seeds.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

from mim_ray.config import Scenario, load_scenario
from mim_ray.evaluation.seeds import mean_interval
from mim_ray.runtime.progress import format_seconds

REFERENCE = "k = 10, hard negatives, TFN, three levels"
ARMS: dict[str, tuple[str, ...]] = {
    REFERENCE: (),
    "k = 0": ("csft.num_past_batches=0",),
    "no hard negatives": ("csft.hard_negatives=false",),
    "k = 0, no hard negatives (no ST-NSG)": ("csft.num_past_batches=0", "csft.hard_negatives=false"),
    "one level (q to MM only)": ("csft.multi_level=false",),
    "concat instead of TFN": ("encoders.fusion=concat",),  # last: it needs towers of its own
}
SETTINGS = ("csft.num_past_batches=10", "csft.held_out_ratio=0.1")
ONE_WORKER = tuple(
    f"{stage}.{setting}" for stage in ("pretraining", "csft") for setting in ("num_workers=1", "in_driver=true")
)


def measure_retrieval(work: Path, *, num_seeds: int, threads: int, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """`retrieval`: every arm on every seed. Finished runs in `work` are not run again."""
    from mim_ray.runtime.cluster import cluster  # Ray is imported when it is needed

    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    start, made, left = time.monotonic(), 0, num_seeds * len(ARMS)
    with cluster(_scenario(work, 0, threads, (), overrides).run):
        for seed in range(num_seeds):
            for arm, changes in ARMS.items():
                run, fresh = _run(_scenario(work, seed, threads, changes, overrides), work)
                runs[arm].append(run)
                made, left = made + fresh, left - 1
                remaining = f", about {format_seconds((time.monotonic() - start) / made * left)} left" if made else ""
                print(f"\nseed {seed}, {arm}: recall@10 {run['recall@10']:.3f}{remaining}", flush=True)
    reference = [run["recall@10"] for run in runs[REFERENCE]]
    arms = {arm: _summary(found, reference if arm != REFERENCE else None) for arm, found in runs.items()}
    return {
        "scenario": "tiny",
        "settings": [*SETTINGS, *ONE_WORKER, "csft.batch_size=192", *overrides],
        "seeds": num_seeds,
        "interval": "95 %, Student's t over seeds; differences are within seeds",
        "num_queries": [run["num_queries"] for run in runs[REFERENCE]],
        "num_items": [run["num_items"] for run in runs[REFERENCE]],
        "before": _mean_interval([run["recall@10_before"] for run in runs[REFERENCE]]),
        "arms": arms,
    }


def retrieval_table(found: dict[str, Any]) -> list[str]:
    """Lines for a person."""
    lines = [f"{'recall@10, query to MM':<44} {'mean':>7} {'difference [95 % over seeds]':>30} {'ms/step':>9}"]
    lines.append(f"{'before C-SFT':<44} {found['before']['mean']:>7.3f}")
    for arm, row in found["arms"].items():
        change = row["difference"]
        low_high = f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]" if change else ""
        lines.append(f"{arm:<44} {row['recall@10']['mean']:>7.3f} {low_high:>30} {row['step_ms']:>9.0f}")
    return lines


def _scenario(work: Path, seed: int, threads: int, changes: tuple[str, ...], overrides: tuple[str, ...]) -> Scenario:
    settings = [f"run.root={work.resolve()}/seed{seed}", f"run.seed={seed}", f"run.num_cpus={threads}"]
    settings += [f"{stage}.threads_per_worker={threads}" for stage in ("pretraining", "csft")]
    return load_scenario("tiny", [*settings, *ONE_WORKER, "csft.batch_size=192", *SETTINGS, *overrides, *changes])


def _run(scenario: Scenario, work: Path) -> tuple[dict[str, Any], bool]:
    """Figures of one C-SFT run, and whether it was run now."""
    from mim_ray.pipeline.graph import pipeline

    chain = pipeline(scenario)
    kept = work / "arms" / f"{chain.fingerprint('csft')}.json"
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found, False
    manifest = chain.run(["csft"])["csft"]
    metrics = manifest.metrics
    before, after = metrics["retrieval"]["before"], metrics["retrieval"]["after"]
    found = {
        "recall@10": after["levels"]["mm"]["recall@10"],
        "recall@10_before": before["levels"]["mm"]["recall@10"],
        "by_level": after["levels"],
        "num_queries": after["num_queries"],
        "num_items": after["num_items"],
        "num_negatives": metrics["num_negatives"],
        "step_ms": 1_000 * metrics["seconds"] / metrics["steps"],
        "stage_s": manifest.seconds,
    }
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found))
    return found, True


def _summary(runs: list[dict[str, Any]], reference: list[float] | None) -> dict[str, Any]:
    recalls = [run["recall@10"] for run in runs]
    differences = None if reference is None else [a - b for a, b in zip(recalls, reference, strict=True)]
    return {
        "recall@10": _mean_interval(recalls) | {"by_seed": recalls},
        "difference": None if differences is None else _mean_interval(differences),
        "num_negatives": runs[0]["num_negatives"],
        "step_ms": round(statistics.median(run["step_ms"] for run in runs), 1),
        "stage_s": round(statistics.median(run["stage_s"] for run in runs), 1),
    }


def _mean_interval(values: list[float]) -> dict[str, float | None]:
    estimate = mean_interval(values)
    return {key: None if v is None else round(v, 4) for key, v in zip(("mean", "low", "high"), estimate, strict=True)}
