"""A trained CTR model as files, and the ranker that serving loads from them: plain PyTorch, no Ray, no encoders.

ctr/<variant>/ctr.json                   variant, architecture, encoder version, metrics
              vocabulary/                items.arrow, categories.json, users.arrow, features.json, feature.<name>.arrow
              seed-<s>/network.safetensors, tables.safetensors
                       optimizer.safetensors, for a training that goes on from here; serving does not read it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mim_ray import artifacts
from mim_ray.ciubm.dataset import IndexedBatch, gather_batch
from mim_ray.ciubm.features import Features
from mim_ray.ciubm.machine_export import Machines, MachineTables, network_of
from mim_ray.ciubm.model import CtrNetwork, NetworkConfig
from mim_ray.ciubm.request import Request
from mim_ray.ciubm.tables import IdTables, Lookup
from mim_ray.ciubm.vocabulary import ItemIndex, Vocabulary
from mim_ray.data.event_log import UNKNOWN_TIME
from mim_ray.data.ids import as_strings
from mim_ray.errors import ArtifactError, VersionMismatchError
from mim_ray.representation_center.snapshot import Snapshot

MultiGet = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray, Sequence[str | None]]]
"""ids -> embeddings (n, D) float32, found (n,) bool, and the category of items that the catalogue did not have yet."""


class Ranker:
    """A CTR model ready to score: the networks and tables of all its seeds, vocabularies, item -> category, features.

    Attributes:
        encoder_version: of the embeddings it was trained on; None when it uses no content.
        content_width: D, None when it uses no content.
        query_width: D of queries, None when it uses none. query_encoder_version: of the encoder of their vectors.
    """

    def __init__(
        self,
        info: dict[str, Any],
        items: ItemIndex,
        users: Vocabulary,
        features: Features,
        models: Sequence[tuple[CtrNetwork, Lookup]],
    ) -> None:
        self.info = info
        self.variant: str = info["variant"]
        self.encoder_version: str | None = info["encoder_version"]
        self.max_behaviors: int = info["max_behaviors"]
        self.content_width: int | None = info["network"]["content_width"]
        queries = info.get("queries")
        self.query_width: int | None = None if queries is None else queries["width"]
        self.query_encoder_version: str | None = None if queries is None else queries["encoder_version"]
        self.items, self.users, self.features, self.models = items, users, features, list(models)
        self._category = {name: row for row, name in enumerate(items.categories, start=1)}

    def score(
        self,
        user_id: str,
        behaviors: Sequence[str],
        candidates: Sequence[str],
        multi_get: MultiGet | None = None,
        *,
        behavior_times: Sequence[int] | None = None,
        timestamp: int = UNKNOWN_TIME,
        context: pa.Table | None = None,
        query_mm: np.ndarray | None = None,
    ) -> np.ndarray:
        """(C,) click probability of each candidate for one user, the mean over seeds.

        Args:
            behaviors: the user's past items, oldest first; the newest `max_behaviors` are used.
            multi_get: where MM embeddings come from, and the category of items newer than this model. An item that
                it does not find has no content; needed unless the model uses no content.
            behavior_times: microseconds UTC, one for each behavior. timestamp: the same of the request. Without them
                behaviors count as old as those of train typically are.
            context: declared features, a row for each candidate. What is not there has its default.
            query_mm: (D,) vector of the query by the encoder of `query_encoder_version`; None without a query.
        """
        request = self.request(
            user_id,
            behaviors,
            candidates,
            behavior_times=behavior_times,
            timestamp=timestamp,
            context=context,
            query_mm=query_mm,
        )
        if multi_get is not None:
            return self.predict(request.batch(*multi_get(request.ids)))
        if self.content_width is not None:
            raise ValueError(f"{self.variant} uses content: give multi_get.")
        return self.predict(request.batch())

    def request(
        self,
        user_id: str,
        behaviors: Sequence[str],
        candidates: Sequence[str],
        *,
        behavior_times: Sequence[int] | None = None,
        timestamp: int = UNKNOWN_TIME,
        context: pa.Table | None = None,
        query_mm: np.ndarray | None = None,
    ) -> Request:
        """What `score` is asked, as rows of this model's tables; its arguments."""
        behaviors = list(behaviors)[-self.max_behaviors :]
        ids = [*behaviors, *candidates]
        keys = as_strings(ids)
        position = self.items.vocabulary.encode(keys)
        return Request(
            ids=ids,
            keys=keys,
            num_behaviors=len(behaviors),
            known=position > 0,
            item_row=self.items.rows(keys, position),
            category=self.items.category[position],
            user=self.users.encode([user_id]),
            category_rows=self._category,
            content_width=self.content_width,
            behavior_age_s=self._ages(behavior_times, timestamp, len(behaviors)),
            features=self.features.encode(_nothing(len(candidates)) if context is None else context),
            query_mm=self._query(query_mm),
        )

    def open_queries(self) -> Snapshot | None:
        """The vectors of the impressions' queries, of the encoder that this model was trained with; None where it uses none.

        Raises:
            VersionMismatchError: they are of another encoder version now.
        """
        described = self.info.get("queries")
        if described is None:
            return None
        found = Snapshot.open(described["line"], verify=False)
        if found.encoder_version != described["encoder_version"]:
            raise VersionMismatchError(
                f"{self.variant} was trained on queries of {described['encoder_version']}, but {described['line']} holds those "
                f"of {found.encoder_version}. Train the CTR model on them."
            )
        return found

    def _query(self, query_mm: np.ndarray | None) -> np.ndarray | None:
        if self.query_width is None:
            return None
        vector = np.zeros(self.query_width) if query_mm is None else query_mm
        return vector.astype(np.float32).reshape(1, self.query_width)

    def _ages(self, times: Sequence[int] | None, timestamp: int, num_behaviors: int) -> np.ndarray | None:
        if self.features.typical_age_s is None:
            return None
        known = np.full(num_behaviors, UNKNOWN_TIME)
        if times is not None:
            known[:] = np.asarray(times, np.int64)[len(times) - num_behaviors :]
        ages = np.zeros((1, max(num_behaviors, 1)), np.float32)
        ages[0, :num_behaviors] = self.features.ages(np.full(num_behaviors, timestamp), known)
        return ages

    @torch.inference_mode()
    def predict(self, batch: IndexedBatch, tables: Sequence[Lookup] | None = None) -> np.ndarray:
        """(B,) float64 click probability, the mean over seeds.

        Args:
            tables: of each seed, in the place of this ranker's own.
        """
        total = np.zeros(len(batch.target))
        given = [own for _, own in self.models] if tables is None else tables
        for (network, _), of_seed in zip(self.models, given, strict=True):
            total += torch.sigmoid(network(gather_batch(batch, of_seed)).double()).numpy()
        return total / len(self.models)

    @torch.inference_mode()
    def relevance(
        self, batch: IndexedBatch, rows: np.ndarray, tables: Sequence[Lookup] | None = None
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Which behaviors drove the scores of some rows: of the ID module and of content (CiUBM.relevance), each (n, L), the
        mean over seeds.

        Args:
            rows: (n,) of the batch. tables: as of `predict`.
        """
        chosen = replace(batch, target=batch.target[torch.from_numpy(rows)], features=None)
        given = [own for _, own in self.models] if tables is None else tables
        found = [
            network.ciubm.relevance(gather_batch(chosen, of_seed))
            for (network, _), of_seed in zip(self.models, given, strict=True)
        ]
        by_id, by_content = zip(*found, strict=True)
        return tuple(  # type: ignore[return-value]
            None if of_seeds[0] is None else torch.stack(of_seeds).mean(dim=0).numpy()
            for of_seeds in (by_id, by_content)
        )

    def of_seed(self, index: int) -> Ranker:
        """The ranker with only the model of one seed."""
        return Ranker(self.info, self.items, self.users, self.features, [self.models[index]])


def _nothing(num_rows: int) -> pa.Table:
    """Rows without any column that is a feature."""
    return pa.table({"": pa.nulls(num_rows)})


def save_model(uri: str, state: Mapping[str, Tensor]) -> None:
    """Write one seed's state below `uri`: tensors called network/… and tables/… (what serving reads), and optimizers."""
    parts: dict[str, dict[str, Tensor]] = {"network": {}, "tables": {}, "optimizer": {}}
    for name, tensor in state.items():
        part, _, rest = name.partition("/")
        if part in ("network", "tables"):
            parts[part][rest] = tensor
        else:
            parts["optimizer"][name] = tensor
    for part, tensors in parts.items():
        if tensors:
            artifacts.write_tensors(f"{uri}/{part}.safetensors", tensors)


def load_state(uri: str) -> dict[str, Tensor]:
    """All that `save_model` was given.

    Raises:
        ArtifactError: missing or damaged.
    """
    state = artifacts.read_tensors(f"{uri}/optimizer.safetensors")
    for part in ("network", "tables"):
        state |= {
            f"{part}/{name}": tensor for name, tensor in artifacts.read_tensors(f"{uri}/{part}.safetensors").items()
        }
    return state


def load_ranker(uri: str, *, encoder_version: str | None = None, machines: Machines | None = None) -> Ranker:
    """The CTR model at `uri` (ctr/<variant>).

    Args:
        encoder_version: of the embeddings that will be looked up, to be compared with the model's; None: no comparison.
        machines: read ID tables and networks there (machine_export.py) instead of from files.

    Raises:
        ArtifactError: missing or damaged, or (read from files) a weight is no number.
        VersionMismatchError: the model was trained on another encoder version's embeddings.
    """
    info = artifacts.read_json(f"{uri}/ctr.json")
    trained_on = info["encoder_version"]
    if encoder_version is not None and trained_on is not None and trained_on != encoder_version:
        raise VersionMismatchError(
            f"{uri} was trained on embeddings of {trained_on}, but the embeddings at hand are of {encoder_version}. "
            "Train the CTR model on them, or serve the snapshot that it was trained on."
        )
    items, users = ItemIndex.load(f"{uri}/vocabulary"), Vocabulary.load(f"{uri}/vocabulary/users.arrow")
    features = Features.load(f"{uri}/vocabulary")
    config = NetworkConfig.from_json(info["network"])
    if features.context_width(info["id_dim"]) != config.context_width:
        raise ArtifactError(f"{uri}/vocabulary/features.json does not fit ctr.json. Train it again.")
    names = {"item", "category", *features.num_table_rows} | ({"user"} if config.user_width else set())
    models = []
    for seed in info["seeds"]:
        network = CtrNetwork(config)
        folder = f"{uri}/seed-{seed}"
        tables: Lookup
        if machines is None:
            weights = _numbers(f"{folder}/network.safetensors")
            tables = IdTables.from_state(_numbers(f"{folder}/tables.safetensors"))
        else:
            weights = network_of(machines, seed)
            tables = MachineTables(machines, seed, names)
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise ArtifactError(f"{folder} does not fit ctr.json ({error}). Train it again.") from None
        models.append((network.eval(), tables))
    return Ranker(info, items, users, features, models)


def _numbers(uri: str) -> dict[str, Tensor]:
    """The tensors at `uri`, all of whose numbers are finite."""
    tensors = artifacts.read_tensors(uri)
    # in one order: readers that look again tell the same problem once
    bad = sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())
    if bad:
        raise ArtifactError(
            f"{uri} holds weights that are no numbers (in {', '.join(bad[:3])}). Train the model again."
        )
    return tensors
