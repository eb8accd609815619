"""Constant load on both apps by concurrent callers, half by bare HTTP and half by the shipped client, and a record of each call."""

from __future__ import annotations

import base64
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil
import requests

from mim_ray.serving.client import Client

CANDIDATES = [*(f"i{row}" for row in range(40)), "never-heard-of"]
USERS = [*(f"u{row}" for row in range(10)), "nobody"]  # the load posts no event of theirs
KINDS = ("rank", "items", "events")
BARE_TIMEOUT_S = 60.0
PAUSE_S = 0.05


@dataclass(frozen=True)
class Kill:
    """A process that was killed with SIGKILL. Its end lies between two times of time.monotonic: before, and seen gone after."""

    pid: int
    before: float
    after: float


@dataclass(frozen=True)
class Call:
    """One request and what became of it. Times are of time.monotonic.

    Attributes:
        body: what was asked. status: None where no answer came. problem: of a failed one.
    """

    kind: str
    shipped: bool
    body: Mapping[str, Any]
    start: float
    end: float
    status: int | None
    answer: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def failed(self) -> bool:
        return self.status != 200

    def under_way_at(self, at: Kill) -> bool:
        return self.start <= at.after and self.end >= at.before


class Load:
    """Callers of every kind, until the end of the block.

    with Load(url, "kill-1", callers=2, client=client, picture=picture) as load:
        load.wait_for_more(20)
    load.calls

    Args:
        name: tells the posted items and users from those of other loads.
        callers: of each kind and each of the two ways.
        client: the shipped one.
        picture: seed -> an encoded picture, sent with every fourth item.
        key: an API key, of the bare requests.
    """

    def __init__(
        self,
        url: str,
        name: str,
        *,
        callers: int,
        client: Client,
        picture: Callable[[int], bytes],
        key: str | None = None,
    ) -> None:
        self.url, self.name = url, name
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.calls: list[Call] = []
        self._client, self._picture = client, picture
        self._busy: dict[str, tuple[str, bool]] = {}
        self._stop = threading.Event()
        ways = [(kind, shipped) for kind in KINDS for shipped in (False, True)]
        self._threads = [
            threading.Thread(target=self._call_on, args=(kind, shipped, f"{name}-{way}-{number}"), daemon=True)
            for way, (kind, shipped) in enumerate(ways)
            for number in range(callers)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(BARE_TIMEOUT_S + 30)
        assert not any(thread.is_alive() for thread in self._threads), "a caller hangs"

    def wait_for_more(self, answers: int, timeout_s: float = 300.0) -> None:
        """Until so many more requests of each kind and way were answered that began after now."""
        now = time.monotonic()

        def enough() -> bool:
            done = [call for call in list(self.calls) if call.start > now and not call.failed]
            return all(
                sum((call.kind, call.shipped) == (kind, shipped) for call in done) >= answers
                for kind, shipped in itertools.product(KINDS, (False, True))
            )

        until(enough, "requests are not answered any more", timeout_s)

    def busy(self, kinds: Collection[str]) -> bool:
        """Whether several requests of these kinds are under way now, one of them by bare HTTP."""
        now = [shipped for kind, shipped in list(self._busy.values()) if kind in kinds]
        return len(now) > 2 and not all(now)

    def acknowledged(self, kind: str) -> list[Call]:
        return [call for call in self.calls if call.kind == kind and not call.failed]

    def failures(self, *, shipped: bool) -> list[Call]:
        return [call for call in self.calls if call.failed and call.shipped == shipped]

    def told(self) -> str:
        """A line for the test's output."""
        counts = Counter((call.kind, "client" if call.shipped else "bare", str(call.status)) for call in self.calls)
        slowest = max(self.calls, key=lambda call: call.end - call.start)
        lines = [f"{kind} {way} {status}: {count:,}" for (kind, way, status), count in sorted(counts.items())]
        return f"{self.name}: {', '.join(lines)}; slowest {slowest.kind} {slowest.end - slowest.start:.1f} s"

    def _call_on(self, kind: str, shipped: bool, name: str) -> None:
        make = {"rank": _rank, "items": self._item, "events": _event}[kind]
        send = self._by_client if shipped else self._bare
        for number in itertools.count():
            if self._stop.wait(PAUSE_S):
                break
            body = make(name, number)
            self._busy[name] = kind, shipped
            self.calls.append(send(kind, body))
            del self._busy[name]
        self._client.close()

    def _item(self, name: str, number: int) -> dict[str, Any]:
        item = {"item_id": f"{name}-{number}", "title": f"striped mug {name} {number}", "category": "mugs"}
        return item | ({"image": self._picture(number)} if number % 4 == 0 else {})

    def _bare(self, kind: str, body: Mapping[str, Any]) -> Call:
        headers = self._headers | ({"Idempotency-Key": body["item_id"]} if kind == "events" else {})
        sent = {key: plain(value) for key, value in body.items()}
        start = time.monotonic()
        try:
            answer = requests.post(f"{self.url}/v1/{kind}", json=sent, headers=headers, timeout=BARE_TIMEOUT_S)
            end = time.monotonic()
        except requests.RequestException as error:
            return Call(kind, False, body, start, time.monotonic(), None, problem=f"{type(error).__name__}: {error}")
        if answer.status_code != 200:
            return Call(kind, False, body, start, end, answer.status_code, problem=answer.text[:300])
        return Call(kind, False, body, start, end, 200, answer.json())

    def _by_client(self, kind: str, body: Mapping[str, Any]) -> Call:
        start = time.monotonic()
        try:
            if kind == "rank":
                answer = self._client.rank(**body)
            elif kind == "items":
                answer = self._client.items([body])
            else:
                answer = self._client.events([body], idempotency_key=body["item_id"])
        except Exception as error:  # noqa: BLE001  (each is a failed call)
            problem = f"{type(error).__name__}: {error}"
            return Call(kind, True, body, start, time.monotonic(), getattr(error, "status", None), problem=problem)
        return Call(kind, True, body, start, time.monotonic(), 200, answer)


def plain(value: Any) -> Any:
    """As JSON has it."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def processes(title: str, below: int | None = None) -> dict[int, psutil.Process]:
    """By id, the processes below one (default: this one, for the embedded Ray's) whose title begins so."""
    found = {}
    for process in psutil.Process(below).children(recursive=True):
        try:
            line = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if line and line[0].startswith(title):
            found[process.pid] = process
    return found


def kill(process: psutil.Process, when: Callable[[], bool]) -> Kill:
    """SIGKILL at a certain moment, and wait until the process is gone, with all that it had started."""
    children = process.children(recursive=True)
    until(when, "the moment does not come", every_s=0.002)
    before = time.monotonic()
    process.kill()
    gone, alive = psutil.wait_procs([process], timeout=30)
    after = time.monotonic()
    assert (gone, alive) == ([process], []), "it was not killed"
    assert not psutil.pid_exists(process.pid)
    orphans = psutil.wait_procs(children, timeout=30)[1]
    assert orphans == [], "it left processes behind"
    return Kill(process.pid, before, after)


def kill_one(
    title: str,
    load: Load,
    healthy: Callable[[], bool],
    *,
    kinds: Collection[str] = KINDS,
    below: int | None = None,
) -> Kill:
    """Kill a process with this title while requests are under way, and wait until another has its place, and for answers."""
    load.wait_for_more(10)
    before = processes(title, below)
    killed = kill(next(iter(before.values())), lambda: load.busy(kinds))
    until(lambda: processes(title, below).keys() - before.keys(), "nothing takes its place")
    until(healthy, "it does not come back")
    back = time.monotonic()
    load.wait_for_more(20)
    assert killed.pid not in processes(title, below)
    print(f"{title}: {killed.pid} of {list(before)} killed, now {list(processes(title, below))}")
    print(f"healthy {back - killed.before:.1f} s later")
    return killed


def check_only_refused_until_back(load: Load, killed: Kill) -> None:
    """By bare HTTP only what was in flight when the proxy died, and what came before another one knew the apps, has failed."""
    failed = load.failures(shipped=False)
    answered = [call for call in load.calls if not (call.failed or call.shipped) and call.start > killed.after]
    up = min(call.end for call in answered)
    print(f"away for {up - killed.before:.1f} s, {len(failed)} failed, {Counter(call.status for call in failed)}")
    assert any(call.under_way_at(killed) for call in load.calls), "nothing was under way"
    assert failed, "it was not missed: another one has its place"
    assert [call for call in failed if call.start < killed.before and not call.under_way_at(killed)] == []
    assert [call for call in failed if call.start > up] == [], "it is back"
    for call in failed:  # cut off, refused, or there is no app yet
        assert call.status is None or (call.status == 404 and "/-/routes" in call.problem), call.problem


def until(done: Callable[[], Any], otherwise: str, timeout_s: float = 300.0, *, every_s: float = 0.05) -> Any:
    """Wait for a condition; its value."""
    end = time.monotonic() + timeout_s
    while not (value := done()):
        assert time.monotonic() < end, otherwise
        time.sleep(every_s)
    return value


def _rank(name: str, number: int) -> dict[str, Any]:
    body: dict[str, Any] = {"user_id": USERS[(number + len(name)) % len(USERS)], "candidates": CANDIDATES}
    if number % 3 == 0:
        body["behaviors"] = [CANDIDATES[(number + step) % 40] for step in range(6)]
    return body


def _event(name: str, number: int) -> dict[str, Any]:
    return {"user_id": name, "item_id": f"{name}-{number}", "event": "click"}
