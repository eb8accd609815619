"""Run the experiments of a plan, each in a folder of its own, and read what they found."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mim_ray import artifacts
from mim_ray.artifacts import run_root
from mim_ray.config import Scenario
from mim_ray.csft.train import measure_encoder
from mim_ray.errors import MimRayError
from mim_ray.pipeline.graph import pipeline
from mim_ray.pipeline.reproduce.experiments import DEFAULT, Experiment, Plan
from mim_ray.pipeline.stages import Pipeline
from mim_ray.runtime.cluster import cluster
from mim_ray.runtime.progress import format_seconds


@dataclass(frozen=True)
class Outcome:
    """What one experiment found with one seed.

    Attributes:
        evaluation: as evaluation.json. retrieval: held-out retrieval of its encoder, None where it was not asked for.
    """

    evaluation: Mapping[str, Any]
    retrieval: Mapping[str, Any] | None

    def auc(self, variant: str) -> float | None:
        """AUC of a model, None where it was not trained or cannot be computed."""
        model = self.evaluation["models"].get(variant)
        return None if model is None else model["auc"]["value"]

    @property
    def recall(self) -> float | None:
        """Held-out recall@10 of query picture to h^MM."""
        return None if self.retrieval is None else self.retrieval["levels"]["mm"]["recall@10"]


@dataclass
class Results:
    """Outcomes by experiment name, one per seed, and why others are missing."""

    num_seeds: int
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    samples: str = ""


def reproduce_root(scenario: Scenario) -> str:
    """Where the experiments of a scenario and the pages about them are."""
    return f"{run_root(scenario)}/reproduce"


def run_experiments(scenario: Scenario, plan: Plan, num_seeds: int) -> Results:
    """Run what is missing, the first seed of all experiments first; finished ones are reused.

    A seed starts encoders, batches and CTR models anew; the user's data and their split stay, the synthetic shop is
    another one. An experiment that the data do not allow (no clicks for v4, say) is left out with its reason.
    """
    results = Results(num_seeds)
    with cluster(scenario.run):
        chains = {
            (seed, experiment.name): pipeline(_scenario(scenario, plan, experiment, seed))
            for seed in range(num_seeds)
            for experiment in plan.experiments
        }
        missing = [key for key, chain in chains.items() if chain.plan(["evaluation"])]
        done = len(chains) - len(missing)
        print(f"{len(chains)} experiments of {num_seeds} seeds, {done} finished before, in {reproduce_root(scenario)}")
        spent: list[float] = []
        for seed in range(num_seeds):
            for experiment in plan.experiments:
                key = (seed, experiment.name)
                if experiment.name in results.problems:
                    continue
                number = f"[{list(chains).index(key) + 1}/{len(chains)}]"
                if key in missing:
                    left = [k for k in missing[missing.index(key) :] if k[1] not in results.problems]
                    rest = f", about {format_seconds(statistics.mean(spent) * len(left))} left" if spent else ""
                    print(f"\n{number} {experiment.name}, seed {seed}{rest}", flush=True)
                start = time.monotonic()
                try:
                    outcome = _run(chains[key], experiment)
                except MimRayError as error:
                    results.problems[experiment.name] = str(error)
                    results.outcomes.pop(experiment.name, None)
                    print(f"{number} {experiment.name} is left out: {error}", flush=True)
                    if experiment.name == DEFAULT:
                        raise
                    continue
                if key in missing:
                    spent.append(time.monotonic() - start)
                results.outcomes.setdefault(experiment.name, []).append(outcome)
        results.samples = chains[0, DEFAULT].layout.samples
    return results


def _run(chain: Pipeline, experiment: Experiment) -> Outcome:
    if chain.plan(["evaluation"]):
        chain.run(["evaluation"])
    evaluation = artifacts.read_json(f"{chain.layout.stage('evaluation')}/evaluation.json")
    if not experiment.encoder:
        return Outcome(evaluation, None)
    kept = f"{chain.layout.root}/retrieval-{chain.fingerprint('extraction')}.json"
    if not artifacts.exists(kept):
        encoder = chain.layout.encoder(chain.scenario.extraction.encoder)
        artifacts.write_json(kept, measure_encoder(chain.scenario, samples=chain.layout.samples, encoder=encoder))
    return Outcome(evaluation, artifacts.read_json(kept))


def _scenario(scenario: Scenario, plan: Plan, experiment: Experiment, seed: int) -> Scenario:
    """The user's scenario with the experiment's settings, its folder and where it may find finished stages."""
    values = scenario.model_dump()
    for key, value in experiment.settings.items():
        section = values
        *path, last = key.split(".")
        for part in path:
            section = section[part]
        section[last] = value
    folder = f"{reproduce_root(scenario)}/seed-{seed}"
    others = [f"{folder}/{other.name}" for other in plan.experiments if other.name != experiment.name]
    values["run"].update(
        root=f"{folder}/{experiment.name}",
        center=None,
        reuse=(*scenario.run.reuse, run_root(scenario), *others),
        seed=scenario.run.seed + seed,
    )
    values["ciubm"].update(variants=experiment.variants, seeds=(0,))
    return Scenario.model_validate(values)
