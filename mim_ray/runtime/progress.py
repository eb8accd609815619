"""Rate and remaining time of long work, on stderr: one rewritten line on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Progress:
    """Counts units of work.

        with Progress("encode", total=3000, unit="items") as progress:
            progress.add(256, note="loss 2.31")

    Args:
        total: how many units there will be, None when unknown (no remaining time then).
        every_s: shortest time between two lines.
    """

    def __init__(self, label: str, total: int | None = None, unit: str = "rows", every_s: float = 5.0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self._terminal = sys.stderr.isatty()
        self._every_s = 0.2 if self._terminal else every_s
        self._start = self._last = time.monotonic()

    def add(self, count: int, note: str = "") -> None:
        """Count `count` more units and show the state when the last line is old enough."""
        self.done += count
        now = time.monotonic()
        if now - self._last >= self._every_s:
            self._last = now
            self._show(now, note, end="\r" if self._terminal else "\n")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self._show(time.monotonic(), "", end="\n")

    def _show(self, now: float, note: str, end: str) -> None:
        seconds = max(now - self._start, 1e-9)
        rate = self.done / seconds
        text = f"{self.label}: {self.done:,}"
        if self.total is not None:
            text += f"/{self.total:,}"
        text += f" {self.unit}, {rate:,.0f}/s" if rate >= 10 else f" {self.unit}, {rate:.1f}/s"
        if self.total is not None and 0 < self.done < self.total:
            text += f", {format_seconds((self.total - self.done) / rate)} left"
        elif self.done:
            text += f", {format_seconds(seconds)}"
        if note:
            text += f", {note}"
        print(text.ljust(78) if self._terminal else text, end=end, file=sys.stderr, flush=True)


def format_seconds(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
