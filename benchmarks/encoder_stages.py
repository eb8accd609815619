"""Table 3 on one's own data: what each stage of the encoder adds, untrained / DDA / DMA / C-SFT, over several seeds.

    python benchmarks/encoder_stages.py --config movietweetings data.root=/path/to/movietweetings --seeds 3 --json table3.json

A seed is another start of the encoders, other batches and other CTR models; the data and their split stay. For each stage the
held-out recall@10 (query picture to the item chosen, whole catalogue) and the AUC of the +MIM model on its embeddings are
measured, through the same code as the jobs. Finished runs in --work are not run again. Recipes are to be chosen on validation
(`validation_auc` in the output), never on these test figures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from measuring import mean_interval

from mim_ray import artifacts
from mim_ray.config import Scenario, load_scenario

STAGES = ("untrained", "dda", "pretraining", "csft")
TITLES = {"untrained": "untrained", "dda": "+DDA", "pretraining": "+DDA+DMA", "csft": "+C-SFT"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny", help="scenario name or YAML file")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument("--work", default="runs/encoder_stages", help="folder for the runs")
    parser.add_argument("--backbone", default="sim", choices=("sim", "din", "average"), help="user behavior model")
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("overrides", nargs="*", help="section.key=value, as for the jobs")
    args = parser.parse_args()
    found = measure(args.config, args.seeds, Path(args.work).resolve(), args.backbone, tuple(args.overrides))
    print("\n".join(table(found)))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


def measure(config: str, num_seeds: int, work: Path, backbone: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Figures by stage, a list entry per seed."""
    from mim_ray.runtime.cluster import cluster  # Ray is imported when it is needed

    by_stage: dict[str, list[dict[str, Any]]] = {stage: [] for stage in STAGES}
    base: list[float] = []
    with cluster(load_scenario(config, list(overrides)).run):
        for seed in range(num_seeds):
            for stage in STAGES:
                scenario = load_scenario(
                    config,
                    [
                        *overrides,
                        f"run.root={work}/seed{seed}",
                        f"run.seed={seed}",
                        f"extraction.encoder={stage}",
                        f"ciubm.variants=[{backbone}-base,{backbone}-mim]",
                    ],
                )
                figures = _run(scenario, stage, backbone, work)
                by_stage[stage].append(figures)
                print(f"seed {seed}, {TITLES[stage]}: {figures}", flush=True)
            base.append(by_stage["csft"][-1]["base_auc"])
    return {"config": config, "overrides": list(overrides), "backbone": backbone, "base_auc": base, "stages": by_stage}


def table(found: dict[str, Any]) -> list[str]:
    """Lines for a person: mean and 95 % interval over the seeds; differences to the base are within seeds."""
    lines = [f"{'':<12} {'recall@10':>22} {'AUC of +MIM':>26} {'over base':>28}"]
    lines.append(f"{'base':<12} {'':>22} {interval(found['base_auc'])}")
    for stage, runs in found["stages"].items():
        recall, auc = [run["recall@10"] for run in runs], [run["auc"] for run in runs]
        gain = [run["auc"] - run["base_auc"] for run in runs]
        lines.append(f"{TITLES[stage]:<12} {interval(recall)} {interval(auc)} {interval(gain, signed=True)}")
    return lines


def interval(values: list[float], signed: bool = False) -> str:
    """Mean [95 %, Student's t over the seeds]."""
    form = "+.4f" if signed else ".4f"
    mean, low, high = mean_interval(values)
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _run(scenario: Scenario, stage: str, backbone: str, work: Path) -> dict[str, Any]:
    from mim_ray.csft.train import measure_encoder
    from mim_ray.pipeline.graph import pipeline

    chain = pipeline(scenario)
    kept = work / "figures" / f"{chain.fingerprint('evaluation')}.json"
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    manifests = chain.run(["csft", "evaluation"])
    retrieval = measure_encoder(
        scenario, samples=chain.layout.samples, encoder=chain.layout.encoder(scenario.extraction.encoder)
    )
    models = artifacts.read_json(f"{chain.layout.stage('evaluation')}/evaluation.json")["models"]
    found = {
        "encoder_version": manifests["extraction"].metrics["encoder_version"],
        "recall@10": retrieval["levels"]["mm"]["recall@10"],
        "by_level": {level: row["recall@10"] for level, row in retrieval["levels"].items()},
        "num_items": retrieval["num_items"],
        "auc": models[f"{backbone}-mim"]["auc"]["value"],
        "base_auc": models[f"{backbone}-base"]["auc"]["value"],
        "validation_auc": manifests[f"ctr/{backbone}-mim"].metrics.get("validation_auc"),
    }
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
