"""Redis as a store of embeddings, beside a client on the parameter machine's node, which reads the mapping itself."""

from __future__ import annotations

import itertools
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lookup_cases import KEY_SETS, item_ids, make_snapshot, speed
from measuring import missing_package, seconds_in_turn

from mim_ray.representation_center.snapshot import Snapshot

if TYPE_CHECKING:
    from lookup import Plan

_FILL_KEYS = 10_000


def against_redis(plan: Plan) -> dict[str, Any]:
    """`vs_redis_mget`: 500 string keys in, a float32 matrix out, on both sides."""
    if (missing := missing_redis()) is not None:
        return {"redis": {"missing": missing}}
    import redis

    snapshot, _ = make_snapshot(plan.work, plan.rows, plan.width, "float16")
    rng = np.random.default_rng(2)
    sets = [item_ids(rng.integers(0, plan.rows, plan.client_keys)).to_pylist() for _ in range(KEY_SETS)]
    with redis_server(str(plan.work)) as (port, path):
        fill(redis.Redis(port=port), snapshot)
        found: dict[str, Any] = {}
        for name, options in {"tcp": {"host": "127.0.0.1", "port": port}, "unix": {"unix_socket_path": path}}.items():
            client = redis.Redis(**options)
            np.testing.assert_array_equal(mget(client, sets[0], plan.width), snapshot.gather(snapshot.lookup(sets[0])))
            ours, theirs = itertools.cycle(sets), itertools.cycle(sets[KEY_SETS // 2 :] + sets[: KEY_SETS // 2])
            found[name] = speed(
                *seconds_in_turn(
                    lambda ours=ours: snapshot.gather(snapshot.lookup(next(ours))),
                    lambda theirs=theirs, client=client: mget(client, next(theirs), plan.width),
                    budget_s=plan.budget_s,
                    most=4_000,
                )
            )
        used = redis.Redis(port=port).info("memory")["used_memory"]
    facts = {"keys": plan.client_keys, "rows": plan.rows, "redis_py": redis.__version__, "hiredis": _hiredis()}
    return {
        "vs_redis_mget": found["tcp"] | facts,
        "vs_redis_mget_unix_socket": found["unix"],
        "redis_bytes_per_item": {"value": round(used / plan.rows, 1)},
    }


def missing_redis() -> str | None:
    """What to install before Redis can be measured; None: nothing."""
    try:
        import redis  # noqa: F401
    except ImportError as error:
        return missing_package(error, "redis")
    if shutil.which("redis-server") is None:
        return "There is no redis-server. Install it with: apt-get install redis-server"
    return None


def mget(client: Any, keys: Sequence[str], width: int) -> np.ndarray:
    """(n, D) float32, zeros for unknown keys; values are float16 bytes."""
    values = client.mget(keys)
    if None in values:
        empty = bytes(2 * width)
        values = [empty if value is None else value for value in values]
    stored = np.frombuffer(bytearray(b"".join(values)), np.float16).reshape(len(keys), width)
    return torch.from_numpy(stored).float().numpy()


def fill(client: Any, snapshot: Snapshot) -> None:
    """Every row of the snapshot under its id, in its stored dtype."""
    ids = snapshot.ids
    for first in range(0, snapshot.num_rows, _FILL_KEYS):
        rows = np.arange(first, min(first + _FILL_KEYS, snapshot.num_rows))
        stored = snapshot.gather_stored(rows)
        client.mset(
            {key: row.tobytes() for key, row in zip(ids.slice(first, len(rows)).to_pylist(), stored, strict=True)}
        )


@contextmanager
def redis_server(folder: str) -> Iterator[tuple[int, str]]:
    """A server of our own on a free loopback port and a Unix socket, without persistence; ended on leaving."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = f"{folder}/redis.sock"
    options = ["--port", str(port), "--bind", "127.0.0.1", "--unixsocket", path, "--save", "", "--appendonly", "no"]
    server = subprocess.Popen(["redis-server", *options, "--dir", folder], stdout=subprocess.DEVNULL)
    try:
        _wait(port, server)
        yield port, path
    finally:
        server.terminate()
        server.wait(30)


def _wait(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        if server.poll() is not None:
            raise RuntimeError(f"redis-server ended with {server.returncode} before it answered.")
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("redis-server does not answer.")


def _hiredis() -> str | None:
    try:
        import hiredis
    except ImportError:
        return None
    return str(hiredis.__version__)
