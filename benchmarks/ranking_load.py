"""The load of benchmarks/ranking.py: a process of its own that replays a log of requests and tells what became of each.

    python benchmarks/ranking_load.py     an order (JSON) on each line of its input, the outcomes (JSON) on a line of its output

Closed loop: N connections, each of which asks again as soon as it is answered. Open loop: Poisson arrivals from a seed at given
rates, whatever the server does; latency counts from when a request was due, so that waiting for a slow server counts too. Either
way the requests go out in the log's order with timestamps that rise as the clock does, on a bounded number of connections.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

import numpy as np

ANSWER_S = 15.0  # then a request counts as failed
LOG_BEGINS = datetime(2026, 1, 1, tzinfo=UTC)
FAILED = 0


@dataclass(frozen=True)
class Order:
    """
    Attributes:
        url: of the endpoint. log: file with a request on each line, JSON without its first brace.
        connections: at most so many requests are under way at once.
        seconds: of a closed loop; None for an open one.
        phases: (requests per second, seconds) of an open loop, one after the other.
    """

    url: str
    log: str
    connections: int
    key: str = ""
    seconds: float | None = None
    phases: list[tuple[float, float]] = field(default_factory=list)
    seed: int = 0


@dataclass
class Outcomes:
    """Of each request, in the order of their ends: when it was due (s since the start), s that it was sent late, s from due to the
    end of its answer, status (0: no answer), and whether the answer said when to try again. `elapsed_s`: until the last answer."""

    due: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    retry_after: list[bool] = field(default_factory=list)
    elapsed_s: float = 0.0

    def add(self, due: float, late: float, latency: float, answer: tuple[int, bool]) -> None:
        self.due.append(round(due, 6))
        self.late.append(round(late, 6))
        self.latency.append(round(latency, 6))
        self.status.append(answer[0])
        self.retry_after.append(answer[1])


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(asdict(asyncio.run(replay(Order(**order))))), flush=True)


async def replay(order: Order) -> Outcomes:
    """Do what was ordered."""
    requests = Path(order.log).read_text().splitlines()
    run = _Replay(order, requests)
    start = time.perf_counter()
    outcomes = await (run.open_loop() if order.seconds is None else run.closed_loop(order.seconds))
    outcomes.elapsed_s = time.perf_counter() - start
    return outcomes


def arrivals(phases: list[tuple[float, float]], seed: int) -> np.ndarray:
    """Seconds at which requests are due, rising: Poisson arrivals, the same for the same seed."""
    random = np.random.default_rng(seed)
    begin, parts = 0.0, [np.zeros(0)]
    for rate, seconds in phases:
        gaps = random.exponential(1 / rate, max(1, int(2 * rate * seconds + 50)))
        at = np.cumsum(gaps)
        parts.append(begin + at[at < seconds])
        begin += seconds
    return np.concatenate(parts)


class _Replay:
    def __init__(self, order: Order, requests: list[str]) -> None:
        self._order, self._requests, self._number = order, requests, 0
        self._outcomes = Outcomes()

    async def closed_loop(self, seconds: float) -> Outcomes:
        begin = time.perf_counter()

        async def ask_again() -> None:
            connection = _Connection(self._order)
            while (due := time.perf_counter() - begin) < seconds:
                answer = await connection.post(self._next(due))
                self._outcomes.add(due, 0.0, time.perf_counter() - begin - due, answer)
            connection.close()

        await asyncio.gather(*(ask_again() for _ in range(self._order.connections)))
        return self._outcomes

    async def open_loop(self) -> Outcomes:
        free = asyncio.Semaphore(self._order.connections)
        idle: list[_Connection] = []
        begin = time.perf_counter()

        async def ask(due: float) -> None:
            body = self._next(due)
            async with free:
                connection = idle.pop() if idle else _Connection(self._order)
                sent = time.perf_counter() - begin
                answer = await connection.post(body)
                idle.append(connection)
            self._outcomes.add(due, sent - due, time.perf_counter() - begin - due, answer)

        async with asyncio.TaskGroup() as group:
            for due in arrivals(self._order.phases, self._order.seed).tolist():
                early = due - (time.perf_counter() - begin)
                if early > 0:
                    await asyncio.sleep(early)
                group.create_task(ask(due))
        for connection in idle:
            connection.close()
        return self._outcomes

    def _next(self, due: float) -> bytes:
        """The next request of the log; from its beginning when it ends, with later timestamps."""
        request = self._requests[self._number % len(self._requests)]
        self._number += 1
        return f'{{"timestamp":"{(LOG_BEGINS + timedelta(seconds=due)).isoformat()}",{request}'.encode()


class _Connection:
    """HTTP/1.1, one request at a time; opened when needed, and again when the server has closed it."""

    def __init__(self, order: Order) -> None:
        parts = urlsplit(order.url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        key = f"X-API-Key: {order.key}\r\n" if order.key else ""
        self._head = (
            f"POST {parts.path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n{key}Content-Type: application/json\r\n"
        )
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def post(self, body: bytes) -> tuple[int, bool]:
        """Status, FAILED without an answer, and whether it said when to try again."""
        message = f"{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        try:
            async with asyncio.timeout(ANSWER_S):
                if self._writer is not None:
                    try:
                        return await self._exchange(message)
                    except (OSError, EOFError):
                        self.close()  # closed while it was idle: any client asks again then
                self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=2**20)
                return await self._exchange(message)
        except (OSError, EOFError, TimeoutError):
            self.close()
            return FAILED, False

    async def _exchange(self, message: bytes) -> tuple[int, bool]:
        assert self._reader is not None
        assert self._writer is not None
        self._writer.write(message)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
        if "content-length" in fields:
            await self._reader.readexactly(int(fields["content-length"]))
        elif fields.get("transfer-encoding") == "chunked":
            await self._read_chunks(self._reader)
        else:
            await self._reader.read()
            fields["connection"] = "close"
        if fields.get("connection") == "close":
            self.close()
        return int(head.split(" ", 2)[1]), "retry-after" in fields

    async def _read_chunks(self, reader: asyncio.StreamReader) -> None:
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            await reader.readexactly(size + 2)
        await reader.readuntil(b"\r\n")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._reader = self._writer = None


class Load:
    """The process, seen from the benchmark: gives orders, one at a time."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def closed(self, url: str, log: Path, *, connections: int, seconds: float) -> Outcomes:
        """Ask on so many connections for so long."""
        return self._do(Order(url, str(log), connections, self._key, seconds=seconds))

    def open(
        self, url: str, log: Path, *, phases: list[tuple[float, float]], seed: int, connections: int = 256
    ) -> Outcomes:
        """Ask when requests are due: `phases` of (requests per second, seconds)."""
        return self._do(Order(url, str(log), connections, self._key, phases=phases, seed=seed))

    def _do(self, order: Order) -> Outcomes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(order)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the load generator ended with {self._process.wait()}: see its error above")
        return Outcomes(**json.loads(line))

    def __enter__(self) -> Load:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        if kind is not None:
            self._process.kill()
        self._process.wait()
        self._process.stdout.close()


if __name__ == "__main__":
    main()
