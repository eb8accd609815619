"""The cases of benchmarks/ranking.py: each fills some keys of its report. Servers that are compared take turns."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from measuring import seconds_in_turn
from ranking_figures import failed, latencies_ms, of_pairs, overload, p50, rate, statuses
from ranking_load import Load, Outcomes
from ranking_servers import THREADS, NotStartedError, Server, scenario_of

if TYPE_CHECKING:
    from ranking import Plan

NUM_REQUESTS = 512  # of each log, which starts again when it ends
WARM_UP_S = 0.3
Details = dict[str, Any]


@dataclass
class Bench:
    """A run on disk, the load, and the servers that are up.

    Attributes:
        fast: Serve's fast path, or why it is not there.
    """

    plan: Plan
    folder: Path
    load: Load
    uvicorn: Server
    base: Server
    fast: Server | str

    def sides(self) -> list[Server]:
        return [self.uvicorn] if isinstance(self.fast, str) else [self.uvicorn, self.fast]

    def closed(self, server: Server, connections: int, log: str = "log", seconds: float | None = None) -> Outcomes:
        """One turn of a server in a closed loop."""
        seconds = self.plan.seconds if seconds is None else seconds
        outcomes = self.load.closed(server.url, self.folder / log, connections=connections, seconds=seconds)
        return _whole(outcomes, server)


def measure_all(plan: Plan, folder: Path) -> Details:
    """All keys with their details."""
    _tell("starting")
    with contextlib.ExitStack() as stack:
        uvicorn = stack.enter_context(Server.uvicorn(folder, "din-mim", plan.processes))
        base = stack.enter_context(Server.uvicorn(folder, "din-base", plan.processes))
        details: Details = {}
        with _fast_path(plan, folder) as starting:
            load = stack.enter_context(Load(prepare(plan, folder)))  # while they start
            fast = _opened(uvicorn, base, starting)
            bench = Bench(plan, folder, load, uvicorn, base, fast)
            _tell("one connection")
            details |= one_connection(bench)
            _tell("peak")
            details |= peak(bench)
            _tell("half of uvicorn's peak")
            details |= half_of_peak(bench, details["vs_uvicorn"])
            if not isinstance(fast, str):
                _tell("overload")
                details |= overloaded(bench, details["vs_uvicorn"])
            if plan.large is not None:
                _tell("large requests")
                details |= large(bench)
        if plan.default_proxy:
            _tell("Serve's default proxy")
            details |= default_proxy(bench, details["vs_uvicorn"]["connections"])
    _tell("live encoding")
    return details | live_encoding(plan, folder)


def prepare(plan: Plan, folder: Path) -> str:
    """Write the run, the keys and the logs of requests; the key that the load sends."""
    from ranking_run import Shop, log_of_requests, make_run  # takes seconds: after the servers are started

    from mim_ray.serving.keys import new_key

    folder.mkdir(parents=True, exist_ok=True)
    key, line = new_key("benchmark", ["rank"])
    (folder / "keys").write_text(line + "\n")
    (folder / "keys").chmod(0o600)
    sizes = {"log": plan.size} | ({} if plan.large is None else {"log-large": plan.large})
    shop = Shop(
        num_items=plan.num_items, num_users=plan.num_users, lengths=tuple(length for _, length in sizes.values())
    )
    make_run(folder, shop)
    for name, (candidates, length) in sizes.items():
        lines = log_of_requests(shop, num=NUM_REQUESTS, candidates=candidates, length=length, seed=plan.seed)
        (folder / name).write_text("\n".join(lines))
    return key


def one_connection(bench: Bench) -> Details:
    """What a request takes when nobody else asks: the proxy's part of it, and the content's."""
    sides = [*bench.sides(), bench.base]
    found: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(bench.plan.rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            found[side.name].append(p50(bench.closed(side, 1)))
    ours, base = found[bench.uvicorn.name], found[bench.base.name]
    with_content = {"mim_p50_ms": ours, "base_p50_ms": base}
    details: Details = {"mim_vs_base_p50": of_pairs([a / b for a, b in zip(ours, base, strict=True)], **with_content)}
    if not isinstance(bench.fast, str):
        fast = found[bench.fast.name]
        more = [a - b for a, b in zip(fast, ours, strict=True)]
        details["overhead_p50_ms"] = of_pairs(more, fast_p50_ms=fast, uvicorn_p50_ms=ours)
    return details


def peak(bench: Bench) -> Details:
    """Requests per second with several numbers of connections; the figure is that of uvicorn's best number."""
    by_connections = {}
    for connections in bench.plan.connections:
        found = _rates_in_turn(bench, bench.sides(), connections)
        uvicorn = found[bench.uvicorn.name]
        other = uvicorn if isinstance(bench.fast, str) else found[bench.fast.name]
        pairs = [a / b for a, b in zip(other, uvicorn, strict=True)]
        by_connections[connections] = of_pairs(pairs, fast_per_s=other, uvicorn_per_s=uvicorn)
    best = max(by_connections, key=lambda one: by_connections[one]["uvicorn_per_s"])
    details = by_connections[best] | {"connections": best, "by_connections": by_connections}
    if isinstance(bench.fast, str):
        details = {"missing": bench.fast, "connections": best, "uvicorn_per_s": details["uvicorn_per_s"]}
    return {"vs_uvicorn": details}


