"""One process at a time for a piece of work, on any machine: a lease in a folder, freed by itself when its holder dies.

    with Lease(f"{center}/refresh/v1/lease", what="refresh") as lease:     # LeaseTakenError: somebody else has it
        ...
        lease.check()                                                      # before what only the holder may do

*How.* Who wants the lease writes a claim, a file of its own, and then lists the folder. Listings show every file that was
written before they began (POSIX, S3, GCS), so of two who come at once at least one sees the other. Who sees a claim that is
held leaves; who sees only one that is being made withdraws, waits a random moment and tries again. No conditional writes,
no lock service, no clock shared by more than `FREE_AFTER_S`.

*Crashes.* The holder renews its claim every `RENEW_S` seconds. A claim not renewed for `FREE_AFTER_S` is free; a dead holder
on this machine is noticed at once. A holder that was only asleep so long finds its claim gone in `check`.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from mim_ray import artifacts
from mim_ray.errors import ArtifactError

RENEW_S = 10.0
FREE_AFTER_S = 120.0
_ATTEMPTS = 8


class LeaseTakenError(ArtifactError):
    """Somebody else has the lease; the sentence says who and since when."""


class Lease:
    """Exclusive right to `what` below the folder `uri`, while used as a context manager.

    Raises:
        LeaseTakenError: on entry, somebody else has it; in `check`, it was lost.
    """

    def __init__(self, uri: str, *, what: str) -> None:
        self.uri, self.what = uri, what
        self.owner = uuid.uuid4().hex[:12]
        self._claim: dict[str, Any] = {
            "owner": self.owner,
            "host": socket.gethostname(),
            "namespace": _namespace(),
            "pid": os.getpid(),
            "started": _process_start(os.getpid()),
            "since": artifacts.now(),
            "held": False,
        }
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        for _ in range(_ATTEMPTS):
            self._write()
            others = self._others()
            if not others:
                self._claim["held"] = True
                self._write()
                self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
                self._thread.start()
                return self
            artifacts.remove(self._file)
            held = next((claim for claim in others if claim["held"]), None)
            if held is not None:
                raise LeaseTakenError(self._taken(held))
            time.sleep(random.uniform(0.05, 0.5))
        raise LeaseTakenError(f"Others try to start the same {self.what} at {self.uri} again and again.")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        artifacts.remove(self._file)

    def check(self) -> None:
        """Make sure that the lease is still ours."""
        if not artifacts.exists(self._file):
            raise LeaseTakenError(
                f"This {self.what} lost its lease {self.uri}: it did not renew it for {FREE_AFTER_S:.0f} s. "
                "Nothing is damaged; run it again."
            )

    @property
    def _file(self) -> str:
        return f"{self.uri}/{self.owner}.json"

    def _write(self) -> None:
        artifacts.write_json(self._file, self._claim | {"renewed_at": time.time()})

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                if not artifacts.exists(self._file):
                    return  # it was taken away: `check` says so
                self._write()
            except (ArtifactError, OSError):
                continue  # the store may answer again before the lease runs out

    def _others(self) -> list[dict[str, Any]]:
        """Living claims of others; dead ones are removed."""
        found = []
        for file in artifacts.list_files(self.uri, ".json"):
            if file == self._file:
                continue
            try:
                claim = json.loads(artifacts.read_bytes(file))
                if _alive(claim):
                    found.append(claim)
                else:
                    artifacts.remove(file)
            except ArtifactError:
                continue  # given back meanwhile
        return found

    def _taken(self, claim: dict[str, Any]) -> str:
        age = max(0.0, time.time() - claim["renewed_at"])
        return (
            f"Another {self.what} is running: process {claim['pid']} on {claim['host']} since {claim['since']}, last sign "
            f"of life {age:.0f} s ago. If it died, its lease is free {FREE_AFTER_S:.0f} s after that (at once on the same "
            "machine)."
        )


def _alive(claim: dict[str, Any]) -> bool:
    if time.time() - claim["renewed_at"] > FREE_AFTER_S:
        return False
    here = (socket.gethostname(), _namespace())
    if (claim["host"], claim["namespace"]) != here or claim["started"] is None:
        return True
    return _process_start(claim["pid"]) == claim["started"]


def _namespace() -> str | None:
    """Containers of one machine may share its name, not its process numbers."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _process_start(pid: int) -> str | None:
    """When a process of this machine started, in the kernel's count since boot; None if there is none (or no /proc)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
