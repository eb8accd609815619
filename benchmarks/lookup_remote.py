"""Redis beside a parameter machine that is called from another process, with many keys at once."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from lookup_cases import KEY_SETS, item_ids, make_snapshot, speed
from lookup_redis import fill, mget, missing_redis, redis_server
from measuring import seconds_in_turn

from mim_ray.config.scenario import ParameterMachines as Settings
from mim_ray.config.scenario import Run
from mim_ray.representation_center.machine_release import MachineRelease, TableSource
from mim_ray.representation_center.parameter_client import ParameterClient
from mim_ray.representation_center.parameter_machines import ParameterMachines
from mim_ray.runtime.cluster import cluster

if TYPE_CHECKING:
    from lookup import Plan


def remote_against_redis(plan: Plan) -> dict[str, Any]:
    """`vs_redis_mget_remote`: 5,000 string keys in, a float32 matrix out, on both sides, one server process on each.

    Beside it `vs_redis_mget_by_client`: 500 keys through the machines' client on their node, which reads the mappings.
    """
    if (missing := missing_redis()) is not None:
        return {"redis_remote": {"missing": missing}}
    import redis

    snapshot, _ = make_snapshot(plan.work, plan.rows, plan.width, "float16")
    rng = np.random.default_rng(3)
    sets = [item_ids(rng.integers(0, plan.rows, plan.remote_keys)).to_pylist() for _ in range(KEY_SETS)]
    release = MachineRelease("benchmark", {"mm": TableSource(snapshot.uri)})
    found: dict[str, Any] = {}
    with redis_server(str(plan.work)) as (port, path), cluster(Run(num_cpus=2)):
        fill(redis.Redis(port=port), snapshot)
        peers = {"tcp": redis.Redis(host="127.0.0.1", port=port), "unix": redis.Redis(unix_socket_path=path)}
        for shards in (1, 2):
            settings = Settings(shards=shards, replicas=1, cpus_per_machine=0, folder=f"{plan.work}/machines")
            state = f"{plan.work}/machines-{shards}.json"
            machines = ParameterMachines.start(state, release, settings)
            try:
                ours = ParameterClient(state, settings, direct=False)
                near = ParameterClient(state, settings)
                few = [keys[: plan.client_keys] for keys in sets]
                np.testing.assert_array_equal(mget(peers["tcp"], few[0], plan.width), near.multi_get(few[0]).matrix)
                asked, given = itertools.cycle(few), itertools.cycle(few[KEY_SETS // 2 :] + few[: KEY_SETS // 2])
                found[f"near-{shards}"] = speed(
                    *seconds_in_turn(
                        lambda asked=asked, near=near: near.multi_get(next(asked)),
                        lambda given=given: mget(peers["tcp"], next(given), plan.width),
                        budget_s=plan.budget_s / 2,
                        most=4_000,
                    )
                )
                for name, peer in peers.items() if shards == 1 else [("tcp", peers["tcp"])]:
                    np.testing.assert_array_equal(mget(peer, sets[0], plan.width), ours.multi_get(sets[0]).matrix)
                    asked, given = itertools.cycle(sets), itertools.cycle(sets[KEY_SETS // 2 :] + sets[: KEY_SETS // 2])
                    found[f"{name}-{shards}"] = speed(
                        *seconds_in_turn(
                            lambda asked=asked, ours=ours: ours.multi_get(next(asked)),
                            lambda given=given, peer=peer: mget(peer, next(given), plan.width),
                            budget_s=plan.budget_s,
                            most=1_000,
                        )
                    )
            finally:
                machines.stop()
    facts = {"keys": plan.remote_keys, "rows": plan.rows, "transport": "Ray actor call"}
    return {
        "vs_redis_mget_remote": found["tcp-1"] | facts,
        "vs_redis_mget_remote_unix_socket": found["unix-1"],
        "vs_redis_mget_remote_2_shards": found["tcp-2"],
        "vs_redis_mget_by_client": found["near-1"] | {"keys": plan.client_keys},
        "vs_redis_mget_by_client_2_shards": found["near-2"] | {"keys": plan.client_keys},
    }
