"""Encoder actors that stay alive between rounds, for a few thousand items at a time: no start, no model load, no plan.

prepare tasks (read and decode, any CPU) -> encoder actors (fixed pool) -> the driver, in order
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray

from mim_ray.config.scenario import Extraction
from mim_ray.extraction.embed import Embedder, Encode

Parts = Sequence["ray.ObjectRef[pa.Table]"]
"""Tables of prepared rows that are encoded together."""


class WarmPool:
    """`settings.num_actors` encoders; an actor that dies is started again and its work repeated.

    Args:
        cpus: of each actor. load: (uri, use_gpu) -> Encode.
    """

    def __init__(
        self, settings: Extraction, cpus: float, uri: str, image_size: int, load: Callable[[str, bool], Encode]
    ) -> None:
        actor: Any = ray.remote(_Encoder)
        self._actors = [
            actor.options(
                num_cpus=cpus, num_gpus=settings.gpus_per_actor or None, max_restarts=-1, max_task_retries=-1
            ).remote(uri, image_size, settings.gpus_per_actor > 0, load)
            for _ in range(settings.num_actors)
        ]

    def encode(self, batches: Iterable[Parts]) -> Iterator[pa.Table]:
        """Rows of `Embedder` for each batch, in order. A few batches per actor are under way at once."""
        waiting: deque[ray.ObjectRef[pa.Table]] = deque()
        for number, parts in enumerate(batches):
            actor = self._actors[number % len(self._actors)]
            waiting.append(actor.encode.remote(*parts))
            if len(waiting) >= 3 * len(self._actors):
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())

    def close(self) -> None:
        """Give the actors' resources back."""
        for actor in self._actors:
            ray.kill(actor)


class _Encoder:
    def __init__(self, uri: str, image_size: int, use_gpu: bool, load: Callable[[str, bool], Encode]) -> None:
        self._embed = Embedder(uri, image_size, use_gpu, load)

    def encode(self, *parts: pa.Table) -> pa.Table:
        return self._embed(pa.concat_tables(parts))
