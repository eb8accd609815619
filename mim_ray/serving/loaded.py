"""One release, open for ranking: the CTR model, and where the rows come from that a request needs.

loaded = Loaded.open(served, machines)
found = loaded.rows.get(loaded.model.request("u1", behaviors, candidates))
prob = loaded.model.predict(found.batch, found.tables)

Rows come from this process (ID tables in memory, MM embeddings mapped), or, where parameter machines run, from there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mim_ray import artifacts
from mim_ray.ciubm.dataset import IndexedBatch
from mim_ray.ciubm.export import Ranker, load_ranker
from mim_ray.ciubm.machine_export import OfRelease
from mim_ray.ciubm.machine_rows import MachineRows
from mim_ray.ciubm.request import Request
from mim_ray.ciubm.tables import Lookup
from mim_ray.config.scenario import ParameterMachines
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.lookup import STORAGE_PROBLEMS
from mim_ray.representation_center.named_categories import named_since
from mim_ray.representation_center.parameter_client import ParameterClient
from mim_ray.representation_center.parameter_store import ParameterStore
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.serving.served import Served

logger = logging.getLogger("ray.serve")
FOLLOW_EVERY_S = 0.1  # how often new items are looked for
CONTENT, TABLES, QUERY = "content", "tables", "query"  # what an answer may lack


@dataclass(frozen=True)
class RequestRows:
    """What a request is scored from.

    Attributes:
        tables: of each seed; None: the model's own.
        has_content, unknown: (C,) bool: the candidate's MM embedding is known; its ID embedding is not.
        degraded: what could not be read: CONTENT (no item has any then), TABLES (some items, the user or features count as
            unknown), QUERY (as if the request had none).
    """

    batch: IndexedBatch
    tables: Sequence[Lookup] | None
    has_content: np.ndarray
    unknown: np.ndarray
    degraded: tuple[str, ...] = ()


class Rows(Protocol):
    """Where the rows of requests come from.

    Attributes:
        waits: `get` asks other processes.
    """

    waits: bool

    def get(self, request: Request) -> RequestRows: ...

    def close(self) -> None:
        """Let go of what a thread does for it; requests that run may finish."""
        ...


class LocalRows:
    """Tables in this process."""

    waits = False

    def __init__(self, store: ParameterStore) -> None:
        self.store = store
        self._problem = ""

    def get(self, request: Request) -> RequestRows:
        """Without content where the store fails, for the whole request: half of the items would be a wrong comparison."""
        try:
            vectors, found, categories = self.store.multi_get(request.keys)
        except STORAGE_PROBLEMS as error:
            if str(error) != self._problem:
                logger.error("MM embeddings cannot be read; requests are ranked without content: %s", error)
            self._problem = str(error)
            nothing = np.zeros(request.num_candidates, bool)
            return RequestRows(request.batch(), None, nothing, request.unknown, (CONTENT,))
        self._problem = ""
        names = None if request.known.all() else categories.to_pylist()
        batch = request.batch(vectors, found, names)
        return RequestRows(batch, None, found[request.num_behaviors :], request.unknown)

    def close(self) -> None:
        self.store.stop()


class RemoteRows:
    """Tables on the parameter machines: one call for a request."""

    waits = True

    def __init__(self, model: Ranker, machines: OfRelease) -> None:
        self._rows = MachineRows(model, machines)

    def get(self, request: Request) -> RequestRows:
        """What a shard that is away would have held counts as unknown, when the deadline is over.

        Raises:
            ReleaseGoneError: the machines have switched to another release.
        """
        found = self._rows.get(request)
        away = ((CONTENT, found.content_away), (TABLES, found.rows_away))
        degraded = tuple(name for name, is_away in away if is_away)
        return RequestRows(found.batch, found.tables, found.has_content, found.unknown, degraded)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Loaded:
    """All that one request runs on: never parts of two releases.

    Attributes:
        model_version: names the CTR model in answers.
    """

    served: Served
    model: Ranker
    rows: Rows
    model_version: str

    @classmethod
    def of(cls, served: Served, model: Ranker, rows: Rows) -> Loaded:
        return cls(served, model, rows, f"{model.variant}-{artifacts.fingerprint(model.info)[:12]}")

    @classmethod
    def open(cls, served: Served, machines: ParameterMachines) -> Loaded:
        """
        Args:
            machines: used where `served` names a release on parameter machines.

        Raises:
            ArtifactError: something is missing or damaged, or gives no probabilities.
            VersionMismatchError: the CTR model was trained on another encoder version's embeddings.
            UnavailableError: a parameter machine is away.
        """
        rows: Rows
        if served.serial is None:
            model = load_ranker(served.ctr)
            store = ParameterStore(
                served.snapshot,
                table=f"{served.center}/table",
                window=f"{served.center}/window",
                encoder_version=model.encoder_version,
            )
            store.name(newer_categories(served, model))
            rows = LocalRows(store)
            store.start(every_s=FOLLOW_EVERY_S)
        else:
            assert machines.state is not None
            client = ParameterClient(machines.state, machines.model_copy(update={"degrade": True}))
            pinned = OfRelease(client, served.serial)
            model = load_ranker(served.ctr, encoder_version=served.encoder_version, machines=pinned)
            rows = RemoteRows(model, pinned)
        loaded = cls.of(served, model, rows)
        try:
            loaded._try()
        except BaseException:
            rows.close()
            raise
        return loaded

    def close(self) -> None:
        """Stop what follows new items for it. Requests that run on it may finish."""
        self.rows.close()

    def _try(self) -> None:
        """Rank once: what does not fit together shows here, not in a caller's request."""
        found = self.rows.get(self.model.request("", ["", ""], ["", "a", "b"]))
        if not np.isfinite(self.model.predict(found.batch, found.tables)).all():
            raise ArtifactError(f"{self.served.ctr} gives probabilities that are no numbers. Train it again.")


def newer_categories(served: Served, model: Ranker) -> dict[str, str]:
    """Item id -> category of the items that came after the model, as their messages named them."""
    trained_on = model.info.get("snapshot")
    if model.encoder_version is None or trained_on is None:
        return {}
    table, known = EmbeddingTable(f"{served.center}/table"), model.items.vocabulary
    return named_since(table, model.encoder_version, trained_on, lambda ids: np.asarray(known.encode(ids)) == 0)
