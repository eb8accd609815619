"""CMD (paper Section 3.5): parameter machines, Ray actors that hold the tables of a release, split over S shards × R replicas.

    machines = ParameterMachines.start(state, release, settings)     # state: URI of a small file; from any driver
    client = machines.client()                                       # parameter_client.py: goes to tasks, actors, replicas
    answer = client.multi_get(ids)
    machines.load(new_release)                                       # opened beside, then switched; lookups go on
    machines.stop()

A shard is a range of the ids' 64-bit hashes. Each machine maps its range of every snapshot and fills an overlay with newer rows
(lookup.py). Ray brings a machine that dies back by itself; it opens the release that `state` names. Replicas of a shard stand
on different nodes where there are several.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mim_ray import artifacts
from mim_ray.config.scenario import ParameterMachines as Settings
from mim_ray.errors import ConfigError, MimRayError, UnavailableError
from mim_ray.local_cache import cache_folder
from mim_ray.representation_center.machine_calls import NAMESPACE, actor_name
from mim_ray.representation_center.machine_release import (
    MachineRelease,
    keep_states,
    read_shape,
    read_wanted,
    write_wanted,
)
from mim_ray.representation_center.machine_tables import Reply, split_reply
from mim_ray.representation_center.parameter_client import ParameterClient
from mim_ray.representation_center.parameter_machine import START_TIMEOUT_S, ParameterMachine
from mim_ray.runtime.cluster import user_error

READERS = 4  # lookups that one machine answers at once
MOST_PENDING = 10_000  # calls of one client that a machine has not answered


@ray.remote(concurrency_groups={"read": READERS, "write": 1, "change": 1})  # type: ignore[call-overload]
class MachineActor:
    """`ParameterMachine` as an actor: lookups, pushes and changes of release do not wait for each other."""

    def __init__(self, state: str, shard: tuple[int, int], replica: int, settings: Settings) -> None:
        base = cache_folder() / "machines" if settings.folder is None else Path(settings.folder)
        actor_id = ray.get_runtime_context().get_actor_id()  # stays the same when Ray restarts the actor
        name = f"{actor_name(state, shard[0], replica)}-{actor_id}"
        self._machine = ParameterMachine(state, shard, base / name, settings)

    @ray.method(concurrency_group="read")
    def where(self) -> dict[str, Any]:
        return self._machine.where()

    @ray.method(concurrency_group="read")
    def lookup(
        self, serial: int | None, asked: list[tuple[str, np.ndarray, bytes]], num_pieces: int = 0
    ) -> Reply | tuple[Any, ...]:
        reply = self._machine.lookup(serial, asked)
        return split_reply(reply, num_pieces) if num_pieces else reply

    @ray.method(concurrency_group="read")
    def dense(self, serial: int | None, name: str) -> Reply:
        return self._machine.dense(serial, name)

    @ray.method(concurrency_group="write")
    def push(self, encoder_version: str, segment_id: str, rows: bytes) -> bool:
        return self._machine.push(encoder_version, segment_id, rows)

    @ray.method(concurrency_group="change")
    def change(self, method: Literal["ready", "prepare", "activate", "forget", "close"], *args: Any) -> Any:
        return getattr(self._machine, method)(*args)


class ParameterMachines:
    """All machines of one `state`. Use `start`."""

    def __init__(self, state: str, settings: Settings, actors: Mapping[tuple[int, int], ActorHandle]) -> None:
        self.state, self.settings, self.actors = state, settings, actors

    @classmethod
    def start(cls, state: str, release: MachineRelease, settings: Settings) -> ParameterMachines:
        """Start S × R machines, or find those that are running, and wait until all answer from `release`.

        Args:
            state: URI of the file that says what they hold, on storage that every node reaches; it names them, too.

        Raises:
            ArtifactError: the release cannot be opened.
            ConfigError: machines with another number of shards or replicas are running.
        """
        names = {
            (shard, replica): actor_name(state, shard, replica)
            for shard in range(settings.shards)
            for replica in range(settings.replicas)
        }
        release = release.exact()
        running = _is_running(names[0, 0])
        if running:
            _check_shape(state, settings)
        else:
            write_wanted(state, release, shape=(settings.shards, settings.replicas))
        nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
        actors = {}
        for (shard, replica), name in names.items():
            node = NodeAffinitySchedulingStrategy(nodes[(shard + replica) % len(nodes)], soft=True)
            actors[shard, replica] = MachineActor.options(  # type: ignore[attr-defined]
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=-1,
                max_task_retries=0,
                max_pending_calls=MOST_PENDING,
                num_cpus=settings.cpus_per_machine,
                scheduling_strategy=node,
            ).remote(state, (shard, settings.shards), replica, settings)
        machines = cls(state, settings, actors)
        try:
            machines._all("ready")
        except BaseException:
            if not running:
                machines.stop()
            raise
        before = read_wanted(state)[1]
        if before != release:
            machines.load(release)
        else:
            keep_states(release, owner=machines.owner, before=None)
        return machines

    @property
    def owner(self) -> str:
        """Under this name the snapshots in use are kept from being pruned."""
        return f"machines-{artifacts.fingerprint(self.state)}"

    def client(self) -> ParameterClient:
        """For lookups from any process of the cluster; it can be pickled."""
        return ParameterClient(self.state, self.settings)

    def load(self, release: MachineRelease) -> None:
        """Switch all machines to another release, which each opens beside the current one first. Lookups go on.

        Raises:
            ArtifactError: a machine cannot open it; all stay with the current one.
        """
        release, before = release.exact(), read_wanted(self.state)[1]
        serial = write_wanted(self.state, release, prepare=self._prepare)
        self._all("activate", serial)
        keep_states(release, owner=self.owner, before=before)

    def status(self) -> list[dict[str, Any]]:
        """`ParameterMachine.where` of those that answer, and what is the matter with the others."""
        found: list[dict[str, Any]] = []
        for (shard, replica), actor in self.actors.items():
            call: Any = actor.where.remote()
            try:
                found.append(ray.get(call, timeout=5.0))
            except (RayActorError, GetTimeoutError) as error:
                found.append({"shard": shard, "replica": replica, "problem": str(error).partition("\n")[0]})
        return found

    def stop(self) -> None:
        """Stop all machines for good."""
        closing: list[Any] = [actor.change.remote("close") for actor in self.actors.values()]
        ray.wait(closing, num_returns=len(closing), timeout=5.0)
        for actor in self.actors.values():
            ray.kill(actor)
        keep_states(None, owner=self.owner, before=read_wanted(self.state)[1])

    def _prepare(self, serial: int, release: MachineRelease) -> None:
        try:
            self._all("prepare", serial, release.to_json())
        except MimRayError:
            for actor in self.actors.values():
                actor.change.remote("forget", serial)
            raise

    def _all(self, method: str, *args: Any) -> None:
        """Call a method of every machine; one that dies meanwhile is called again when Ray has brought it back."""
        end = time.monotonic() + START_TIMEOUT_S
        pending = list(self.actors.values())
        while pending:
            calls: list[tuple[ActorHandle, Any]] = [(actor, actor.change.remote(method, *args)) for actor in pending]
            pending = []
            for actor, call in calls:
                try:
                    ray.get(call, timeout=max(0.1, end - time.monotonic()))
                except ActorUnavailableError:
                    pending.append(actor)
                except (RayTaskError, RayActorError, GetTimeoutError) as error:
                    raise user_error(error) or UnavailableError(
                        f"A parameter machine of {self.state} did not answer ({type(error).__name__})."
                    ) from error
            if pending:
                time.sleep(0.1)


def _is_running(name: str) -> bool:
    try:
        ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return False
    return True


def _check_shape(state: str, settings: Settings) -> None:
    shards, replicas = read_shape(state)
    if (shards, replicas) != (settings.shards, settings.replicas):
        raise ConfigError(
            f"The parameter machines of {state} are running with {shards} shards and {replicas} replicas, not with "
            f"{settings.shards} and {settings.replicas}. Stop them first."
        )