def half_of_peak(bench: Bench, at_peak: Details) -> Details:
    """Poisson arrivals at half of what uvicorn can do, the same ones on both sides; p99 over all rounds."""
    plan, arrivals = bench.plan, at_peak["uvicorn_per_s"] / 2
    found: dict[str, list[np.ndarray]] = {side.name: [] for side in bench.sides()}
    late: list[float] = []
    refused = dict.fromkeys(found, 0)
    for number in range(plan.rounds):
        for side in bench.sides() if number % 2 == 0 else reversed(bench.sides()):
            outcomes = bench.load.open(
                side.url, bench.folder / "log", phases=[(arrivals, plan.open_s)], seed=plan.seed + number
            )
            found[side.name].append(latencies_ms(_whole(outcomes, side)))
            late += outcomes.late
            refused[side.name] += outcomes.status.count(503)
    p99 = {name: float(np.percentile(np.concatenate(parts), 99)) for name, parts in found.items()}
    details: Details = {
        "arrivals_per_s": round(arrivals, 1),
        "requests": sum(len(part) for part in found[bench.uvicorn.name]),
        "uvicorn_p99_ms": round(p99[bench.uvicorn.name], 2),
        "sent_late_p99_ms": round(float(np.percentile(late, 99)) * 1_000, 2),
    }
    if isinstance(bench.fast, str):
        return {"p99_vs_uvicorn": details | {"missing": bench.fast}}
    pairs = [
        float(np.percentile(a, 99) / np.percentile(b, 99))
        for a, b in zip(found[bench.fast.name], found[bench.uvicorn.name], strict=True)
    ]
    of_rounds = of_pairs(pairs)["quartiles"]
    value = round(p99[bench.fast.name] / p99[bench.uvicorn.name], 4)
    own = {"value": value, "quartiles_of_rounds": of_rounds, "fast_p99_ms": round(p99[bench.fast.name], 2)}
    own["fast_refused"] = refused[bench.fast.name]
    return {"p99_vs_uvicorn": own | details}


def overloaded(bench: Bench, at_peak: Details) -> Details:
    """The fast path at half of its capacity, at three times its capacity, and at half again."""
    assert isinstance(bench.fast, Server)
    capacity, plan, log = at_peak["fast_per_s"], bench.plan, bench.folder / "log"
    phases = [(capacity / 2, plan.open_s), (capacity * 3, plan.overload_s), (capacity / 2, plan.after_s)]
    bench.load.open(
        bench.fast.url, log, phases=[(capacity * 3, 1.0)], seed=plan.seed
    )  # opens the connections: warms up
    outcomes = bench.load.open(bench.fast.url, log, phases=phases, seed=plan.seed)
    before = np.array(outcomes.due) < plan.open_s
    ranked = before & (np.array(outcomes.status) == 200)
    normal = float(np.percentile(np.array(outcomes.latency)[ranked] * 1_000, 99))
    found = overload(outcomes, phases, normal)
    found["overload_p99_ratio"] |= {"failed": failed(outcomes), "statuses": statuses(outcomes)}
    return found


