"""All that one ranking request needs of the parameter machines, by one call: MM vectors and rows of every ID table.

rows = MachineRows(ranker, machines)      # machines: of one release, see machine_export.py
found = rows.get(request)
prob = ranker.predict(found.batch, found.tables)

The category table, a few thousand rows, is read once and kept, because a new item's category comes with its embedding and
would need a second call; so is row 0 of each table, which stands for what is unknown, and for rows whose shard is away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mim_ray.ciubm.dataset import IndexedBatch
from mim_ray.ciubm.export import Ranker
from mim_ray.ciubm.machine_export import MM_TABLE, NEWER_TABLE, Answer, Machines
from mim_ray.ciubm.request import Request
from mim_ray.ciubm.tables import Lookup
from mim_ray.errors import ArtifactError, UnavailableError

_CATEGORY = "category"


@dataclass(frozen=True)
class Found:
    """
    Attributes:
        batch: to predict. tables: of each seed. has_content, unknown: (C,) bool, of the candidates.
        content_away: the MM vectors of a shard did not come, so that nothing is scored by content.
        rows_away: some rows of ID tables did not come, and count as unknown.
    """

    batch: IndexedBatch
    tables: Sequence[Lookup]
    has_content: np.ndarray
    unknown: np.ndarray
    content_away: bool = False
    rows_away: bool = False


class MachineRows:
    """
    Args:
        ranker: loaded from the same release of the machines.

    Raises:
        UnavailableError: a machine is away.
        ArtifactError: the machines hold the tables of another model.
    """

    def __init__(self, ranker: Ranker, machines: Machines) -> None:
        self._machines, self._seeds = machines, [int(seed) for seed in ranker.info["seeds"]]
        self._with_user = "user" in ranker.models[0][1]
        names = ["item", *(["user"] if self._with_user else []), *ranker.features.num_table_rows]
        asked = {f"{name}-{seed}": ["0"] for name in names for seed in self._seeds}
        category_rows = [str(row) for row in range(ranker.items.num_category_rows)]
        asked |= {f"{_CATEGORY}-{seed}": category_rows for seed in self._seeds}
        answers = machines.get_many({MM_TABLE: [""], **asked})
        for name in asked:
            if answers[name].degraded:
                raise UnavailableError(f"Table {name} cannot be read: a parameter machine is away. Try again.")
            if not answers[name].found.all():
                raise _other_model(name)
        width = answers[MM_TABLE].matrix.shape[1]
        if ranker.content_width not in (None, width):
            raise ArtifactError(f"The machines' MM embeddings have width {width}, the model {ranker.content_width}.")
        self._categories = ranker.items.categories
        self._kept = {name: torch.from_numpy(answers[name].matrix.copy()) for name in asked}

    def get(self, request: Request) -> Found:
        """
        Raises:
            UnavailableError: no machine answers, and they are not asked to degrade (ReleaseGoneError: they have switched).
            ArtifactError: the machines hold the tables of another model.
        """
        rows = request.rows(with_user=self._with_user)
        keys = {name: pa.array(of_table.numpy()).cast(pa.large_string()) for name, of_table in rows.items()}
        asked = {f"{name}-{seed}": of_table for name, of_table in keys.items() for seed in self._seeds}
        new = np.flatnonzero(~request.known)
        if len(new):
            asked[NEWER_TABLE] = request.keys.take(pa.array(new))
        answers = self._machines.get_many({MM_TABLE: request.keys, **asked})
        tables, rows_away, unknown = [], False, request.unknown
        for seed in self._seeds:
            embedded = {}
            for name in rows:
                embedded[name], missing = self._embedded(f"{name}-{seed}", answers[f"{name}-{seed}"])
                rows_away |= bool(missing.any())
                if name == "item":
                    unknown = unknown | missing[request.num_behaviors :]
            tables.append(_Fetched(embedded, self._kept[f"{_CATEGORY}-{seed}"]))
        mm = answers[MM_TABLE]
        if mm.degraded:
            nothing = np.zeros(request.num_candidates, bool)
            return Found(request.batch(), tables, nothing, unknown, content_away=True, rows_away=rows_away)
        names = self._names(new, mm, answers[NEWER_TABLE]) if len(new) else None
        batch = request.batch(mm.matrix, mm.found, names)
        return Found(batch, tables, mm.found[request.num_behaviors :], unknown, rows_away=rows_away)

    def _names(self, new: np.ndarray, mm: Answer, newer: Answer) -> list[str | None]:
        """(l + C,) categories of the items at the places `new`: of their last message, else of one before the snapshot."""
        names: list[str | None] = mm.category.to_pylist()
        for at, place in enumerate(new.tolist()):
            if names[place] is None and newer.found[at]:
                names[place] = self._categories[int(newer.matrix[at, 0]) - 1]
        return names

    def _embedded(self, name: str, answer: Answer) -> tuple[Tensor, np.ndarray]:
        """(U, width), and (U,) True where row 0 stands for one that did not come."""
        matrix, missing = answer.matrix, ~answer.found
        if missing.any():
            if not answer.degraded:
                raise _other_model(name)
            matrix = np.where(missing[:, None], self._kept[name].numpy(), matrix)
        return torch.from_numpy(np.ascontiguousarray(matrix, np.float32)), missing


class _Fetched:
    """The tables of one seed for one request: what came for its rows, and the category table."""

    def __init__(self, embedded: Mapping[str, Tensor], categories: Tensor) -> None:
        self._embedded, self._categories = embedded, categories

    def __contains__(self, name: str) -> bool:
        return name == _CATEGORY or name in self._embedded

    def embed(self, rows: Mapping[str, Tensor], *, train: bool = False) -> dict[str, Tensor]:
        """(U, width) by table name."""
        assert not train, "the parameter machines serve"
        fetched = {name: self._embedded[name] for name in rows if name != _CATEGORY}
        return fetched | {_CATEGORY: self._categories.index_select(0, rows[_CATEGORY])}


def _other_model(table: str) -> ArtifactError:
    return ArtifactError(
        f"The parameter machines do not have all rows of table {table}: they hold another model's tables. "
        "Load the release that names this model's."
    )
