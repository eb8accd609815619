"""A trained CTR model as files, and the ranker that serving loads from them: plain PyTorch, no Ray, no encoders.

ctr/<variant>/ctr.json                   variant, architecture, encoder version, metrics
              vocabulary/                items.arrow, categories.json, users.arrow
              seed-<s>/network.safetensors, tables.safetensors
                       optimizer.safetensors, for a training that goes on from here; serving does not read it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mim_ray import artifacts
from mim_ray.ciubm.dataset import IndexedBatch, gather_batch
from mim_ray.ciubm.machine_export import Machines, MachineTables, network_of
from mim_ray.ciubm.model import CtrNetwork, NetworkConfig
from mim_ray.ciubm.tables import IdTables, Lookup
from mim_ray.ciubm.vocabulary import ItemIndex, Vocabulary
from mim_ray.errors import ArtifactError, VersionMismatchError

MultiGet = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray, Sequence[str | None]]]
"""ids -> embeddings (n, D) float32, found (n,) bool, and the category of items that the catalogue did not have yet."""


class Ranker:
    """A CTR model ready to score: the networks and tables of all its seeds, vocabularies, item -> category.

    Attributes:
        encoder_version: of the embeddings it was trained on; None when it uses no content.
        content_width: D, None when it uses no content.
    """

    def __init__(
        self,
        info: dict[str, Any],
        items: ItemIndex,
        users: Vocabulary,
        models: Sequence[tuple[CtrNetwork, Lookup]],
    ) -> None:
        self.info = info
        self.variant: str = info["variant"]
        self.encoder_version: str | None = info["encoder_version"]
        self.max_behaviors: int = info["max_behaviors"]
        self.content_width: int | None = info["network"]["content_width"]
        self.items, self.users, self.models = items, users, list(models)
        self._category = {name: row for row, name in enumerate(items.categories, start=1)}

    def score(
        self, user_id: str, behaviors: Sequence[str], candidates: Sequence[str], multi_get: MultiGet | None = None
    ) -> np.ndarray:
        """(C,) click probability of each candidate for one user, the mean over seeds.

        Args:
            behaviors: the user's past items, oldest first; the newest `max_behaviors` are used.
            multi_get: where MM embeddings come from, and the category of items newer than this model. An item that
                it does not find has no content; needed unless the model uses no content.
        """
        behaviors = list(behaviors)[-self.max_behaviors :]
        ids = [*behaviors, *candidates]
        position = self.items.vocabulary.encode(ids)
        category = self.items.category[position]
        mm = None
        if multi_get is not None:
            vectors, found, names = multi_get(ids)
            for place in np.flatnonzero(position == 0).tolist():
                category[place] = self._category.get(names[place] or "", 0)
            mm = np.where(np.asarray(found)[:, None], vectors, 0.0).astype(np.float32)
        if self.content_width is None:
            mm = None
        elif mm is None:
            raise ValueError(f"{self.variant} uses content: give multi_get.")
        num_behaviors, num_candidates = len(behaviors), len(candidates)
        length = max(num_behaviors, 1)
        places = np.zeros((num_candidates, length), np.int64)
        places[:, :num_behaviors] = np.arange(num_behaviors)
        batch = IndexedBatch(
            user=torch.from_numpy(np.repeat(self.users.encode([user_id]), num_candidates)),
            item_row=torch.from_numpy(self.items.rows(ids, position)),
            category=torch.from_numpy(category),
            mm=None if mm is None else torch.from_numpy(mm),
            target=torch.arange(num_behaviors, len(ids)),
            behaviors=torch.from_numpy(places),
            behavior_mask=torch.full((num_candidates, length), num_behaviors > 0),
            label=None,
        )
        return self.predict(batch)

    @torch.inference_mode()
    def predict(self, batch: IndexedBatch) -> np.ndarray:
        """(B,) float64 click probability, the mean over seeds."""
        total = np.zeros(len(batch.target))
        for network, tables in self.models:
            total += torch.sigmoid(network(gather_batch(batch, tables)).double()).numpy()
        return total / len(self.models)

    def of_seed(self, index: int) -> Ranker:
        """The ranker with only the model of one seed."""
        return Ranker(self.info, self.items, self.users, [self.models[index]])


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
        ArtifactError: missing or damaged.
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
    config = NetworkConfig.from_json(info["network"])
    models = []
    for seed in info["seeds"]:
        network = CtrNetwork(config)
        folder = f"{uri}/seed-{seed}"
        tables: Lookup
        if machines is None:
            weights = artifacts.read_tensors(f"{folder}/network.safetensors")
            tables = IdTables.from_state(artifacts.read_tensors(f"{folder}/tables.safetensors"))
        else:
            weights = network_of(machines, seed)
            tables = MachineTables(machines, seed, with_users=config.user_width > 0)
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise ArtifactError(f"{folder} does not fit ctr.json ({error}). Train it again.") from None
        models.append((network.eval(), tables))
    return Ranker(info, items, users, models)