def large(bench: Bench) -> Details:
    """Long requests of long histories, one connection."""
    assert bench.plan.large is not None
    candidates, length = bench.plan.large
    found: dict[str, list[float]] = {side.name: [] for side in bench.sides()}
    for _ in range(bench.plan.rounds):
        for side in bench.sides():
            found[side.name].append(p50(bench.closed(side, 1, "log-large")))
    rows = {f"{name}_p50_ms": round(float(np.median(values)), 2) for name, values in found.items()}
    return {"large": {"candidates": candidates, "behaviors": length, **rows}}


def default_proxy(bench: Bench, connections: int) -> Details:
    """Serve's own proxy, which a newcomer gets, with as many connections as uvicorn likes best."""
    key = "default_proxy_vs_uvicorn"
    try:
        with Server.serve(bench.folder, "din-mim", bench.plan.processes, fast=False) as server:
            server.open()
            server.wait()
            sides = [bench.uvicorn, server]
            found = _rates_in_turn(bench, sides, connections)
    except NotStartedError as error:
        return {key: {"missing": str(error)}}
    uvicorn, ours = found[bench.uvicorn.name], found[server.name]
    pairs = [a / b for a, b in zip(ours, uvicorn, strict=True)]
    return {key: of_pairs(pairs, default_per_s=ours, uvicorn_per_s=uvicorn)}


def live_encoding(plan: Plan, folder: Path) -> Details:
    """A ranking from the tables, and the same after encoding its candidates (decoded pictures at hand) with the tiny encoder."""
    import torch

    from mim_ray.encoders.item_encoder import ItemEncoder, encode_batch
    from mim_ray.serving.messages import RankRequest
    from mim_ray.serving.ranker import RankingService
    from mim_ray.serving.served import Served

    torch.set_num_threads(THREADS)
    scenario = scenario_of(folder)
    service = RankingService.open(Served.of_run(scenario), scenario.serving)
    encoder = ItemEncoder.load(f"{folder}/run/csft/encoder")
    candidates = plan.size[0]
    random = np.random.default_rng(plan.seed)
    pixels = random.integers(0, 256, (candidates, 3, encoder.image_size, encoder.image_size), np.uint8)
    titles, there = [f"thing {row}" for row in range(candidates)], np.ones(candidates, bool)
    requests = [RankRequest.model_validate_json("{" + line) for line in (folder / "log").read_text().splitlines()[:32]]
    numbers = iter(range(1_000_000))

    def rank() -> object:
        return service.rank(requests[next(numbers) % len(requests)]).model_dump_json()

    def encode_and_rank() -> object:
        encode_batch(encoder, titles, pixels, there)
        return rank()

    try:
        ours, other = seconds_in_turn(rank, encode_and_rank, budget_s=plan.encoding_s, most=200)
    finally:
        service.rollout.current.close()
    pairs = [b / a for a, b in zip(ours, other, strict=True)]
    times = {"ranking_ms": [one * 1_000 for one in ours], "with_encoding_ms": [one * 1_000 for one in other]}
    return {"vs_live_encoding": of_pairs(pairs, **times)}


def _rates_in_turn(bench: Bench, sides: list[Server], connections: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {side.name: [] for side in sides}
    for side in sides:
        bench.closed(side, connections, seconds=WARM_UP_S)
    for number in range(bench.plan.rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            found[side.name].append(rate(bench.closed(side, connections)))
    return found


def _fast_path(plan: Plan, folder: Path) -> contextlib.AbstractContextManager[Server | str]:
    """The server, starting, or why there is none."""
    if not plan.serve:
        return contextlib.nullcontext("left out")
    return Server.serve(folder, "din-mim", plan.processes, fast=True)


def _opened(uvicorn: Server, base: Server, fast: Server | str) -> Server | str:
    """Have all of them open the run; the fast path, ready, or why there is none: never another one in its place."""
    for server in (uvicorn, base, fast):
        if isinstance(server, Server):
            server.open()
    uvicorn.wait()
    base.wait()
    if isinstance(fast, Server):
        try:
            fast.wait()
        except NotStartedError as error:
            return str(error)
    return fast


def _whole(outcomes: Outcomes, server: Server) -> Outcomes:
    """
    Raises:
        RuntimeError: a request failed that should not.
    """
    if failed(outcomes):
        raise RuntimeError(f"{server.name} failed requests; statuses: {statuses(outcomes)} (0: no answer)")
    return outcomes


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
