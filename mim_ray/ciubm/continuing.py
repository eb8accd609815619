"""Incremental training: go on from an earlier model on what has happened since.

What the earlier model knows keeps its place: items, users and categories their rows, the network its weights, the optimizers
their state. New ids get rows behind the old ones that start as the unknown row. Only train rows that are later than the earlier model's are trained
on; they are copied below the run's train/ so that batches stay a function of (seed, epoch, step, rank, P).

Point in time: the earlier model must not have seen what the later one is judged on. Its train rows have to end before the
later validation begins, and its validation rows (they chose its best state) before the later test begins.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mim_ray import artifacts
from mim_ray.ciubm.model import NetworkConfig
from mim_ray.ciubm.vocabulary_build import Vocabularies
from mim_ray.config.scenario import Ciubm
from mim_ray.data.batches import ordered_batches
from mim_ray.data.event_log import UNKNOWN_TIME, times_us
from mim_ray.errors import ArtifactError, DataError, VersionMismatchError

_FILE_ROWS, _GROUP_ROWS = 262_144, 2_048


@dataclass(frozen=True)
class Earlier:
    """A finished model at `uri`, its ctr.json and its vocabularies."""

    uri: str
    info: dict[str, Any]
    vocabularies: Vocabularies

    @classmethod
    def open(cls, continue_from: str, variant: str) -> Earlier:
        """
        Args:
            continue_from: URI of the model, or of the folder that holds models by variant.

        Raises:
            ArtifactError: there is no finished model of this variant.
        """
        uri = continue_from if artifacts.exists(f"{continue_from}/ctr.json") else f"{continue_from}/{variant}"
        if not artifacts.exists(f"{uri}/ctr.json"):
            raise ArtifactError(
                f"ciubm.continue_from = {continue_from} holds no finished CTR model, neither itself nor in {variant}. "
                "Name the ctr/<variant> folder of a finished run."
            )
        info = artifacts.read_json(f"{uri}/ctr.json")
        if info["variant"] != variant:
            raise ArtifactError(
                f"{uri} is a model {info['variant']} and cannot go on as {variant}. Name the folder that holds both, or set "
                f"ciubm.variants=[{info['variant']}]."
            )
        vocabularies = Vocabularies.load(f"{uri}/vocabulary")
        if vocabularies is None or "times" not in info:
            raise ArtifactError(f"{uri} lacks what training needs to go on from it. Train it again with this version.")
        return cls(uri, info, vocabularies)

    def check(self, settings: Ciubm, features: Mapping[str, str], encoder_version: str | None) -> None:
        """
        Args:
            features: kinds of the declared ones, by name.

        Raises:
            VersionMismatchError: its embeddings were of another encoder version.
            ArtifactError: other seeds or features, another kind of vocabulary or optimizer.
        """
        trained_on = self.info["encoder_version"]
        if trained_on != encoder_version:
            raise VersionMismatchError(
                f"{self.uri} was trained on embeddings of {trained_on}, but the embeddings at hand are of {encoder_version}. "
                "Go on with that version's embeddings, or leave ciubm.continue_from out to train anew."
            )
        hashed = self.vocabularies.items.hashed
        kinds = [
            "explicit" if rows is None else f"hashed to {rows:,} rows"
            for rows in (None if hashed is None else len(hashed), settings.num_hash_rows)
        ]
        known = self.vocabularies.features.kinds
        differ = [
            ("vocabulary", kinds[0], kinds[1], kinds[0] == kinds[1]),
            ("table_optimizer", self.info["table_optimizer"], settings.table_optimizer,
             self.info["table_optimizer"] == settings.table_optimizer),
            ("seeds", self.info["seeds"], list(settings.seeds), set(settings.seeds) <= set(self.info["seeds"])),
            ("features", known, dict(features), known == features),
        ]  # fmt: skip
        self._refuse([f"{name} {was} -> {now}" for name, was, now, fits in differ if not fits])

    def check_network(self, network: NetworkConfig) -> None:
        """
        Raises:
            ArtifactError: another architecture.
        """
        was, now = NetworkConfig.from_json(self.info["network"]).to_json(), network.to_json()
        self._refuse([f"{name} {was[name]} -> {now[name]}" for name in now if was[name] != now[name]])

    def _refuse(self, differ: Sequence[str]) -> None:
        if differ:
            raise ArtifactError(
                f"{self.uri} cannot go on with these settings: {'; '.join(differ)}. Set them back, or leave "
                "ciubm.continue_from out to train anew."
            )

    def check_times(self, times: dict[str, list[int] | None], samples: str) -> int:
        """The end of its train rows, in microseconds, when the later samples may be judged after it.

        Args:
            times: of the later samples, from `times_of`.

        Raises:
            DataError: rows that the later model is judged on are not later than what the earlier one has seen.
        """
        seen = self.info["times"]
        if seen["train"] is None:
            raise DataError(f"The train rows of {self.uri} have no times, so it is not known which rows are new to it.")
        for split, by, use in (("validation", "train", "was trained on"), ("test", "train", "was trained on"),
                               ("test", "validation", "was chosen by")):  # fmt: skip
            later, before = times[split], seen[by]
            if later is not None and before is not None and later[0] <= before[1]:
                raise DataError(
                    f"The {split} rows of {samples} begin at {_text(later[0])}, but {self.uri} {use} rows up to "
                    f"{_text(before[1])}. Build samples with later samples.validation_start and samples.test_start."
                )
        return int(seen["train"][1])


def grown_state(state: Mapping[str, Tensor], num_rows: Mapping[str, int]) -> dict[str, Tensor]:
    """A trainer's state whose tables have `num_rows` by name.

    New rows start as the unknown row 0, which id_dropout has trained to stand for items like them, with zero optimizer
    state. (On films' ratings, a day's training ends 0.01 AUC higher than from random rows: docs/training.md.)
    """
    grown = dict(state)
    for name, rows in num_rows.items():
        weight = state[f"tables/{name}"]
        more = rows - len(weight)
        if more > 0:
            grown[f"tables/{name}"] = torch.cat([weight, weight[:1].expand(more, -1)])
            for key, slot in state.items():
                if key.startswith(f"table_optimizer/{name}.") and slot.ndim > 0:
                    grown[key] = torch.cat([slot, slot.new_zeros(more, *slot.shape[1:])])
    return grown


def times_of(samples: str) -> dict[str, list[int] | None]:
    """First and last time of each split's impressions, in microseconds UTC; None without rows with a time."""
    found: dict[str, list[int] | None] = {}
    for split in ("train", "validation", "test"):
        low, high = UNKNOWN_TIME, -1
        for times in _times(f"{samples}/impressions/{split}"):
            low, high = min(low, int(times.min(initial=UNKNOWN_TIME))), max(high, int(times.max(initial=-1)))
        found[split] = [low, high] if high >= 0 else None
    return found


