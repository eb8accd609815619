"""What the tables of a CTR model look like, whichever engine holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Lookup(Protocol):
    """What reading needs of tables: all that serving asks for."""

    def __contains__(self, name: str) -> bool: ...

    def embed(self, rows: Mapping[str, Tensor], *, train: bool = False) -> dict[str, Tensor]:
        """(U,) int64 rows by table name -> (U, width). With `train` the answers are leaves whose gradients `step` uses."""
        ...


class Tables(Lookup, Protocol):
    """Embedding tables by name (item, category and, by choice, user). Row 0 of each is the unknown id.

    With several workers every method below is collective: all workers call it equally often, with whatever rows they have
    (none is allowed). Of the torch engine only `step` is.
    """

    def step(self, learning_rate: float, weight_decay: float = 0.0) -> None:
        """Move the rows met since the last step, by the mean over the workers of their gradients, and forget them."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Whole weights (rows, width) by table name: what serving reads. The first worker gets them, others may get none.
        The torch engine's are no copies."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take whole weights, which every worker has; sizes follow. The optimizer's state is forgotten."""
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """What a resumed run needs beside `state`, as flat tensors called TABLE.NAME; given as `state` is."""
        ...

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what `optimizer_state` gave. Call it after `load_state`."""
        ...
