"""Which stages a scenario has: the picture of docs/architecture.md as a list."""

from __future__ import annotations

import pyarrow.parquet as pq

from mim_ray import artifacts
from mim_ray.ciubm import evaluate as ctr_evaluate
from mim_ray.ciubm import train as ctr_train
from mim_ray.config import Scenario
from mim_ray.csft import train as csft_train
from mim_ray.data import events, synthetic
from mim_ray.errors import ConfigError
from mim_ray.extraction import run as extraction_run
from mim_ray.pipeline.layout import Layout
from mim_ray.pipeline.stages import Pipeline, Stage, with_settings
from mim_ray.pretraining import train as pretraining_train
from mim_ray.representation_center.snapshot import write_snapshot
from mim_ray.runtime.summary import StageResult

STYLE_VERSION = "true-styles"


def pipeline(scenario: Scenario) -> Pipeline:
    """The stages of a scenario, parents first: shop (when there is no data.root), samples, pretraining, csft, extraction,
    a ctr/<variant> for each of ciubm.variants, evaluation.

    Raises:
        ConfigError: only models on true styles are asked for, which the user's own data do not have.
    """
    synthetic_shop = scenario.data.root is None
    if not synthetic_shop:
        scenario = _without_oracles(scenario)
    encoder_stage = "csft" if scenario.extraction.encoder == "csft" else "pretraining"
    stages = [Stage("shop", "Synthetic shop", ("synthetic",), (), _shop)] if synthetic_shop else []
    stages += [
        Stage(
            "samples",
            "Samples: interest pairs and impressions",
            (
                "samples",
                "data.images_root",
                "data.max_image_bytes",
                "data.max_image_pixels",
                "data.max_title_chars",
                "data.features",
            ),
            ("shop",) if synthetic_shop else (),
            _samples,
            reads_user_tables=True,
        ),
        Stage(
            "pretraining",
            "Pre-training: DDA, DMA",
            ("encoders", "pretraining"),
            ("samples",),
            _pretraining,
            resumes=True,
        ),
        Stage("csft", "C-SFT", ("csft",), ("samples", "pretraining"), _csft, resumes=True),
        Stage(
            "extraction",
            "Extraction and snapshot",
            ("extraction", "run.center"),
            ("samples", encoder_stage),
            _extraction,
        ),
    ]
    sources = {"base": ("samples",), "mim": ("samples", "extraction"), "style": ("shop", "samples")}
    if scenario.ciubm.query_vector:  # all models read it
        sources = {content: tuple(dict.fromkeys((*parents, "extraction"))) for content, parents in sources.items()}
    variants = scenario.ciubm.variants
    for variant in variants:
        parents = sources[variant.partition("-")[2]]
        stages.append(Stage(f"ctr/{variant}", f"CTR model {variant}", ("ciubm",), parents, _ctr(variant), resumes=True))
    models = tuple(f"ctr/{variant}" for variant in variants)
    stages.append(
        Stage("evaluation", "Evaluation", ("evaluation", "ciubm.variants"), ("samples", *models), _evaluation)
    )
    return Pipeline(scenario, stages)


def _without_oracles(scenario: Scenario) -> Scenario:
    variants = [variant for variant in scenario.ciubm.variants if not variant.endswith("-style")]
    if not variants:
        raise ConfigError(
            f"ciubm.variants = {list(scenario.ciubm.variants)}, but true styles are known of the synthetic shop only. "
            "Name base and mim models, or leave data.root out."
        )
    if len(variants) < len(scenario.ciubm.variants):
        print("models on true styles are left out: only the synthetic shop knows them")
    return with_settings(scenario, "ciubm", variants=variants)


def snapshot_uri(layout: Layout, content: str) -> str | None:
    """Snapshot behind a variant's content: base has none."""
    if content == "base":
        return None
    if content == "style":
        return layout.true_styles
    return str(artifacts.read_json(f"{layout.stage('extraction')}/{artifacts.MANIFEST}")["metrics"]["snapshot"])


def reference_snapshot(layout: Layout) -> str | None:
    """Snapshot behind the evaluation's mean cosine: what the run's extraction left, also when only base models are judged."""
    manifest = artifacts.read_manifest(layout.stage("extraction"))
    return None if manifest is None else str(manifest.metrics["snapshot"])


def _queries_uri(scenario: Scenario, layout: Layout, variant: str) -> str | None:
    """Snapshot of the queries' vectors, where the variant may use them."""
    settings = scenario.ciubm
    if not settings.query_vector and not (settings.query_interest and variant.endswith("-mim")):
        return None
    found = artifacts.read_json(f"{layout.stage('extraction')}/{artifacts.MANIFEST}")["metrics"]["queries"]
    return None if found is None else str(found)


def _shop(scenario: Scenario, layout: Layout) -> StageResult:
    result = synthetic.run(scenario, output=layout.stage("shop"))
    styles = pq.read_table(artifacts.local_copy(f"{layout.stage('shop')}/truth/styles.parquet"))
    vectors = styles["style"].combine_chunks()
    matrix = vectors.values.to_numpy().reshape(len(vectors), -1)
    write_snapshot(layout.true_styles, styles["item_id"].combine_chunks(), matrix, encoder_version=STYLE_VERSION)
    return result


def _samples(scenario: Scenario, layout: Layout) -> StageResult:
    return events.run(scenario, data_root=layout.data_root, output=layout.samples, rejects=layout.rejects)


def _pretraining(scenario: Scenario, layout: Layout) -> StageResult:
    return pretraining_train.run(
        scenario, samples=layout.samples, output=layout.stage("pretraining"), rejects=layout.rejects
    )


def _csft(scenario: Scenario, layout: Layout) -> StageResult:
    return csft_train.run(
        scenario,
        samples=layout.samples,
        encoder=layout.encoder("pretraining"),
        output=layout.stage("csft"),
        rejects=layout.rejects,
    )


def _extraction(scenario: Scenario, layout: Layout) -> StageResult:
    return extraction_run.run(
        scenario,
        data_root=layout.data_root,
        samples=layout.samples,
        encoder=layout.encoder(scenario.extraction.encoder),
        output=layout.stage("extraction"),
        center=layout.center,
        rejects=layout.rejects,
    )


class _ctr:
    """Training of one variant, as a stage function."""

    def __init__(self, variant: str) -> None:
        self.variant = variant

    def __call__(self, scenario: Scenario, layout: Layout) -> StageResult:
        return ctr_train.run(
            scenario,
            variant=self.variant,
            samples=layout.samples,
            snapshot=snapshot_uri(layout, self.variant.partition("-")[2]),
            output=layout.stage(f"ctr/{self.variant}"),
            queries=_queries_uri(scenario, layout, self.variant),
        )


def _evaluation(scenario: Scenario, layout: Layout) -> StageResult:
    variants = scenario.ciubm.variants
    return ctr_evaluate.run(
        scenario,
        samples=layout.samples,
        variants={variant: layout.stage(f"ctr/{variant}") for variant in variants},
        snapshots={variant: snapshot_uri(layout, variant.partition("-")[2]) for variant in variants},
        snapshot=reference_snapshot(layout),
        truth=layout.true_probs if scenario.data.root is None else None,
        output=layout.stage("evaluation"),
    )
