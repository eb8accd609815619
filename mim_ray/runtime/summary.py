"""What a stage tells at its end: figures for machines, lines for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StageResult:
    """Outcome of a stage.

    Attributes:
        metrics: JSON-able figures, kept in the artifact.
        rows: (label, text) pairs, printed as the stage's summary.
        rejects: number of unusable rows by reason.
    """

    metrics: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[tuple[str, str]] = ()
    rejects: Mapping[str, int] = field(default_factory=dict)


def format_summary(title: str, rows: Sequence[tuple[str, str]], rejects: Mapping[str, int] | None = None) -> str:
    """A small aligned table under a title."""
    lines = list(rows)
    lines += [(f"rejected: {reason}", f"{count:,} rows") for reason, count in sorted((rejects or {}).items())]
    width = max((len(label) for label, _ in lines), default=0)
    return "\n".join([f"── {title} " + "─" * max(0, 76 - len(title)), *(f"   {a:<{width}}  {b}" for a, b in lines)])
