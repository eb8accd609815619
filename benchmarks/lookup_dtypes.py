"""What float16 and int8 cost: the same embeddings of a finished run in each dtype, seen by its CTR model and by retrieval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

if TYPE_CHECKING:
    from lookup import Plan

    from mim_ray.representation_center.snapshot import Snapshot

DTYPES = ("float32", "float16", "int8")
RECALL_AT = (10, 100)
MODEL = "sim-mim"
_MOST_QUERIES = 2_000


def cost_of_dtypes(plan: Plan) -> dict[str, Any]:
    """`dtypes`: for each dtype the AUC of the run's model, recall of the neighbours that float32 finds, recall of bought items.

    - `auc`: on the run's test rows, model sim-mim, trained on float32, all else equal.
    - `neighbours@k`: part of the k nearest items (cosine) in float32 that are among the k nearest in this dtype; every item.
    - `bought@k`: held-out image searches whose bought item is among the k nearest items to the picture.
    """
    if plan.run is None:
        return {"dtypes": {"missing": "Name a finished run with --run, for example runs/demo after `make demo`."}}
    from mim_ray.representation_center.build import build_snapshot
    from mim_ray.representation_center.table import EmbeddingTable

    root = plan.run.rstrip("/")
    table = EmbeddingTable(f"{root}/center/table")
    version = json.loads(Path(f"{root}/ctr/{MODEL}/ctr.json").read_text())["encoder_version"]
    lines = {dtype: f"{plan.work}/dtypes/{dtype}" for dtype in DTYPES}
    snapshots = {dtype: build_snapshot(table, version, line, dtype=dtype) for dtype, line in lines.items()}
    exact = snapshots["float32"]
    queries, bought, left_out = _searches(root, exact)
    nearest = {dtype: _nearest(_unit(_vectors(one)), max(RECALL_AT)) for dtype, one in snapshots.items()}
    found: dict[str, Any] = {
        "items": exact.num_rows,
        "width": exact.width,
        "searches": len(queries),
        "test_rows": pq.ParquetDataset(f"{root}/samples/impressions/test").read(["item_id"]).num_rows,
    }
    for dtype, snapshot in snapshots.items():
        ranks = _ranks(queries, _unit(_vectors(snapshot)), bought, left_out)
        found[dtype] = {
            "auc": round(_auc(root, snapshot), 6),
            **{f"neighbours@{k}": round(shared(nearest["float32"], nearest[dtype], k), 5) for k in RECALL_AT},
            **{f"bought@{k}": round(float((ranks <= k).mean()), 4) for k in RECALL_AT},
            "mapped_bytes_per_item": round(snapshot.num_mapped_bytes / snapshot.num_rows, 1),
        }
    return {"dtypes": found}


def shared(expected: np.ndarray, found: np.ndarray, k: int) -> float:
    """Mean part of each row's first k of `expected` that are among the first k of `found`."""
    return float(np.mean([len(np.intersect1d(a[:k], b[:k])) / k for a, b in zip(expected, found, strict=True)]))


def _vectors(snapshot: Snapshot) -> torch.Tensor:
    return torch.from_numpy(snapshot.gather(np.arange(snapshot.num_rows)))


def _unit(matrix: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(matrix.double(), dim=1)


def _nearest(unit: torch.Tensor, k: int) -> np.ndarray:
    """(N, k) nearest other items of every item."""
    near = []
    for first in range(0, len(unit), 1_024):
        cosine = unit[first : first + 1_024] @ unit.T
        cosine[torch.arange(len(cosine)), torch.arange(first, first + len(cosine))] = -2
        near.append(cosine.topk(min(k, len(unit) - 1), dim=1).indices)
    return torch.cat(near).numpy()


def _ranks(queries: torch.Tensor, items: torch.Tensor, bought: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """(Q,) place of each query's bought item among all items but the one that the picture belongs to."""
    cosine = _unit(queries) @ items.T
    best = cosine[torch.arange(len(queries)), torch.from_numpy(bought)]
    own = torch.from_numpy(np.flatnonzero(left_out >= 0))
    cosine[own, torch.from_numpy(left_out[left_out >= 0])] = -2
    return 1 + (cosine > best[:, None]).sum(1).numpy()


def _searches(root: str, snapshot: Snapshot) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Embedded pictures of held-out pairs, the snapshot's row of what was bought, and that of the picture's item, -1 if none."""
    from mim_ray.config import Scenario
    from mim_ray.csft.chunks import PairReader
    from mim_ray.csft.items import ItemLoader
    from mim_ray.data.catalogue import Catalogue
    from mim_ray.encoders.item_encoder import ItemEncoder

    scenario = Scenario(**json.loads(Path(f"{root}/csft/artifact.json").read_text())["scenario"])
    encoder = ItemEncoder.load(f"{root}/csft/encoder")
    catalogue = Catalogue.open(f"{root}/samples/catalogue")
    reader = PairReader(ItemLoader(catalogue, encoder.picture, scenario.data), scenario.csft)
    pairs = reader.held_out(f"{root}/samples/interest_pairs", _MOST_QUERIES)
    if pairs is None:
        raise SystemExit(f"No pair of {root}/samples/interest_pairs is held out.")
    rows = np.append(snapshot.lookup(catalogue.ids), -1)
    bought, own = rows[pairs.items], rows[pairs.query_items]
    usable = np.flatnonzero(bought >= 0)
    encoder.eval()
    with torch.no_grad():
        parts = [
            encoder.encode_image(torch.from_numpy(pairs.pixels[part]))
            for part in np.array_split(usable, 1 + len(usable) // 256)
        ]
    return torch.cat(parts), bought[usable], own[usable]


def _auc(root: str, snapshot: Snapshot) -> float:
    from mim_ray.ciubm.export import load_ranker
    from mim_ray.ciubm.predict import predict
    from mim_ray.evaluation.metrics import auc

    rows = f"{root}/samples/impressions/test"
    ranker = load_ranker(f"{root}/ctr/{MODEL}", encoder_version=snapshot.encoder_version)
    prob = np.concatenate([prob.mean(axis=0) for _, prob in predict(ranker, snapshot, rows)])
    labels = pa.concat_tables(pq.read_table(file, columns=["label"]) for file in sorted(Path(rows).glob("*.parquet")))
    value = auc(np.asarray(labels["label"]), prob)
    return float("nan") if value is None else value
