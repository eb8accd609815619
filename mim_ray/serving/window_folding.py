"""The window of new items enters the Delta table."""

from __future__ import annotations

import logging
import random
import threading
import time

from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import fold

logger = logging.getLogger("ray.serve")


class WindowFolding:
    """A thread that folds the window into the Delta table every `window_s`. Each replica has one: folding is safe beside
    others, and goes on when a replica dies."""

    def __init__(self, center: str, window_s: float) -> None:
        self._center, self._window_s = center, window_s
        self._folded_at = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="window-folding")
        self._thread.start()

    def age_s(self) -> float:
        """Seconds since the window was last folded, or since the start."""
        return time.monotonic() - self._folded_at

    def stop(self) -> None:
        """Finish the round that runs, and start none."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        table, told = EmbeddingTable(f"{self._center}/table"), ""
        while not self._stop.wait(self._window_s * random.uniform(0.8, 1.2)):  # replicas drift apart
            try:
                fold(f"{self._center}/window", table)
                self._folded_at, told = time.monotonic(), ""
            except Exception as error:  # storage may fail for a while: nothing is lost, the next round folds it
                if str(error) != told:  # a damaged segment stays until somebody moves it away
                    logger.exception("the window could not be folded; it is tried every %.0f s", self._window_s)
                told = str(error)
