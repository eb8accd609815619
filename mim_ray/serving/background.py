"""Work that a replica repeats in a thread of its own, as long as somebody holds the object that it is done for."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger("ray.serve")
T = TypeVar("T")


def repeat(
    owner: T, stop: threading.Event, name: str, every_s: Callable[[], float], work: Callable[[T], object]
) -> None:
    """Call work(owner) every `every_s()` seconds until `stop` is set or nobody but this thread would hold `owner`.

    What fails is told once and tried again: storage may be away for a while.
    """
    reference = weakref.ref(owner)
    del owner

    def run() -> None:
        failing = False
        while not stop.wait(every_s()):
            held = reference()
            if held is None:
                return
            try:
                work(held)
                failing = False
            except Exception:
                if not failing:
                    logger.exception("%s failed; it is tried again, and this is told once", name)
                failing = True
            del held

    threading.Thread(target=run, daemon=True, name=name).start()
