"""Asking the parameter machines: one call per shard, all in parallel, or reading their mappings where one is on this node.

    client = ParameterClient(state, scenario.machines)        # in drivers, tasks, Serve replicas; it can be pickled
    answer = client.multi_get(ids)                            # answer.matrix (n, D), .found (n,), .category, .release, .degraded
    answers = client.get_many({"mm": ids, "item_id": ids})    # several tables, one call per shard, one release
    content = client.dense("ctr")                             # safetensors bytes
    client.push(encoder_version, segment_id, rows)            # RIM: a stored segment, to all machines

A replica that is away, or slower than `hedge_ms`, is not waited for where its shard has another one. What no machine has
answered at the deadline raises `UnavailableError`, or, with `degrade`, is answered as unknown with `degraded` True. An answer
never mixes two releases: while machines switch, the question is asked again, of one of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.exceptions import RayError

from mim_ray.config.scenario import ParameterMachines as Settings
from mim_ray.data.ids import Ids, hash_ids
from mim_ray.errors import ReleaseGoneError, UnavailableError
from mim_ray.representation_center.direct_read import View
from mim_ray.representation_center.key_index import shard_of, string_array
from mim_ray.representation_center.layered_rows import Embeddings, as_float32
from mim_ray.representation_center.local_machines import LocalMachines
from mim_ray.representation_center.machine_calls import MachineCalls, answers_of
from mim_ray.representation_center.machine_tables import Reply, Vectors, shard_of_name

PIECE_BYTES = 180_000  # as float32; half of it where float16 travels, which Ray sends at once (its limit is 100 KiB)
MOST_PIECES = 40
MOST_PUSHES = 10_000  # on their way; more are left to the window


@dataclass(frozen=True)
class Answer(Embeddings):
    """
    Attributes:
        release: id of the release that all of it comes from. serial: its number, which grows with every switch.
        degraded: some keys are answered as unknown because their shard was away.
    """

    release: str
    serial: int
    degraded: bool


class ParameterClient:
    """
    Args:
        state: what the machines were started with.
        direct: read the mappings of machines on this node; False: always ask.
    """

    def __init__(self, state: str, settings: Settings, *, direct: bool = True) -> None:
        self.state, self.settings = state, settings
        self._calls = MachineCalls(state, settings)
        silent_s = 0.5 + 3 * settings.follow_every_s
        self._local = LocalMachines(settings.shards, silent_s) if direct else None
        self._widths: dict[str, int] = {}
        self._pushes: list[Any] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return _client, (self.state, self.settings, self._local is not None)

    def multi_get(self, ids: Ids, table: str = "mm") -> Answer:
        """The newest vectors of one table.

        Raises:
            UnavailableError: a shard did not answer within the deadline (and `degrade` is off).
            ArtifactError: the release has no such table.
        """
        return self.get_many({table: ids})[table]

    def get_many(self, asked: Mapping[str, Ids], *, of_serial: int | None = None) -> dict[str, Answer]:
        """As `multi_get`, of several tables of one release.

        Args:
            of_serial: the release to answer from; None: the current one.

        Raises:
            ReleaseGoneError: the machines no longer hold release `of_serial`.
        """
        here = None if self._local is None else self._local.view(self._calls.known())
        if (
            here is not None
            and of_serial in (None, here.serial)
            and all(here.is_fresh(table, self.settings.freshness_s) for table in asked)
        ):
            release, number = here.release.release_id, here.serial
            self._widths |= {table: here.tables[table].snapshot.width for table in asked}
            return {
                table: Answer(found.matrix, found.found, found.category, release, number, False)
                for table, found in ((table, here.get(table, string_array(ids))) for table, ids in asked.items())
            }
        questions = {table: _Question(ids, self.settings.shards) for table, ids in asked.items()}
        shards = {shard for question in questions.values() for shard in question.shards}
        end = time.monotonic() + self.settings.deadline_ms / 1e3
        serial = of_serial
        while True:
            view, direct = self._readable(questions, shards, serial)
            wanted = view.serial if view is not None else serial
            calls = {
                shard: [(table, *question.buffers(shard)) for table, question in questions.items()]
                for shard in shards - direct
            }
            replies, problems = self._calls.ask("lookup", calls, wanted, end, self._num_pieces)
            if of_serial is not None:
                replies = self._of_release(replies, of_serial)
                break
            seen = {reply.serial for reply in replies.values()} | ({view.serial} if view is not None else set())
            if len(seen) <= 1 and not any(reply.problem for reply in replies.values()):
                break
            if time.monotonic() >= end:
                break
            serial = max(seen)  # machines are just switching: ask all of them for the newer one
        newest = max(seen, default=0) if of_serial is None else of_serial
        parts = {shard: reply for shard, reply in replies.items() if reply.serial == newest and not reply.problem}
        missing = shards - direct - set(parts)
        if view is not None and view.serial != newest:
            missing |= direct
            view = None
        if missing and (not self.settings.degrade or any(table not in self._widths for table in asked)):
            raise self._unavailable(missing, problems)
        release = view.release.release_id if view is not None else next((p.release_id for p in parts.values()), "")
        answers = {}
        for number, (table, question) in enumerate(questions.items()):
            found = question.join(
                None if view is None else (view, table, direct),
                {shard: part.content[number] for shard, part in parts.items()},
                self._widths.get(table, 0),
            )
            self._widths[table] = found.matrix.shape[1]
            away = bool(missing & question.shards)
            answers[table] = Answer(found.matrix, found.found, found.category, release, newest, away)
        return answers

    def dense(self, name: str, *, of_serial: int | None = None) -> bytes:
        """Dense parameters of the current release, or of release `of_serial`: safetensors bytes.

        Raises:
            ReleaseGoneError: the machines no longer hold release `of_serial`.
            UnavailableError: the machine that holds them did not answer within the deadline.
            ArtifactError: the release has none of this name.
        """
        shard = shard_of_name(name, self.settings.shards)
        end = time.monotonic() + self.settings.deadline_ms / 1e3
        replies, problems = self._calls.ask("dense", {shard: name}, of_serial, end)
        if of_serial is not None:
            replies = self._of_release(replies, of_serial)
        if shard not in replies:
            raise self._unavailable({shard}, problems)
        return bytes(replies[shard].content)

    def push(self, encoder_version: str, segment_id: str, rows: pa.Table) -> bool:
        """Send a stored segment to all machines; whether all of them had it within `machines.hedge_ms`. One that does not get it
        finds it in the window."""
        calls: list[Any] = []
        shards = shard_of(hash_ids(rows["item_id"]), self.settings.shards)
        for shard in range(self.settings.shards):
            part = rows.filter(pa.array(shards == shard))
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, part.schema) as writer:
                writer.write_table(part)
            content = sink.getvalue().to_pybytes()
            for replica in range(self.settings.replicas):
                try:
                    actor = self._calls.actor(shard, replica)
                    calls.append(actor.push.remote(encoder_version, segment_id, content))
                except (RayError, ValueError):
                    self._calls.forget(shard, replica)
        answers, late = answers_of(calls, self.settings.hedge_ms / 1e3)
        _, self._pushes = answers_of(self._pushes, 0.0)
        self._pushes = [*self._pushes, *late][-MOST_PUSHES:]
        return answers.count(True) == self.settings.shards * self.settings.replicas

    def _of_release(self, replies: dict[int, Reply], serial: int) -> dict[int, Reply]:
        newer = [reply.release_id for reply in replies.values() if reply.problem]
        if newer:
            raise ReleaseGoneError(f"The parameter machines of {self.state} hold release {newer[0]} by now. Ask again.")
        return replies

    def _readable(
        self, questions: Mapping[str, _Question], shards: set[int], serial: int | None
    ) -> tuple[View | None, set[int]]:
        """What can be read on this node of release `serial` (None: any), and the shards of which it is fresh enough."""
        if self._local is None:
            return None, set()
        view = self._local.view(self._calls.known())
        if view is None or (serial is not None and view.serial != serial):
            return None, set()
        if any(table not in view.tables for table in questions):
            return None, set()
        direct = set(shards)
        for table in questions:
            fresh = view.fresh_shards(table, self.settings.freshness_s)
            direct = {shard for shard in direct if fresh[shard]}
        return (view, direct) if direct else (None, set())

    def _num_pieces(self, asked: list[tuple[str, np.ndarray, bytes]]) -> int:
        """In how many pieces the vectors of one call should come; 0 where they are few, too many or not known."""
        table, offsets, _ = asked[0]
        num_bytes = 4 * (len(offsets) - 1) * self._widths.get(table, 0)
        if len(asked) > 1 or not PIECE_BYTES < num_bytes <= MOST_PIECES * PIECE_BYTES:
            return 0
        return -(-num_bytes // PIECE_BYTES)

    def _unavailable(self, shards: set[int], problems: Mapping[int, str]) -> UnavailableError:
        names = ", ".join(str(shard) for shard in sorted(shards))
        reasons = "; ".join(sorted({problems[shard] for shard in shards if shard in problems}))
        return UnavailableError(
            f"Shard {names} of the parameter machines {self.state} did not answer within {self.settings.deadline_ms} ms"
            f"{f' ({reasons})' if reasons else ''}. Ask again; machines.degrade=true answers unknown instead."
        )


class _Question:
    """Ids of one table, and which shard each belongs to."""

    def __init__(self, ids: Ids, num_shards: int) -> None:
        self.keys = string_array(ids)
        self._num_shards = num_shards
        self._shard_of = shard_of(hash_ids(self.keys), num_shards) if num_shards > 1 else None
        self._places: dict[int, np.ndarray] = {}
        self.shards = {0} if self._shard_of is None else set(np.unique(self._shard_of).tolist())

    def places(self, shard: int) -> np.ndarray:
        """Positions of the shard's keys."""
        if shard not in self._places:
            everything = self._shard_of is None
            self._places[shard] = np.arange(len(self.keys)) if everything else np.flatnonzero(self._shard_of == shard)
        return self._places[shard]

    def buffers(self, shard: int) -> tuple[np.ndarray, bytes]:
        """(m + 1,) offsets and UTF-8 bytes of the shard's keys; a null travels as an empty string."""
        keys = (
            self.keys
            if self._shard_of is None and not self.keys.offset
            else self.keys.take(pa.array(self.places(shard)))
        )
        _, offsets, text = keys.buffers()
        return np.frombuffer(offsets, np.int64, len(keys) + 1), b"" if text is None else text.to_pybytes()

    def join(self, direct: tuple[View, str, set[int]] | None, parts: Mapping[int, Vectors], width: int) -> Embeddings:
        """One answer in the order of the keys; zeros where a shard is missing."""
        if direct is not None and direct[2] >= self.shards:
            return direct[0].get(direct[1], self.keys)
        if parts:
            width = next(iter(parts.values()))[0].shape[1]
        if len(parts) == 1 == self._num_shards and not self.keys.null_count:
            vectors, there, with_name, categories = parts[0]
            return Embeddings(as_float32(vectors), there.copy(), self._categories([with_name], categories))
        matrix, found = np.zeros((len(self.keys), width), np.float32), np.zeros(len(self.keys), bool)
        named: list[np.ndarray] = []
        names: list[str] = []
        if direct is not None:
            view, table, shards = direct
            if not parts:
                matrix = np.zeros((len(self.keys), view.tables[table].snapshot.width), np.float32)
            if shards & self.shards:  # else all keys of this table are of shards that were called
                at = np.concatenate([self.places(shard) for shard in shards & self.shards])
                here = view.get(table, self.keys.take(pa.array(at)))
                matrix[at], found[at] = here.matrix, here.found
                inside = np.flatnonzero(np.asarray(here.category.is_valid(), bool))
                named.append(at[inside])
                names += here.category.take(pa.array(inside)).to_pylist()
        for shard, (vectors, there, with_name, categories) in parts.items():
            at = self.places(shard)
            matrix[at], found[at] = as_float32(vectors), there
            named.append(at[with_name])
            names += categories
        if self.keys.null_count:
            nulls = np.asarray(self.keys.is_null(), bool)
            matrix[nulls], found[nulls] = 0, False
        return Embeddings(matrix, found, self._categories(named, names))

    def _categories(self, named: list[np.ndarray], names: list[str]) -> pa.Array:
        category = pa.nulls(len(self.keys), pa.string())
        if not names:
            return category
        at = np.concatenate(named)
        mask = np.zeros(len(self.keys), bool)
        mask[at] = True
        ordered = pa.array(names, pa.string()).take(pa.array(np.argsort(at)))
        return pc.replace_with_mask(category, pa.array(mask), ordered)


def _client(state: str, settings: Settings, direct: bool) -> ParameterClient:
    return ParameterClient(state, settings, direct=direct)
