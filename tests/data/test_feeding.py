"""Chunks come in order, with their arrays, from a thread and from Ray Data; errors reach the user."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from mim_ray.data.feeding import Chunk, decoder_cpus, json_array, json_value, ordered_chunks
from mim_ray.errors import DataError


@dataclass(frozen=True)
class Numbers:
    """Chunk i holds i in several shapes; `bad` raises."""

    bad: int = -1

    def open(self) -> Callable[[int], Chunk]:
        def make(number: int) -> Chunk:
            if number == self.bad:
                raise DataError(f"chunk {number} is bad. Mend it.")
            return {
                "wide": np.full((number % 3, 2, 5), number, np.uint8),
                "flags": np.array([True, number % 2 == 0]),
                "hash": np.array([2**63 + number], np.uint64),
                "titles": json_array([None, f"Größe {number}"]),
            }

        return make


def check(chunk: Chunk, number: int) -> None:
    assert chunk["wide"].shape == (number % 3, 2, 5)
    assert (chunk["wide"] == number).all()
    assert chunk["flags"].tolist() == [True, number % 2 == 0]
    assert chunk["hash"].tolist() == [2**63 + number]
    assert json_value(chunk["titles"]) == [None, f"Größe {number}"]


def test_a_thread_makes_chunks_in_order_with_or_without_an_end() -> None:
    for chunk, number in zip(
        ordered_chunks(Numbers(), 4, 9, num_decoders=0, cpus_per_decoder=1), range(4, 9), strict=True
    ):
        check(chunk, number)
    endless = ordered_chunks(Numbers(), 7, None, num_decoders=0, cpus_per_decoder=1)
    for chunk, number in zip(itertools.islice(endless, 20), range(7, 27), strict=True):
        check(chunk, number)


@pytest.mark.ray
def test_ray_data_makes_them_in_order_across_executions(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mim_ray.data.feeding._SEGMENT", 6)
    endless = ordered_chunks(Numbers(), 3, None, num_decoders=2, cpus_per_decoder=0.5)
    for chunk, number in zip(itertools.islice(endless, 14), range(3, 17), strict=True):
        check(chunk, number)
    ended = ordered_chunks(Numbers(), 0, 8, num_decoders=1, cpus_per_decoder=0)
    assert sum(1 for _ in ended) == 8


@pytest.mark.ray
def test_what_a_task_raises_on_purpose_is_raised_here(ray_cluster: None) -> None:
    with pytest.raises(DataError, match=r"chunk 2 is bad\. Mend it\."):
        list(ordered_chunks(Numbers(bad=2), 0, 4, num_decoders=1, cpus_per_decoder=0.5))


@pytest.mark.ray
def test_decoders_share_what_training_leaves(ray_cluster: None) -> None:
    """The session's Ray has two CPUs."""
    assert decoder_cpus(1, 1.0, 1) == 1.0
    assert decoder_cpus(1, 1.0, 2) == 0.5
    assert decoder_cpus(2, 1.0, 1) == 0.0
    assert decoder_cpus(2, 1.0, 0) == 1.0
