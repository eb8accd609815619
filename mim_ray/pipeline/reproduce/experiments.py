"""Which runs a table needs, and which of their models is which row.

An experiment is a scenario that differs from the user's in a few settings. Its stages that do not depend on those are read
from the other experiments (run.reuse), so that each one trains only what is its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mim_ray.ciubm import backbones
from mim_ray.pipeline.reproduce import paper

DEFAULT = "default"
BACKBONE_TITLES = {
    "average": "average pooling",
    "din": "DIN",
    "dien": "DIEN",
    "bst": "BST",
    "twin": "TWIN",
    "sim": "SIM",
}


@dataclass(frozen=True)
class Experiment:
    """Settings that differ, and the models to train and judge. `encoder`: its retrieval is measured."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    variants: tuple[str, ...] = ()
    encoder: bool = False


@dataclass(frozen=True)
class Row:
    """One row of a table: a model of an experiment.

    Attributes:
        over: variant of the default experiment from which the difference is taken, None for none.
        paper_auc: what the paper reports, None where it does not.
    """

    label: str
    experiment: str
    variant: str
    over: str | None
    paper_auc: float | None = None
    paper_gain: float | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that was asked for.

    Attributes:
        rows: by table number. skipped: sentences on what is left out, and why.
    """

    backbone: str
    experiments: Sequence[Experiment]
    rows: Mapping[str, Sequence[Row]]
    skipped: Sequence[str]


def make_plan(
    tables: Sequence[int],
    figures: Sequence[int],
    *,
    backbone: str,
    true_styles: bool,
    supervision: str,
    vision: Mapping[str, str],
    text: Mapping[str, str],
) -> Plan:
    """The experiments behind tables 2-5 and 7 and figures 5 and 6 (Tables 1 and 6 need none of their own).

    Args:
        backbone: of all tables but Table 2. true_styles: the synthetic shop's styles are known.
        supervision: that of the default experiment, which is the row of Table 4 with it.
        vision, text: towers of Figure 5, model name -> folder or `hub`.
    """
    base, mim = f"{backbone}-base", f"{backbone}-mim"
    rows: dict[str, list[Row]] = {}
    found: dict[str, Experiment] = {}
    variants = [base, mim] + ([f"{backbone}-style"] if true_styles else [])

    def add(name: str, settings: Mapping[str, Any], encoder: bool = False) -> str:
        found.setdefault(name, Experiment(name, settings, (mim,), encoder))
        return name

    if 2 in tables:
        rows["2"] = []
        for name, title in BACKBONE_TITLES.items():
            if name not in backbones.NAMES:
                continue
            of_base, of_mim = paper.TABLE_2[name]
            variants += [f"{name}-base", f"{name}-mim"]
            rows["2"].append(Row(title, DEFAULT, f"{name}-base", None, of_base))
            rows["2"].append(Row(f"{title} + MIM", DEFAULT, f"{name}-mim", f"{name}-base", of_mim, of_mim - of_base))
    if 3 in tables:
        titles = {"untrained": "without training", "dda": "+ DDA", "pretraining": "+ DDA + DMA"}
        rows["3"] = [Row("base", DEFAULT, base, None, paper.BASE_AUC)]
        for stage, title in titles.items():
            name = add(f"encoder-{stage}", {"extraction.encoder": stage}, encoder=True)
            rows["3"].append(_row(title, name, mim, base, paper.TABLE_3[stage]))
        rows["3"].append(_row("+ DDA + DMA + C-SFT (MIM)", DEFAULT, mim, base, paper.MIM_AUC))
    if 4 in tables:
        versions = {
            "v1": ("category", "cross-entropy on categories"),
            "v2": ("click-binary", "binary cross-entropy, click"),
            "v3": ("purchase-binary", "binary cross-entropy, purchase"),
            "v4": ("click", "contrastive, click"),
            "v5": ("purchase", "contrastive, purchase (MIM)"),
        }
        rows["4"] = [Row("base", DEFAULT, base, None, paper.BASE_AUC)]
        for version, (value, title) in versions.items():
            own = value == supervision
            name = DEFAULT if own else add(f"csft-{value}", {"csft.supervision": value}, encoder=True)
            rows["4"].append(_row(f"{version}: {title}", name, mim, base, paper.TABLE_4[version]))
    if 5 in tables:
        without: dict[str, tuple[str, Mapping[str, Any], bool]] = {
            "TFN": ("without-tfn", {"encoders.fusion": "concat"}, True),
            "ST-NSG": ("without-st-nsg", {"csft.space_time_negatives": False}, True),
            "multi-level InfoNCE": ("without-multi-level", {"csft.multi_level": False}, True),
            "C-SFT": ("encoder-pretraining", {"extraction.encoder": "pretraining"}, True),
            "ID interest module": ("without-id-module", {"ciubm.id_module": False}, False),
            "content interest module": ("without-content-module", {"ciubm.content_module": False}, False),
            "fusion interest module": ("without-fusion-module", {"ciubm.fusion_module": False}, False),
        }
        rows["5"] = [_row("MIM", DEFAULT, mim, mim, paper.MIM_AUC)]
        for part, (name, settings, encoder) in without.items():
            rows["5"].append(_row(f"without {part}", add(name, settings, encoder), mim, mim, paper.TABLE_5[part]))
        for title, name, settings in _OPTIONS:
            rows["5"].append(_row(title, add(name, settings), mim, mim, None))
    skipped = []
    if 5 in figures:
        if not vision and not text:
            skipped.append(
                "Figure 5 is skipped: it needs folders with public weights (safetensors as timm or transformers save them). Name "
                "each with --vision MODEL=FOLDER and --text MODEL=FOLDER, for example --vision resnet50=/models/resnet50 "
                "--text BAAI/bge-base-en-v1.5=/models/bge; docs/encoders.md lists the paper's."
            )
        rows["figure 5"] = []
        for kind, towers in (("vision", vision), ("text", text)):
            for model, folder in towers.items():
                settings = {
                    f"encoders.{kind}.model": model,
                    f"encoders.{kind}.weights": folder,
                    f"encoders.{kind}.model_args": {},
                }
                if kind == "vision":
                    settings["encoders.vision.image_size"] = None
                name = add(f"{kind}-{model.replace('/', '-').replace(':', '-')}", settings, encoder=True)
                rows["figure 5"].append(_row(f"{kind} {model}", name, mim, base, None))
    default = Experiment(DEFAULT, {}, tuple(dict.fromkeys(variants)), encoder=True)
    return Plan(backbone, [default, *found.values()], rows, skipped)


_OPTIONS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    (
        "Eqs. 7-9 as written: sums, no similarity histogram",
        "strict",
        {"ciubm.similarity_histogram": False, "ciubm.content_norm": "sum"},
    ),
    ("sums instead of means in Eqs. 7 and 8", "sums", {"ciubm.content_norm": "sum"}),
    ("with the target's own MM vector", "target-content", {"ciubm.target_content": True}),
    ("with SA-TA", "content-attention", {"ciubm.content_attention": True}),
)
"""Beyond the paper: what the default has more, or could have."""


def _row(label: str, experiment: str, variant: str, over: str, paper_auc: float | None) -> Row:
    """A row compared with `over` of the default experiment; MIM itself is not compared with itself."""
    if experiment == DEFAULT and variant == over:
        return Row(label, experiment, variant, None, paper_auc)
    reference = paper.MIM_AUC if over == variant else paper.BASE_AUC
    return Row(label, experiment, variant, over, paper_auc, None if paper_auc is None else paper_auc - reference)
