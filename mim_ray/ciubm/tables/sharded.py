"""Engine `torchrec`: each worker holds a range of every table's rows, for tables that outgrow one worker.

TorchRec's row-wise sharded EmbeddingCollection carries rows and gradients between the workers; FBGEMM's fused row-wise
Adagrad moves rows inside backward, with the learning rate of the lookup. So `step` looks the held rows up once more (no
communication) and runs that backward: rows move when the caller has seen that the loss is finite, at the rate it says.
Optional extra, with a torch of its own: docs/id_tables.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mim_ray.ciubm.tables.gradients import summed_by_row
from mim_ray.errors import ConfigError

_CHUNK_ROWS = 65_536
_STD = 0.05
_MOMENTUM = "momentum1"  # FBGEMM's name of the accumulator


class _Met(NamedTuple):
    """Of one embed(..., train=True), until its step."""

    context: Any
    held: Any  # the rows that this worker holds and others, or it, asked for
    found: list[Tensor]  # their embeddings, leaves
    distinct: dict[str, Tensor]  # the rows that this worker asked for, by table
    inverse: dict[str, Tensor]  # (U,) places of the answers' rows in `distinct`
    embedded: dict[str, Tensor]  # the answers, leaves


class ShardedTables:
    """The tables of a CTR model by name; a Tables (face.py). All methods are collective, `embed` too."""

    def __init__(self, num_rows: Mapping[str, int], width: int, *, seed: int) -> None:
        """Seeded tables, equal for any number of workers. Without a process group: one worker.

        Raises:
            ConfigError: TorchRec or FBGEMM cannot be loaded, or the width is no multiple of 4.
        """
        if width % 4:
            raise ConfigError(f"ciubm.id_dim = {width}: FBGEMM's tables have widths that are multiples of 4.")
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self.width = width
        self._build(num_rows)
        for name in self.num_rows:
            self._fill(name, seed)

    def _build(self, num_rows: Mapping[str, int]) -> None:
        self.num_rows = dict(num_rows)
        self._module = _sharded_collection(self.num_rows, self.width)
        self._met: _Met | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.num_rows

    def embed(self, rows: Mapping[str, Tensor], *, train: bool = False) -> dict[str, Tensor]:
        """As Tables.embed; with `train` once before each step."""
        if train and self._met is not None:
            raise ValueError("Sharded tables were asked twice for rows to train. Call step() in between.")
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        empty = torch.zeros(0, dtype=torch.int64)
        asked = {name: torch.unique(rows.get(name, empty), return_inverse=True) for name in self.num_rows}
        features = KeyedJaggedTensor(
            keys=[_key(name) for name in asked],
            values=torch.cat([distinct for distinct, _ in asked.values()]),
            lengths=torch.tensor([len(distinct) for distinct, _ in asked.values()]),
        )
        context = self._module.create_context()
        held = self._module.input_dist(context, features).wait().wait()
        with torch.no_grad():
            found = self._module.compute(context, held)
        for part in found:
            part.requires_grad_(train)
        answers = self._module.output_dist(context, found)
        distinct = {name: answers[_key(name)].values() for name in asked}
        embedded = {name: distinct[name].detach().index_select(0, asked[name][1]) for name in rows}
        if train:
            for leaf in embedded.values():
                leaf.requires_grad_(True)
            inverse = {name: of_distinct for name, (_, of_distinct) in asked.items()}
            self._met = _Met(context, held, found, distinct, inverse, embedded)
        return embedded

    def step(self, learning_rate: float, weight_decay: float = 0.0) -> None:
        """As Tables.step. Every worker must have called `embed` with `train`, if only for no rows.

        Raises:
            ConfigError: weight decay is asked for.
        """
        if weight_decay > 0:
            raise ConfigError("The torchrec engine has no weight decay. Set it to 0, or use ciubm.table_engine=torch.")
        if self._met is None:
            raise ValueError("Sharded tables step only after embed(..., train=True), on every worker.")
        met, self._met = self._met, None
        gradients = {name: torch.zeros_like(values) for name, values in met.distinct.items()}
        for name, leaf in met.embedded.items():
            if leaf.grad is not None and len(leaf):
                gradients[name] = summed_by_row(met.inverse[name], leaf.grad)[1]
        torch.autograd.backward(list(met.distinct.values()), list(gradients.values()))  # to the workers that hold them
        for group in self._module.fused_optimizer.param_groups:
            group["lr"] = learning_rate
        self._module.fused_optimizer.step()  # sets the rate, which FBGEMM reads when it looks rows up
        looked_up = self._module.compute(met.context, met.held)
        torch.autograd.backward(looked_up, [part.grad for part in met.found])  # moves the rows

    def state(self) -> dict[str, Tensor]:
        """As Tables.state, gathered on the first worker; nothing on the others."""
        return self._gathered({name: self._weight(name) for name in self.num_rows})

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take this worker's rows of `state`, which every worker has whole (mapped from a file, it costs no memory)."""
        self._build({name: len(weight) for name, weight in state.items()})
        for name, weight in state.items():
            self._weight(name).copy_(weight[self._range(name)])

    def optimizer_state(self) -> dict[str, Tensor]:
        """As Tables.optimizer_state, gathered on the first worker: TABLE.square, one number per row."""
        found = self._gathered({name: self._square(name) for name in self.num_rows})
        return {f"{name}.square": value for name, value in found.items()}

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Take this worker's part of what `optimizer_state` gave. Also takes the torch engine's row-wise Adagrad."""
        for name in self.num_rows:
            found = state.get(f"{name}.square")  # the torch engine leaves none before a first step
            if found is None:
                self._square(name).zero_()
            else:
                self._square(name).copy_(found[self._range(name)])

    def _fill(self, name: str, seed: int) -> None:
        """Draw this worker's rows; what is drawn depends on the row, not on the workers."""
        kept, weight = self._range(name), self._weight(name)
        for start in range(0, self.num_rows[name], _CHUNK_ROWS):
            stop = min(start + _CHUNK_ROWS, self.num_rows[name])
            first, last = max(start, kept.start), min(stop, kept.stop)
            if first < last:
                digest = hashlib.blake2b(f"{seed}/{name}/{start}".encode(), digest_size=7).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest))
                drawn = torch.randn(stop - start, self.width, generator=generator).mul_(_STD)
                weight[first - kept.start : last - kept.start] = drawn[first - start : last - start]

    def _range(self, name: str) -> slice:
        """Rows of a table that this worker holds."""
        return _rows_of_rank(self.num_rows[name], dist.get_rank())

    def _weight(self, name: str) -> Tensor:
        return _local(self._module.state_dict()[f"embeddings.{_key(name)}.weight"], self.width)

    def _square(self, name: str) -> Tensor:
        state = self._module.fused_optimizer.state_dict()["state"]
        return _local(state[f"embeddings.{_key(name)}.weight"][f"{_key(name)}.{_MOMENTUM}"])

    def _gathered(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole: dict[str, Tensor] = {}
        for name, part in local.items():
            rows = self.num_rows[name]
            if dist.get_rank() == 0:
                whole[name] = part.new_empty(rows, *part.shape[1:])
            for start, chunk in _chunks(part, rows):
                if dist.get_rank() == 0:
                    whole[name][start : start + len(chunk)] = chunk
        return whole


def _key(name: str) -> str:
    """TorchRec's name of a table: it allows no dots."""
    return name.replace(".", "/")


def _rows_of_rank(num_rows: int, rank: int) -> slice:
    """TorchRec's row-wise sharding: equal blocks, the last ones shorter or empty."""
    block = -(-num_rows // dist.get_world_size())
    return slice(min(rank * block, num_rows), min((rank + 1) * block, num_rows))


def _chunks(local: Tensor, num_rows: int) -> Iterator[tuple[int, Tensor]]:
    """All workers' rows in order, on all workers, a chunk at a time: first row and rows. Collective."""
    for rank in range(dist.get_world_size()):
        held = _rows_of_rank(num_rows, rank)
        for start in range(held.start, held.stop, _CHUNK_ROWS):
            stop = min(start + _CHUNK_ROWS, held.stop)
            if rank == dist.get_rank():
                chunk = local[start - held.start : stop - held.start].contiguous()
            else:
                chunk = local.new_empty(stop - start, *local.shape[1:])
            dist.broadcast(chunk, rank)
            yield start, chunk


def _local(sharded: Any, *width: int) -> Tensor:
    """This worker's part of a ShardedTensor, sharing its memory; a worker without rows has an empty one."""
    shards = sharded.local_shards()
    return shards[0].tensor.detach() if shards else torch.zeros(0, *width)


def _sharded_collection(num_rows: Mapping[str, int], width: int) -> Any:
    try:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from torchrec.distributed.embedding import EmbeddingCollectionSharder
        from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
        from torchrec.distributed.types import ShardingEnv
        from torchrec.modules.embedding_configs import EmbeddingConfig
        from torchrec.modules.embedding_modules import EmbeddingCollection
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"ciubm.table_engine=torchrec needs TorchRec and FBGEMM, which cannot be loaded ({error}). Install them "
            "beside torch 2.14.1 as docs/id_tables.md says, or use ciubm.table_engine=torch."
        ) from None
    collection = EmbeddingCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingConfig(name=_key(name), embedding_dim=width, num_embeddings=rows, feature_names=[_key(name)])
            for name, rows in num_rows.items()
        ],
    )
    sharder = EmbeddingCollectionSharder(
        fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.0, "eps": 1e-8}
    )
    world = dist.get_world_size()
    plan = construct_module_sharding_plan(
        collection,
        {_key(name): row_wise(compute_kernel="fused") for name in num_rows},
        sharder,
        local_size=world,
        world_size=world,
        device_type="cpu",
    )
    group = dist.group.WORLD
    assert group is not None
    return sharder.shard(collection, plan, ShardingEnv.from_process_group(group), torch.device("cpu"))