def copy_later_rows(source: str, after_us: int, target: str) -> int:
    """Write the impressions at the URI `source` that are later than `after_us` below `target`; how many there are.

    Raises:
        DataError: there are none.
    """
    num_rows = num_files = size = 0
    pieces: list[pa.Table] = []

    def flush() -> None:
        sink = io.BytesIO()
        pq.write_table(pa.concat_tables(pieces), sink, row_group_size=_GROUP_ROWS)
        artifacts.write_bytes(f"{target}/part-{num_files:05d}.parquet", sink.getvalue())

    artifacts.remove(target)
    for table in ordered_batches(source, None, 16_384):
        times = times_us(table["timestamp"])
        later = table.filter(pa.array((times > after_us) & (times != UNKNOWN_TIME)))
        pieces.append(later)
        num_rows, size = num_rows + len(later), size + len(later)
        if size >= _FILE_ROWS:
            flush()
            pieces, size, num_files = [], 0, num_files + 1
    if size:
        flush()
    if not num_rows:
        raise DataError(f"{source} has no row later than {_text(after_us)}, where the earlier model's train rows end.")
    return num_rows


def _times(source: str) -> Iterator[np.ndarray]:
    if artifacts.list_files(source, ".parquet"):
        for table in ordered_batches(source, ["timestamp"], 262_144):
            times = times_us(table["timestamp"])
            yield times[times != UNKNOWN_TIME]


def _text(us: int) -> str:
    return str(np.datetime64(us, "us"))
