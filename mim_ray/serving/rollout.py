"""Following the release: a newly promoted one is opened beside the one that serves, then one reference is swapped.

A request takes the reference once, so it runs wholly on one release, and none waits or fails while they are switched. What
cannot be opened is refused with its reason; the one before goes on. A roll-back is a promotion like any other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from mim_ray.errors import ArtifactError, ConfigError, StorageError, UnavailableError, VersionMismatchError
from mim_ray.serving.served import Served

logger = logging.getLogger("ray.serve")
_KINDS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (VersionMismatchError, "its parts are of different encoder versions"),
    (ConfigError, "the app's settings do not fit it"),
    (UnavailableError, "a parameter machine is away"),
    ((StorageError, OSError), "storage does not answer"),
    (ArtifactError, "something of it is missing or damaged"),
)
RETRY_S = 10.0  # a refused release may have been damaged only for a moment


class Closable(Protocol):
    """An open release."""

    @property
    def served(self) -> Served: ...

    def close(self) -> None: ...


OpenRelease = TypeVar("OpenRelease", bound=Closable)


class Rollout(Generic[OpenRelease]):
    """The release that serves, and the thread that exchanges it.

    Args:
        first: open already.
        read: what should be served now. open: opens that, or raises.

    Attributes:
        current: take it once for a request.
        refused: why the wanted release is not served; None while it is. It may name paths and addresses: for the log.
        told: the same without them, for whoever asks.
    """

    def __init__(
        self,
        first: OpenRelease,
        read: Callable[[], Served] | None = None,
        open: Callable[[Served], OpenRelease] | None = None,
        *,
        retry_s: float = RETRY_S,
    ) -> None:
        self.current = first
        self.refused: str | None = None
        self.told: str | None = None
        self._read, self._open, self._retry_s = read, open, retry_s
        self._failed: Served | None = None
        self._retry_at = 0.0
        self._checking = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, every_s: float) -> None:
        """Look for a new release every so many seconds, in a thread."""
        self._thread = threading.Thread(target=self._follow, args=(every_s,), daemon=True, name="release")
        self._thread.start()

    def stop(self) -> None:
        """Stay with what is current."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> OpenRelease:
        """Look now; what is current then."""
        if self._read is not None:
            with self._checking:
                self._check(self._read)
        return self.current

    def _check(self, read: Callable[[], Served]) -> None:
        try:
            wanted = read()
        except Exception as error:  # noqa: BLE001  (storage is away, or the release is not one for this app)
            self._refuse("The release", error)
            return
        if wanted == self.current.served:
            self.refused = self.told = self._failed = None
            return
        if wanted == self._failed and time.monotonic() < self._retry_at:
            return
        name = "What the run left" if wanted.release is None else f"Release {wanted.release}"
        try:
            assert self._open is not None
            opened = self._open(wanted)
        except Exception as error:  # noqa: BLE001  (of whatever kind: the one before goes on)
            self._failed, self._retry_at = wanted, time.monotonic() + self._retry_s
            self._refuse(name, error)
            return
        before, self.current = self.current, opened
        self.refused = self.told = self._failed = None
        before.close()
        logger.warning("%s serves now, instead of %s.", name, _name(before.served))

    def _refuse(self, name: str, error: Exception) -> None:
        reason = f"{name} cannot be served: {error or type(error).__name__}"
        if reason != self.refused:
            logger.error("%s %s goes on.", reason, _name(self.current.served))
        self.refused = reason
        self.told = f"{name} cannot be served: {_kind(error)}. The replica's log has the reason."

    def _follow(self, every_s: float) -> None:
        while not self._stop.wait(every_s):
            self.check()


def open_first(read: Callable[[], Served], otherwise: Served, open: Callable[[Served], OpenRelease]) -> OpenRelease:
    """What should be served now, or, where that cannot be opened, `otherwise`.

    Raises:
        MimRayError: neither can be opened.
    """
    try:
        return open(read())
    except Exception as error:  # noqa: BLE001  (a replica that dies must come back)
        logger.error("What is current cannot be served: %s", error or type(error).__name__)
    return open(otherwise)


def _kind(error: Exception) -> str:
    """What sort of problem it is, in words that tell strangers nothing."""
    for kinds, words in _KINDS:
        if isinstance(error, kinds):
            return words
    return "opening it failed"


def _name(served: Served) -> str:
    return "what the run left" if served.release is None else f"release {served.release}"
